"""The sandbox of an ordinary user, which needs a user namespace, and of root: walls hold where folders hold mounts."""

import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from textwrap import dedent

import pytest

from pi_ray.tasks.sandbox.jail import interpreter
from tests.attacks import ATTACKS, HONEST

pytestmark = [
    pytest.mark.sandbox, pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user and mount"),
]
ROOT = Path(__file__).parents[2]
USER = 1500
BELOW = "/usr/share"  # a folder that programs see, on which something is mounted
ENDLESS = {
    "an infinite loop that ignores signals", "a fork bomb", "a flood of output", "a flood on every descriptor",
    "recursion without end",
}
SERVER = """
import pickle, sys
from pi_ray.tasks.sandbox.runner import Limits, Program, Sandbox
seconds, programs = pickle.load(sys.stdin.buffer)
sandbox = Sandbox(Limits(seconds=seconds), parallel=2)
verdicts = sandbox.run_all([Program(*program) for program in programs])
sys.stdout.buffer.write(pickle.dumps((sandbox.protections, [v.reason for v in verdicts])))
"""
# The interpreter and this repository may lie where only root can go.
MOUNTS = f"""
mount --bind "$1" "$3/python" && mount --bind "$2" "$3/repo" || exit 1
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs {BELOW} || exit 1
shift 3
exec "$@"
"""


@pytest.fixture
def folder():
    """A folder that every user may enter; /tmp would be hidden in the sandbox."""
    made = Path(tempfile.mkdtemp(dir="/var/tmp"))
    made.chmod(0o755)
    for name in ("python", "repo"):
        (made / name).mkdir()
    yield made
    shutil.rmtree(made)


def run_as(
    user: int, folder: Path, programs: list[tuple[str, tuple[str, ...]]], seconds: int = 20
) -> tuple[list[str], list[str]]:
    """(protections, reason of each verdict) of a sandbox that `user` has made, with a tmpfs on BELOW."""
    python = interpreter()[0]
    drop = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"] if user else []
    inside = folder / "python" / python.relative_to(Path(sys.base_prefix).resolve())
    command = [
        "unshare", "--mount", "sh", "-c", MOUNTS, "sh", sys.base_prefix, str(ROOT), str(folder),
        *drop, "env", f"PYTHONPATH={folder}/repo", "HOME=/nonexistent", str(inside), "-B", "-c", SERVER,
    ]
    done = subprocess.run(command, input=pickle.dumps((seconds, programs)), capture_output=True, timeout=120, cwd="/")
    assert not done.returncode, done.stderr.decode()
    return pickle.loads(done.stdout)


def processes_of(user: int) -> list[str]:
    """What the user's processes run."""
    owned = [path for path in Path("/proc").glob("[0-9]*") if path.exists() and path.stat().st_uid == user]
    return [(path / "cmdline").read_text() for path in owned]


def test_no_attack_passes_in_the_sandbox_of_an_ordinary_user(folder):
    canary = folder / "canary"
    canary.write_text("secret")
    canary.chmod(0o600)
    os.chown(canary, USER, USER)
    words = {
        "PORT": 9, "CANARY": canary, "WRITABLE": canary, "PREFIX": folder / "python", "FOLDER": folder,
        "PID": os.getpid(), "MARK": "pi-ray-was-here",
    }
    codes = {
        name: re.sub(r"\b(" + "|".join(words) + r")\b", lambda found: str(words[found[1]]), dedent(code))
        for name, code in ATTACKS.items()
    }
    honest = (dedent(HONEST), ("assert f()['sum'] == 1",))
    programs = {name: (code, ("assert f() == 'done'",)) for name, code in codes.items()}
    ending = {name: program for name, program in programs.items() if name not in ENDLESS}
    protections, reasons = run_as(USER, folder, [honest, *ending.values()])
    assert any("own user namespace" in wall for wall in protections) and reasons[0] == "passed"
    assert [name for name, reason in zip(ending, reasons[1:], strict=True) if reason in ("passed", "timeout")] == []
    _, reasons = run_as(USER, folder, [programs[name] for name in ENDLESS], seconds=2)
    assert "passed" not in reasons and len(reasons) == len(ENDLESS)
    assert processes_of(USER) == []
    assert canary.read_text() == "secret" and sorted(os.listdir(folder)) == ["canary", "python", "repo"]


@pytest.mark.parametrize("user", [0, USER], ids=["root", "an ordinary user"])
def test_what_is_mounted_below_a_visible_folder_is_read_only(user, folder):
    code = f"""
        def f():
            try:
                open('{BELOW}/left', 'w').write('x')
            except OSError as error:
                return error.strerror
        """
    _, reasons = run_as(user, folder, [(dedent(code), ("assert f() == 'Read-only file system'",))])
    assert reasons == ["passed"]
