"""Walls around one program: namespaces, a root of its own with little in it, a user without rights.

Linux and util-linux, as root or with unprivileged user namespaces. For each program:
    unshare    own mounts, network (no interface is up), processes, IPC; as an ordinary user also an own user namespace
    mount      /usr, the interpreter and three devices, read-only, into an otherwise empty root; a fresh tmpfs as /tmp
    chroot     into that root, without home directories, /etc, /proc, /sys and other files. The kernel gives such a
               process no new user namespaces, which closes the way back to privileges and to more mounts
    timeout    the first process of the tree, with which the kernel ends the whole tree; soon after the wall limit it
               ends by itself, should nobody be there any more to end it
    setpriv    as root: a user id that nobody else has; for all: no capabilities, no new privileges
    seccomp    no memory outside address spaces; no keys or sockets that know no namespace (see seccomp.py)
`Jail.tests` states each wall as an assert. They run inside first, so each printed protection was seen to hold.
"""

import contextlib
import itertools
import os
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from pi_ray.tasks.sandbox.seccomp import syscall_filter

SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/libx32", "/bin", "/sbin", "/nix/store", "/gnu/store")  # libraries
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
TOOLS = ("unshare", "mount", "chroot", "timeout", "setpriv", "sh")
SEARCH = "/usr/sbin:/usr/bin:/sbin:/bin"
USERS = (50_000, 60_000)  # user ids that no distribution hands out by itself
SCRIPT = (
    "echo 1000 >/proc/self/oom_score_adj; "  # short of memory, the kernel ends a program before anything else
    '"$1" --all --fstab "$2/fstab" || exit 1; '
    # `ro` of a recursive bind holds for its top alone: what is mounted below is made read-only one by one
    "while read -r _ _ _ _ place options _; do "
    'case "$options:$place" in "rw"*:"$2/root/dev/"*) ;; "rw"*:"$2/root/"*) '
    '"$1" -o "remount,bind,ro${options#rw}" "$(printf %b "$place")" || exit 1 ;; '
    "esac; done </proc/self/mountinfo; "
    '"$1" -t tmpfs -o "size=$3m,nr_inodes=4k,mode=1777,nosuid,nodev" tmpfs "$2/root/tmp" && shift 3 && exec "$@"'
)
PROBE = """
import ctypes, os, resource, socket
def refused(call, *arguments):
    try:
        call(*arguments)
    except OSError as error:
        return os.strerror(error.errno)
def raises(name, *arguments):
    libc = ctypes.CDLL(None, use_errno=True)
    return os.strerror(ctypes.get_errno()) if getattr(libc, name)(*arguments) < 0 else ""
def size(folder):
    seen = os.statvfs(folder)
    return seen.f_blocks * seen.f_frsize
def read_only(*folders):
    return all(os.statvfs(folder).f_flag & os.ST_RDONLY for folder in folders)
"""

ResourceLimits = dict[str, int]  # name in the module `resource` -> soft and hard limit

_numbers = itertools.count(os.getpid() * 64)  # sandboxes of one machine start at different ids


def user_id() -> int:
    """A user id for one place in a sandbox, where this process may change users; else its own."""
    first, end = USERS
    return first + next(_numbers) % (end - first) if os.geteuid() == 0 else os.getuid()


def interpreter() -> tuple[Path, set[Path]]:
    """This Python without its virtual environment, and the folders that hold it and its standard library."""
    python = Path(getattr(sys, "_base_executable", "") or sys.executable).resolve()
    return python, {Path(prefix).resolve() for prefix in (sys.base_prefix, sys.base_exec_prefix, python.parent)}


def describe_limits(limits: ResourceLimits) -> str:
    listed = (f"{name.removeprefix('RLIMIT_').lower()} {value}" for name, value in limits.items())
    return f"limits of each process: {', '.join(listed)}"


class Jail:
    """The walls of one Sandbox. Raises OSError, with the reason as its text, where a tool is missing."""

    def __init__(self) -> None:
        tools = {tool: shutil.which(tool, path=SEARCH) or shutil.which(tool) for tool in TOOLS}
        self.tools = {tool: path for tool, path in tools.items() if path}
        if missing := [tool for tool in TOOLS if tool not in self.tools]:
            raise OSError(f"this machine has no {', '.join(missing)}")
        needed = interpreter()[1]
        if forbidden := needed & {Path("/"), Path(os.path.expanduser("~"))}:
            raise OSError(f"Python is installed in {forbidden.pop()} itself, which programs would have to see")
        self.syscall_filter = syscall_filter()
        self._folder = tempfile.TemporaryDirectory(prefix="pi-ray-sandbox-", ignore_cleanup_errors=True)
        self.folder = Path(self._folder.name).resolve()
        self.folder.chmod(0o755)
        self.visible = self._build_root(needed)

    def command(self, program: list[str], seconds: float, files_mib: int, user: int) -> list[str]:
        namespace = ["--user", "--map-root-user"] if os.geteuid() else []
        drop = [f"--reuid={user}", f"--regid={user}", "--clear-groups"]
        if namespace:
            drop = ["--securebits=+noroot,+noroot_locked"]
        return [
            self.tools["unshare"], *namespace, "--mount", "--net", "--ipc", "--pid", "--fork", "--kill-child",
            self.tools["sh"], "-c", SCRIPT, "sh", self.tools["mount"], str(self.folder), str(files_mib),
            self.tools["chroot"], str(self.folder / "root"),
            self.tools["timeout"], "--signal=KILL", str(seconds + 1),
            self.tools["setpriv"], *drop, "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", *program,
        ]

    def kill(self, pid: int) -> None:
        """End the tree of process `pid` that `command` started; `unshare` stays until all processes inside are gone."""
        try:
            inside = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        except OSError:  # a kernel without this file
            inside = []
        for process in inside or [pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def tests(self, limits: ResourceLimits, files_mib: int, user: int) -> list[tuple[str, str]]:
        """(sentence, assert that proves it) for each wall; PROBE defines the functions that the asserts call."""
        top, shown = sorted(p.name for p in (self.folder / "root").iterdir()), self.visible
        inside, named = 0, "root of an own user namespace, mapped to this user"
        if os.geteuid() == 0:
            inside, named = user, f"a user id of its own, such as {user}"
        walls: dict[str, tuple[str, Any]] = {
            "network: none, not even loopback":
                ("[refused(socket.create_connection, (host, 9), 1) for host in ('127.0.0.1', '192.0.2.1')]",
                    ["Network is unreachable"] * 2),
            "processes: an own tree, which ends with the program": ("os.getppid()", 1),
            f"files: {', '.join(shown)}, read-only; nothing else of this machine":
                (f"[sorted(os.listdir('/')), read_only('/', *{shown + self._mounted_below()})]", [top, True]),
            f"writing: a private /tmp of {files_mib} MiB, in memory, gone with the program":
                ("[size('/tmp'), os.listdir('/tmp')]", [files_mib << 20, []]),
            f"rights: {named}; no capabilities":
                ("[os.getuid(), refused(os.chroot, '/tmp')]", [inside, "Operation not permitted"]),
            "system calls: no System V memory, no memory files, no sockets but unix and IP":
                ("[raises('shmget', 0, 4096, 0o1600), raises('memfd_create', b'x', 0), refused(socket.socket, 40)]",
                    ["Operation not permitted"] * 3),
            describe_limits(limits):
                (f"[resource.getrlimit(getattr(resource, n)) for n in {[*limits]}]", [(n, n) for n in limits.values()]),
        }
        return [(sentence, f"assert {found} == {expected}") for sentence, (found, expected) in walls.items()]

    def _mounted_below(self) -> list[str]:
        """Where something is mounted below a folder that programs see."""
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        places = [Path(re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), line.split()[4])) for line in lines]
        return [str(p) for p in places if any(parent in p.parents for parent in map(Path, self.visible))]

    def _build_root(self, needed: set[Path]) -> list[str]:
        """Create the empty root and the fstab that fills it for each program; returns the folders that programs see."""
        root = self.folder / "root"
        visible: list[str] = []
        mounts = [(root, root, "bind,ro")]
        (root / "tmp").mkdir(parents=True)
        (root / "dev").mkdir()
        (root / "dev" / "shm").symlink_to("../tmp")
        for path in sorted({*map(Path, SYSTEM), *needed}):
            inside = root / path.relative_to("/")
            if path.is_symlink():
                inside.symlink_to(os.readlink(path))
            elif path.is_dir() and not any(path.is_relative_to(source) for source in visible):
                inside.mkdir(parents=True)
                visible.append(str(path))
                mounts.append((path, inside, "rbind,ro"))
        for device in map(Path, DEVICES):
            inside = root / device.relative_to("/")
            inside.touch()
            mounts.append((device, inside, "bind"))
        if (cache := Path("/etc/ld.so.cache")).is_file():  # libraries in /usr/local/lib are found through it
            (root / "etc").mkdir()
            shutil.copy(cache, root / "etc" / "ld.so.cache")
        for folder, _, _ in os.walk(root):
            os.chmod(folder, 0o755)
        lines = [f"{_escape(source)} {_escape(target)} none {options} 0 0\n" for source, target, options in mounts]
        (self.folder / "fstab").write_text("".join(lines))
        return visible


def _escape(path: Path) -> str:
    return str(path).replace("\\", r"\134").replace(" ", r"\040").replace("\t", r"\011")
