"""Runs generated programs against tests, many at a time, with nothing of this machine in their reach.

jail.py puts walls around a process, harness.py runs in it, judge.py decides outside, by value: an exit code or printed
words count for nothing. A hostile program can still use up its limits (at most `processes` times `memory_mib`, the only
bound on their sum, `seconds` long), see the folders that `protections` names, learn the machine's time and kernel
version, attack the kernel through what seccomp.py allows, and use judge.py's gap: asserts without a literal.
"""

import marshal
import math
import os
import queue
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import IO, Any

from pi_ray.errors import ConfigError
from pi_ray.tasks.sandbox.jail import PROBE, SEARCH, Jail, ResourceLimits, describe_limits, interpreter, user_id
from pi_ray.tasks.sandbox.judge import Step, judge_answer, read_values, split_tests

READY = b"ready\n"
ENVIRONMENT = {"PATH": SEARCH, "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}  # sets in the same order
CURE = (
    "It needs Linux on x86_64 or aarch64 with util-linux, and the right to make namespaces: run as root, or allow user "
    "namespaces (sysctl kernel.unprivileged_userns_clone=1 and kernel.apparmor_restrict_unprivileged_userns=0, where "
    "they exist), or give a container the capability SYS_ADMIN. With task.unsafe_local_execution: true generated code "
    "runs without walls, with all that you may do yourself"
)


@dataclass(frozen=True)
class Limits:
    """Limits of one program, and of each of its processes."""

    seconds: float = 10.0
    memory_mib: int = 1024  # of address space
    output_kib: int = 64  # of values that the tests ask for; printed text is dropped unread
    files_mib: int = 16  # of its private /tmp
    processes: int = 8  # and threads


@dataclass(frozen=True)
class Program:
    """Untrusted `code`, then the task's `setup` and `tests` (asserts), which run in its namespace, in this order."""

    code: str
    tests: tuple[str, ...]
    setup: str = ""
    limits: Limits | None = None


@dataclass(frozen=True)
class Verdict:
    """`reason`: "passed", "failed: test 2", "raised NameError", "timeout", "no answer" (crashed), "too much output"."""

    passed: bool
    reason: str
    seconds: float  # of wall time, all included


class Sandbox:
    """Runs at most `parallel` programs at a time (0: as many as this process has cores), for any thread.

    The constructor runs a probe inside and raises ConfigError where a wall does not hold, unless `unsafe_local`: then
    programs run as plain processes with resource limits and a scratch folder, which `protections` says.
    """

    def __init__(self, limits: Limits = Limits(), parallel: int = 0, unsafe_local: bool = False):
        self.limits = limits
        if not parallel:
            import joblib

            parallel = joblib.cpu_count()
        self.parallel = parallel
        self._harness = files("pi_ray.tasks.sandbox").joinpath("harness.py").read_text(encoding="utf-8")
        self._users: queue.SimpleQueue[int] = queue.SimpleQueue()
        for _ in range(self.parallel):
            self._users.put(user_id())
        self.protections: tuple[str, ...]  # a sentence each; with walls, each was seen to hold when this was made
        self._jail: Jail | None = None
        try:
            self._jail = Jail()
            self.protections = self._probe(self._jail)
        except OSError as error:
            if not unsafe_local:
                raise ConfigError(f"generated code cannot be run safely here: {error}. {CURE}") from None
            self._jail = None
            self.protections = (
                "NO WALLS: generated code runs with this user's rights, can change this user's files and use the "
                f"network ({error})",
                f"{describe_limits(_resource_limits(limits, walled=False))}; {limits.seconds:g} s of wall time",
            )

    def run(self, program: Program) -> Verdict:
        """Raises DataError when the tests are unusable, ConfigError when the sandbox itself no longer starts."""
        with self._user() as user:
            return self._run(program, user)

    def values(self, code: str, expressions: Sequence[str]) -> tuple[list[Any], str]:
        """(values of expressions after `code`, "" or why there are not all of them), computed in one process.

        The values are plain data that the code may have made up. Raises ConfigError as `run`.
        """
        steps = [Step("value", expression) for expression in expressions]
        with self._user() as user:
            answer, reason = self._answer((code,), steps, self.limits, user)
        if not answer:
            return [], f"took more than {self.limits.seconds:g} s" if reason == "timeout" else f"gave {reason}"
        found, ended = read_values(answer)
        return found, ended or ("" if len(found) == len(steps) else "gave no readable answer")

    @contextmanager
    def _user(self) -> Iterator[int]:
        user = self._users.get()
        try:
            yield user
        except OSError as error:
            raise ConfigError(f"the sandbox did not start: {error}. {CURE}") from None
        finally:
            self._users.put(user)

    def run_all(self, programs: Sequence[Program]) -> list[Verdict]:
        with ThreadPoolExecutor(self.parallel) as pool:
            return list(pool.map(self.run, programs))

    def _run(self, program: Program, user: int) -> Verdict:
        steps, started = split_tests(program.tests), time.monotonic()
        answer, reason = self._answer((program.code, program.setup), steps, program.limits or self.limits, user)
        reason = judge_answer(steps, answer) if answer else reason
        return Verdict(reason == "passed", reason, time.monotonic() - started)

    def _answer(self, sources: Sequence[str], steps: Sequence[Step], limits: Limits, user: int) -> tuple[bytes, str]:
        """(the harness's output, or nothing and the reason)."""
        started = time.monotonic()
        deadline = started + limits.seconds
        with ExitStack() as stack:
            folder = "/tmp"
            if not self._jail:
                folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            request = stack.enter_context(tempfile.TemporaryFile())
            sent = [(step.kind, step.source) for step in steps]
            syscall_filter = self._jail.syscall_filter if self._jail else b""
            resources = _resource_limits(limits, bool(self._jail))
            marshal.dump((resources, syscall_filter, folder, tuple(sources), sent), request)
            request.seek(0)
            process = stack.enter_context(self._popen(limits, user, request))
            assert process.stdout and process.stderr
            answer = _read_until(process.stdout.fileno(), limits.output_kib << 10, deadline)
            process.stdout.close()
            self._end(process, deadline)
            complaint = process.stderr.read(4096).decode(errors="replace").strip()
        if time.monotonic() - started >= limits.seconds:
            return b"", "timeout"
        if not answer.startswith(READY):
            raise OSError(complaint or f"its command ended with {process.returncode} without a message")
        answer = answer.removeprefix(READY)
        if len(answer) > limits.output_kib << 10:
            return b"", "too much output"
        return answer, "" if answer else "no answer"

    def _popen(self, limits: Limits, user: int, request: IO[bytes]) -> subprocess.Popen[bytes]:
        command = [str(interpreter()[0]), "-s", "-S", "-P", "-B", "-X", "utf8", "-c", self._harness]
        if self._jail:
            command = self._jail.command(command, limits.seconds, limits.files_mib, user)
        return subprocess.Popen(
            command, stdin=request, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/", env=ENVIRONMENT,
            start_new_session=True,
        )

    def _end(self, process: subprocess.Popen[bytes], deadline: float) -> None:
        """Returns when the process is gone, with its whole tree inside walls, else with its process group."""
        if self._jail:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._jail.kill(process.pid)
        else:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _probe(self, jail: Jail) -> tuple[str, ...]:
        """A sentence for each wall. Raises OSError when the probe does not run inside or finds a wall missing."""
        limits = replace(self.limits, seconds=max(self.limits.seconds, 10.0))
        user = self._users.get()
        walls = jail.tests(_resource_limits(limits, walled=True), limits.files_mib, user)
        verdict = self._run(Program(PROBE, tuple(test for _, test in walls), limits=limits), user)
        self._users.put(user)
        if not verdict.passed:
            raise OSError(f"a test program did not find the walls that it should ({verdict.reason} of {len(walls)})")
        outside = "verdicts: values are compared outside, and expected literals never enter"
        return *(sentence for sentence, _ in walls), f"wall time: {self.limits.seconds:g} s", outside


def _resource_limits(limits: Limits, walled: bool) -> ResourceLimits:
    """Without walls the process limit is left out: it would count all of the user's processes."""
    chosen = {
        "RLIMIT_CPU": math.ceil(limits.seconds) + 1, "RLIMIT_FSIZE": limits.files_mib << 20, "RLIMIT_CORE": 0,
        "RLIMIT_NOFILE": 64,
    }
    if sys.platform == "linux":  # elsewhere address space cannot be limited
        chosen["RLIMIT_AS"] = limits.memory_mib << 20
    return {**chosen, "RLIMIT_NPROC": limits.processes} if walled else chosen


def _read_until(descriptor: int, limit: int, deadline: float) -> bytes:
    """Bytes until the end of the stream, the deadline, or more than `limit` and READY."""
    found = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while len(found) <= limit + len(READY) and selector.select(max(0.0, deadline - time.monotonic())):
            chunk = os.read(descriptor, 1 << 16)
            if not chunk:
                break
            found += chunk
    return bytes(found)
