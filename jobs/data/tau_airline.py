"""tau-bench's airline conversations as rows of task conversations, for jobs/runs/tau-airline.yaml.

    python jobs/data/tau_airline.py FOLDER [TARGET]

FOLDER holds conversations.jsonl ({"id": "task-7-trial-0", "reward", "messages"} a line, the trajectories that
github.com/sierra-research/tau-bench publishes) and tools.json, the definitions that they had in their prompt.
Conversations that solved their task are kept. All trials of a task go to one split: of every five tasks, in the order
of their numbers, the fourth goes to dev and the fifth to test.
"""

import argparse
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parents[1] / "runs" / "data" / "tau-airline"
FILES = ("conversations.jsonl", "tools.json")
SPLITS = ("train", "train", "train", "dev", "test")  # of every five tasks


def split_by_task(conversations: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Split -> its conversations of reward 1, without system message. Raises ValueError for an id of another form."""
    kept: dict[int, list[dict[str, Any]]] = {}
    for conversation in conversations:
        found = re.fullmatch(r"task-(\d+)-trial-\d+", conversation["id"])
        if not found:
            raise ValueError(f"the id '{conversation['id']}' does not name task and trial, as in task-7-trial-0")
        if conversation["reward"] == 1:
            messages = [m for m in conversation["messages"] if m["role"] != "system"]
            kept.setdefault(int(found[1]), []).append({"id": conversation["id"], "messages": messages})
    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for number, task in enumerate(sorted(kept)):
        splits[SPLITS[number % len(SPLITS)]] += kept[task]
    return splits


def convert(folder: Path, target: Path) -> dict[str, int]:
    """Write template.md, tools.json and a file for each split into `target`; returns the conversations of each.

    Raises ValueError where `folder` lacks one of its two files.
    """
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise ValueError(f"{folder} has no {' and no '.join(missing)}")
    lines = (folder / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    conversations = [json.loads(line) for line in lines]
    target.mkdir(parents=True, exist_ok=True)
    (target / "template.md").write_text(conversations[0]["messages"][0]["content"], encoding="utf-8")
    shutil.copyfile(folder / "tools.json", target / "tools.json")
    splits = split_by_task(conversations)
    for split, rows in splits.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (target / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return {split: len(rows) for split, rows in splits.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("target", type=Path, metavar="TARGET", nargs="?", default=TARGET, help=f"default: {TARGET}")
    args = parser.parse_args()
    try:
        counts = convert(args.folder, args.target)
    except ValueError as error:
        parser.error(str(error))
    written = ", ".join(f"{count} {split}" for split, count in counts.items())
    print(f"{written} conversations, template.md and tools.json are in {args.target}")
