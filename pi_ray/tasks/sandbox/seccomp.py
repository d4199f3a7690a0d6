"""The filter of system calls inside the sandbox (seccomp): what neither a namespace nor a resource limit bounds.

Refused, with EPERM, are memory that belongs to no address space (System V IPC, memfd), keys, which the kernel keeps for
no namespace, bpf, performance counters, userfaultfd, io_uring, which would go round this filter, and sockets of other
families than unix and IP: VM sockets (AF_VSOCK) know no network namespace.
"""

import platform
import struct

ARCHITECTURES = {  # platform.machine() -> the kernel's audit number, numbers of refused calls, of socket and socketpair
    "x86_64": (0xC000003E, {
        "shmget": 29, "semget": 64, "msgget": 68, "memfd_create": 319, "add_key": 248, "request_key": 249,
        "keyctl": 250, "perf_event_open": 298, "bpf": 321, "userfaultfd": 323,
    }, (41, 53)),
    "aarch64": (0xC00000B7, {
        "shmget": 194, "semget": 190, "msgget": 186, "memfd_create": 279, "add_key": 217, "request_key": 218,
        "keyctl": 219, "perf_event_open": 241, "bpf": 280, "userfaultfd": 282,
    }, (198, 199)),
}
NUMBERED_ALIKE = {"io_uring_setup": 425, "memfd_secret": 447}  # calls since Linux 5.1 have one number everywhere
FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6
X32 = 0x40000000  # from here on an x86-64 kernel knows the same calls by other numbers
LOAD, EQUAL, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06  # instructions of classic BPF
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050001, 0x80000000  # SECCOMP_RET_ALLOW, _ERRNO with EPERM, _KILL_PROCESS


def syscall_filter(machine: str = platform.machine()) -> bytes:
    """An array of struct sock_filter. Raises OSError for a machine whose numbers of system calls are not known here."""
    if machine not in ARCHITECTURES:
        raise OSError(f"there is no filter of system calls for {machine}, only for {', '.join(ARCHITECTURES)}")
    architecture, calls, sockets = ARCHITECTURES[machine]
    refused = sorted({**calls, **NUMBERED_ALIKE}.values())
    refuse, families = len(FAMILIES) + 2, 1  # places after the last call: of REFUSE, and of the load of the family
    code = [
        (LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER),
    ]
    tests = [(AT_LEAST, X32, refuse), *((EQUAL, n, refuse) for n in refused), *((EQUAL, n, families) for n in sockets)]
    code += [(kind, len(tests) - 1 - i + place, 0, value) for i, (kind, value, place) in enumerate(tests)]
    code += [(RETURN, 0, 0, ALLOW), (LOAD, 0, 0, FIRST_ARGUMENT)]
    code += [(EQUAL, len(FAMILIES) - i, 0, family) for i, family in enumerate(FAMILIES)]
    code += [(RETURN, 0, 0, REFUSE), (RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
