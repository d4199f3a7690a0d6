"""Deaths at every change of the disk: prepare, train, publish and release, killed once at each of their points.

    python -m tests.bench.crash [--every 1] [--first 1] [--only prepare,workers,train,publish,release]

A point is a file opened for writing, a rename, a sync, a removal, a folder made or removed, below the run directory or
the store. At a sync the file is also cut in half, as a power cut may leave it. After each death the step runs again and
must end with the same bits as an undisturbed one, with nothing half made left over; each result is printed as it comes,
and `--first` goes on with a bench that was stopped. Of `prepare` it is the driver that dies, and the Ray cluster stays;
of `workers` it is the cluster's worker that makes the change, and the same command goes on to its end. The model is
tiny. Last line JSON; exit status 1 when a step did not end so. CI tries a sample of the points
(tests/unit/test_crash_points.py, tests/faults/test_prepare_faults.py).
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
from tests.crashing import changes_of_workers, give_orders, obey, run_step
from tests.faults.service import free_port
from tests.hosts import wait


def try_step(
    name: str, step: Callable[[Path], None], source: Path, folder: Path, every: int, first: int
) -> tuple[int, int]:
    """(deaths, how many of them went wrong) of one step, from its death numbered `first` on."""
    undisturbed = copy_root(source, folder / "undisturbed")
    changes = run_step(step, undisturbed) or []
    expected, wrong = outcome(undisturbed), 0
    deaths = [(at, torn) for at, change in enumerate(changes, start=1) for torn in kinds_of_death(change)]
    tried = range(first - 1, len(deaths), every)
    for number in tried:
        at, torn = deaths[number]
        reason = try_death(step, copy_root(source, folder / "died"), at, torn, expected)
        wrong += bool(reason)
        told = f"{changes[at - 1]}{', torn' if torn else ''}: {reason or 'as undisturbed'}"
        print(f"  {name}: death {number + 1} of {len(deaths)}, {told}", flush=True)
    print(f"  {name}: {len(changes)} changes of the disk, {len(tried)} deaths, {wrong} gone wrong", flush=True)
    return len(tried), wrong


def kinds_of_death(change: str) -> tuple[bool, ...]:
    """Whether the file is torn: at a sync it is once whole and once not."""
    return (False, True) if change.startswith("fsync") else (False,)


def try_death(step: Callable[[Path], None], root: Path, at: int, torn: bool, expected: object) -> str:
    """Kill a step at a point, run it again, and say what is wrong with its outcome; "" where nothing is."""
    try:
        if run_step(step, root, at, torn) is not None:
            return "it did not die there"
        run_step(step, root)
        return "" if outcome(root) == expected else "another outcome"
    except Exception as error:
        return str(error)
    finally:
        shutil.rmtree(root)


def try_workers(source: Path, folder: Path, orders: Path, every: int, first: int) -> tuple[int, int]:
    """(deaths, how many went wrong) of preparation's workers, each within one run of it."""
    undisturbed = copy_root(source, folder / "undisturbed")
    give_orders(orders, undisturbed)
    run_step(prepare, undisturbed)
    changes, expected, wrong = changes_of_workers(orders), outcome(undisturbed), 0
    deaths = [(at, torn) for at, change in enumerate(changes, start=1) for torn in kinds_of_death(change)]
    tried = range(first - 1, len(deaths), every)
    for number in tried:
        reason = try_worker_death(copy_root(source, folder / "died"), orders, *deaths[number], expected)
        wrong += bool(reason)
        at, torn = deaths[number]
        change = "".join(changes_of_workers(orders)[at - 1 : at])  # none where no worker came so far
        told = f"{change}{', torn' if torn else ''}: {reason or 'as undisturbed'}"
        print(f"  workers: death {number + 1} of {len(deaths)}, {told}", flush=True)
    print(f"  workers: {len(changes)} changes of the disk, {len(tried)} deaths, {wrong} gone wrong", flush=True)
    return len(tried), wrong


def try_worker_death(root: Path, orders: Path, at: int, torn: bool, expected: object) -> str:
    """Kill the worker that makes change `at` of a preparation; what is wrong with the outcome, or ""."""
    give_orders(orders, root, at, torn)
    try:
        run_step(prepare, root)
        if len(changes_of_workers(orders)) < at:
            return "no worker died"
        return "" if outcome(root) == expected else "another outcome"
    except Exception as error:
        return str(error)
    finally:
        orders.unlink()
        shutil.rmtree(root)


@contextmanager
def ray_cluster(folder: Path, orders: Path | None = None) -> Iterator[None]:
    """A Ray cluster of this machine, with a token, which drivers find by their environment. Its workers obey `orders`
    (tests/crashing.py).
    """
    folder.mkdir(parents=True)
    (folder / "token").write_text(secrets.token_hex(32))
    (folder / "token").chmod(0o600)
    port = free_port()
    os.environ |= {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "RAY_ADDRESS": f"127.0.0.1:{port}",
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }
    command = ["start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=2"]
    ray = str(Path(sys.executable).with_name("ray"))
    environment = os.environ | ({"PYTHONPATH": obey(orders, folder / "packages")} if orders else {})
    head = subprocess.Popen(
        [ray, *command, "--include-dashboard=false"], stdout=subprocess.DEVNULL, env=environment
    )
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
    parser.add_argument("--first", type=int, default=1, help="the death to begin with, of each step")
    parser.add_argument("--only", default="prepare,workers,train,publish,release", help="steps, with commas between")
    args = parser.parse_args()
    header("deaths at every change of the disk")
    steps, tried = args.only.split(","), {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if {"prepare", "workers"} & {*steps}:
            orders = folder / "orders.json"
            root = make_ready_to_prepare(folder / "roots" / "prepare")
            with ray_cluster(folder / "ray", orders):
                if "prepare" in steps:
                    tried["prepare"] = try_step("prepare", prepare, root, folder / "prepare", args.every, args.first)
                if "workers" in steps:
                    tried["workers"] = try_workers(root, folder / "workers", orders, args.every, args.first)
        if later := [name for name in STEPS if name in steps]:
            roots = make_ready(folder / "roots", tiny(folder / "model", "Llama"))
            for name in later:
                tried[name] = try_step(name, STEPS[name], roots[name], folder / name, args.every, args.first)
    last_line(
        **{f"{name}_deaths": deaths for name, (deaths, _) in tried.items()},
        gone_wrong=sum(wrong for _, wrong in tried.values()),
    )
    if any(wrong for _, wrong in tried.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
