"""Deaths at every change of the disk: train, publish and release on a tiny model, killed once at each of their points.

    python -m tests.bench.crash [--every 1]

A point is a file opened for writing, a rename, a sync, a removal, a folder made or removed, below the run directory or
the store. At a sync the file is also cut in half, as a power cut may leave it. After each death the step runs again and
must end with the same bits as an undisturbed one, with nothing half made left over. Last line JSON; exit status 1 when
one did not. CI tries a sample of the points (tests/unit/test_crash_points.py).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from tests.bench.report import header, last_line
from tests.conftest import tiny
from tests.crash_steps import STEPS, copy_root, make_ready, outcome
from tests.crashing import run_step


def try_step(name: str, source: Path, folder: Path, every: int) -> tuple[int, list[str]]:
    """(deaths, what went wrong after some of them) of one step."""
    undisturbed = copy_root(source, folder / "undisturbed")
    changes = run_step(STEPS[name], undisturbed) or []
    expected, wrong, deaths = outcome(undisturbed), [], 0
    for at, change in enumerate(changes, start=1):
        for torn in (False, True) if change.startswith("fsync") else (False,):
            if deaths % every == 0:
                root = copy_root(source, folder / "died")
                try:
                    if run_step(STEPS[name], root, at, torn) is not None:
                        wrong.append(f"{change}: it did not die there")
                    run_step(STEPS[name], root)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="try only every so many points")
    args = parser.parse_args()
    header("deaths at every change of the disk")
    with tempfile.TemporaryDirectory() as temporary:
        roots = make_ready(Path(temporary) / "roots", tiny(Path(temporary) / "model", "Llama"))
        tried = {name: try_step(name, roots[name], Path(temporary) / name, args.every) for name in STEPS}
    last_line(
        **{f"{name}_deaths": deaths for name, (deaths, _) in tried.items()},
        gone_wrong=sum(len(wrong) for _, wrong in tried.values()),
    )
    if any(wrong for _, wrong in tried.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
