"""What only the prompt tells: the demo's task and model, a teacher and its student against plain fine-tuning.

    python -m tests.bench.internalise [--seed 0] [--folder FOLDER] [OVERRIDE ...]

One run of `pi-ray demo` in a process of its own: the same rows, updates and learning rates for both sides, the packaged
model, held-out test rows in three groups. "template only" are rows about services that no labelled row uses. Overrides
are the demo's, such as train.drills.mode="off". With a folder that holds the run already, only what is missing is done.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pi_ray.train.train_log import read_entries
from tests.bench.report import header, last_line

COLUMNS = ("plain", "teacher", "promptintern")
HIDDEN = "template only"


def figures_of(summary: dict[str, Any], log: list[dict[str, Any]]) -> dict[str, float]:
    """Exact match of each column, over all rows and by group; kept answers; seconds of training and answering."""
    figures = {f"{name}_exact_match": summary[name]["exact_match"] for name in COLUMNS if name in summary}
    for name in COLUMNS:
        for group, scores in summary.get(name, {}).get("groups", {}).items():
            figures[f"{name}_{group.replace(' ', '_')}"] = scores["exact_match"]
    answers = next((entry for entry in log if entry.get("event") == "teacher_answers"), None)
    if answers:
        figures |= {key: answers[key] for key in ("queries", "kept", "seconds_teaching")}
    figures["train_seconds"] = sum(entry["seconds"] for entry in log if "loss" in entry)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="of the run; default: a temporary folder")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE")
    args = parser.parse_args()
    header("what only the prompt tells")
    with tempfile.TemporaryDirectory() as temporary:
        run = (args.folder or Path(temporary) / "run").resolve()
        own = [f"run_dir={run}", f"store={run / 'store'}", f"train.seed={args.seed}", *args.overrides]
        subprocess.run([sys.executable, "-m", "pi_ray.cli", "demo", *own], check=True, stdout=sys.stderr)
        summary = json.loads((run / "eval" / "summary.json").read_text())
        figures = figures_of(summary, list(read_entries((run / "train.jsonl").read_bytes())))
    rows = {group: scores["rows"] for group, scores in summary["promptintern"]["groups"].items()}
    print(f"  {summary['test_rows']} test rows, exact match: {', '.join(f'{g} ({n} rows)' for g, n in rows.items())}")
    for name in COLUMNS:
        if name in summary:
            shares = ", ".join(f"{100 * c['exact_match']:.0f}" for c in summary[name]["groups"].values())
            print(f"  {name:14} {100 * summary[name]['exact_match']:.1f}% of all; by group {shares}")
    last_line(**figures)


if __name__ == "__main__":
    main()
