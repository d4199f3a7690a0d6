"""Deaths at every change of the disk: prepare, train, publish and release, killed once at each of their points.

    python -m tests.bench.crash [--every 1] [--only prepare,train,publish,release]

A point is a file opened for writing, a rename, a sync, a removal, a folder made or removed, below the run directory or
the store. At a sync the file is also cut in half, as a power cut may leave it. After each death the step runs again and
must end with the same bits as an undisturbed one, with nothing half made left over. Of preparation it is the driver
that dies; the Ray cluster stays. The model is tiny. Last line JSON; exit status 1 when a step did not end so. CI tries
a sample of the points (tests/unit/test_crash_points.py).
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bench.report import header, last_line
from tests.conftest import tiny
from tests.crash_steps import STEPS, copy_root, make_ready, make_ready_to_prepare, outcome, prepare
from tests.crashing import run_step
from tests.faults.service import free_port
from tests.hosts import wait


def try_step(
    name: str, step: Callable[[Path], None], source: Path, folder: Path, every: int
) -> tuple[int, list[str]]:
    """(deaths, what went wrong after some of them) of one step."""
    undisturbed = copy_root(source, folder / "undisturbed")
    changes = run_step(step, undisturbed) or []
    expected, wrong, deaths = outcome(undisturbed), [], 0
    for at, change in enumerate(changes, start=1):
        for torn in (False, True) if change.startswith("fsync") else (False,):
            if deaths % every == 0:
                root = copy_root(source, folder / "died")
                try:
                    if run_step(step, root, at, torn) is not None:
                        wrong.append(f"{change}: it did not die there")
                    run_step(step, root)
                    if outcome(root) != expected:
                        wrong.append(f"{change}{', torn' if torn else ''}: another outcome")
                except Exception as error:
                    wrong.append(f"{change}{', torn' if torn else ''}: {error}")
                shutil.rmtree(root)
            deaths += 1
        if sys.stdout.isatty():
            print(f"\r  {name}: {at} of {len(changes)} points", end="", flush=True)
    print(f"\r  {name}: {len(changes)} changes of the disk, {-(-deaths // every)} deaths, {len(wrong)} gone wrong")
    for line in wrong:
        print(f"    {line}")
    return -(-deaths // every), wrong


@contextmanager
def ray_cluster(folder: Path) -> Iterator[None]:
    """A Ray cluster of this machine, with a token, which drivers find by their environment."""
    folder.mkdir()
    (folder / "token").write_text(secrets.token_hex(32))
    (folder / "token").chmod(0o600)
    port = free_port()
    os.environ |= {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "RAY_ADDRESS": f"127.0.0.1:{port}",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = ["start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=2"]
    ray = str(Path(sys.executable).with_name("ray"))
    head = subprocess.Popen([ray, *command, "--include-dashboard=false"], stdout=subprocess.DEVNULL)
    try:
        wait("the cluster's head", lambda: is_open(port))
        yield
    finally:
        head.terminate()
        head.wait()


def is_open(port: int) -> bool:
    with socket.socket() as made:
        return made.connect_ex(("127.0.0.1", port)) == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="try only every so many points")
    parser.add_argument("--only", default="prepare,train,publish,release", help="the steps, with commas between")
    args = parser.parse_args()
    header("deaths at every change of the disk")
    steps, tried = args.only.split(","), {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if "prepare" in steps:
            with ray_cluster(folder / "ray"):
                root = make_ready_to_prepare(folder / "roots" / "prepare")
                tried["prepare"] = try_step("prepare", prepare, root, folder / "prepare", args.every)
        if later := [name for name in STEPS if name in steps]:
            roots = make_ready(folder / "roots", tiny(folder / "model", "Llama"))
            tried |= {name: try_step(name, STEPS[name], roots[name], folder / name, args.every) for name in later}
    last_line(
        **{f"{name}_deaths": deaths for name, (deaths, _) in tried.items()},
        gone_wrong=sum(len(wrong) for _, wrong in tried.values()),
    )
    if any(wrong for _, wrong in tried.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
