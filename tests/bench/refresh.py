"""A changed prompt: how fast and how well a published adapter follows three changed codes of the demo's template.

    python -m tests.bench.refresh [--seed 0] [--folder FOLDER] [OVERRIDE ...]

The demo's rows and settings as files of one's own: a run, an edit of template.md (two codes of labelled services, one
that only the template tells), and `pi-ray refresh`. Test rows about the changed services, more than the demo has, are
scored with their new codes, all others against the same rows before. With a folder that holds a part already, only what
is missing is done; seconds of a step that was cut short are those of its last try.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from pi_ray.config import TaskConfig
from pi_ray.protocols import UNLABELLED, Row
from pi_ray.run.artifact import write_atomic
from pi_ray.tasks.opsql.language import SERVICES
from pi_ray.tasks.opsql.task import OpsqlTask
from pi_ray.train.train_log import read_entries
from tests.bench.report import header, last_line

CODE = re.compile(r"^from (\S+)")  # of a statement


def code_of(answer: str) -> str:
    """The service's code in a statement; "" where there is none."""
    found = CODE.match(answer.strip())
    return found[1] if found else ""


def changed_codes(seed: int, trained: Iterable[str]) -> dict[str, str]:
    """Old code -> new: of two services in `trained` (codes of labelled rows) and of one that is not."""
    rng, known = random.Random(f"refresh {seed}"), set(trained)
    hidden = sorted(set(SERVICES.values()) - known)
    chosen = [*rng.sample(sorted(known), 2), rng.choice(hidden)]
    free = [f"{letter}{digit}" for letter in "bcdfghjkmnpqrstvwxyz" for digit in "23456789"]
    fresh = rng.sample([code for code in free if code not in SERVICES.values()], 3)
    return dict(zip(chosen, fresh, strict=True))


def write_task(folder: Path, seed: int) -> dict[str, str]:
    """Write run.yaml, template.md and the rows; returns the codes that will change."""
    demo = yaml.safe_load(files("pi_ray.cli").joinpath("demo.yaml").read_text(encoding="utf-8"))
    task, counts = OpsqlTask(TaskConfig(name="opsql")), demo["task"]["rows"]
    rows: dict[str, list[Row]] = {split: list(task.rows(split)) for split in (*counts,)}
    train, more = rows["train"][: counts["train"]], rows["train"][counts["train"] :]
    codes = changed_codes(seed, (code_of(row.answer) for row in train))
    test = [*rows["test"], *(row for row in more if code_of(row.answer) in codes)]
    chosen = {
        "train": train, "dev": rows["dev"][: counts["dev"]], "test": test,
        "queries": rows[UNLABELLED][: counts[UNLABELLED]],
    }
    for name, some in chosen.items():
        lines = [{"id": f"{name}-{i}", "query": r.query, "answer": r.answer, "group": r.group}
                 for i, r in enumerate(some)]
        write_atomic(folder / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    run = {**demo, "name": "refresh", "task": {"name": "jsonl", "overlap": "drop"}, "store": "store"}
    run["train"] = {**demo["train"], "seed": seed}
    write_atomic(folder / "run.yaml", yaml.safe_dump(run, sort_keys=False))
    write_atomic(folder / "template.md", task.template().text)
    return codes


def scores(folder: Path, codes: dict[str, str]) -> dict[str, float]:
    """Shares of an evaluation's rows: changed services' codes right, their statements right, other statements right."""
    lines = [json.loads(line) for line in (folder / "eval" / "outputs.jsonl").read_text().splitlines()]
    known = {*codes, *codes.values()}
    about = [line for line in lines if code_of(line["answer"]) in known]
    others = [line for line in lines if code_of(line["answer"]) not in known]
    codes_right = fmean(code_of(line["outputs"]["promptintern"]) == code_of(line["answer"]) for line in about)
    right = [fmean(line["scores"]["promptintern"]["exact_match"] for line in some) for some in (about, others)]
    return {"codes": codes_right, "changed": right[0], "others": right[1], "changed_rows": len(about)}


def timed_step(folder: Path, name: str, *command: str) -> float:
    """Run `pi-ray` in the folder unless the step is done; its seconds."""
    mark = folder / f"{name}.seconds"
    if not mark.exists():
        started = time.monotonic()
        subprocess.run([sys.executable, "-m", "pi_ray.cli", *command], cwd=folder, check=True, stdout=sys.stderr)
        write_atomic(mark, str(time.monotonic() - started))
    return float(mark.read_text())


def training_seconds(run: Path) -> float:
    """Of the updates and the teacher's answers."""
    log: list[dict[str, Any]] = list(read_entries((run / "train.jsonl").read_bytes()))
    return sum(e["seconds"] for e in log if "loss" in e) + sum(e.get("seconds_teaching", 0) for e in log)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="of the task; default: a temporary folder")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE")
    args = parser.parse_args()
    header("a changed prompt")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary) / "task").resolve()
        mark = folder / "codes.json"
        if not mark.exists():
            write_atomic(mark, json.dumps(write_task(folder, args.seed)))
        codes: dict[str, str] = json.loads(mark.read_text())
        first_s = timed_step(folder, "first", "run", "run.yaml", *args.overrides)
        template = (folder / "template.md").read_text()
        for old, new in codes.items():
            template = re.sub(rf": {old}$", f": {new}", template, flags=re.M)
        write_atomic(folder / "template.md", template)
        refresh_s = timed_step(folder, "refresh", "refresh", "run.yaml", *args.overrides)
        first = folder / "runs" / "refresh"
        again = max(first.parent.glob("refresh-????-??-??*"))
        before, after = scores(first, codes), scores(again, codes)
        trained = [training_seconds(run) for run in (first, again)]
    print(f"  codes of {before['changed_rows']} rows about changed services: {100 * after['codes']:.1f}% right; other "
        f"rows {100 * before['others']:.1f}% before, {100 * after['others']:.1f}% after")
    print(f"  {refresh_s:.0f} s of {first_s:.0f} s in all; training {trained[1]:.0f} s of {trained[0]:.0f} s")
    last_line(
        new_codes_right=after["codes"], changed_exact_match=after["changed"], others_before=before["others"],
        others_after=after["others"], changed_rows=before["changed_rows"], first_s=first_s, refresh_s=refresh_s,
        time_share=refresh_s / first_s, first_training_s=trained[0], refresh_training_s=trained[1],
        training_share=trained[1] / trained[0],
    )


if __name__ == "__main__":
    main()
