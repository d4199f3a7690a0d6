"""The filter of system calls, interpreted as the kernel does: what it refuses and allows on each architecture."""

import struct

import pytest

from pi_ray.tasks.sandbox import seccomp
from pi_ray.tasks.sandbox.seccomp import ALLOW, ARCHITECTURES, KILL, REFUSE, syscall_filter

REFUSED = {  # as the kernel's unistd.h of each architecture numbers them
    "x86_64": {"add_key": 248, "request_key": 249, "keyctl": 250, "bpf": 321, "perf_event_open": 298,
        "userfaultfd": 323, "shmget": 29, "memfd_create": 319, "io_uring_setup": 425, "memfd_secret": 447},
    "aarch64": {"add_key": 217, "request_key": 218, "keyctl": 219, "bpf": 280, "perf_event_open": 241,
        "userfaultfd": 282, "shmget": 194, "memfd_create": 279, "io_uring_setup": 425, "memfd_secret": 447},
}  # fmt: skip
NEEDED = {"x86_64": (0, 1, 9, 56, 231, 435), "aarch64": (63, 64, 222, 220, 94, 435)}  # read, write, mmap, ...


def verdict(machine, number, argument=0, architecture=None):
    """What the filter of `machine` returns for a call: classic BPF, of the four instructions that it uses."""
    data = {seccomp.NUMBER: number, seccomp.ARCHITECTURE: architecture or ARCHITECTURES[machine][0],
        seccomp.FIRST_ARGUMENT: argument}
    code, place, loaded = list(struct.iter_unpack("=HBBI", syscall_filter(machine))), 0, 0
    while True:
        kind, true, false, value = code[place]
        place += 1
        if kind == seccomp.RETURN:
            return value
        if kind == seccomp.LOAD:
            loaded = data[value]
        else:
            place += true if (loaded == value if kind == seccomp.EQUAL else loaded >= value) else false


@pytest.mark.parametrize("machine, name", [(machine, name) for machine in REFUSED for name in REFUSED[machine]])
def test_a_call_that_no_namespace_bounds_is_refused(machine, name):
    assert verdict(machine, REFUSED[machine][name]) == REFUSE


@pytest.mark.parametrize("machine", REFUSED)
def test_what_a_program_needs_is_allowed_and_sockets_by_family(machine):
    assert {verdict(machine, number) for number in NEEDED[machine]} == {ALLOW}
    for number in ARCHITECTURES[machine][2]:
        assert [verdict(machine, number, family) for family in (1, 2, 10, 16, 40)] == [ALLOW] * 3 + [REFUSE] * 2


def test_calls_of_another_architecture_end_the_program_and_those_of_x32_are_refused():
    assert verdict("x86_64", 0, architecture=0x40000003) == KILL
    assert verdict("x86_64", seccomp.X32 + 250) == REFUSE


def test_a_machine_whose_calls_are_not_known_gets_no_filter():
    with pytest.raises(OSError, match="no filter of system calls for riscv64, only for x86_64, aarch64"):
        syscall_filter("riscv64")
