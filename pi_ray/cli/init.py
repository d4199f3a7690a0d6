"""`pi-ray init FOLDER`: a small task to fill in, complete enough to run as it is."""

from __future__ import annotations

import json
from pathlib import Path

from pi_ray.errors import ConfigError
from pi_ray.run.artifact import write_atomic

RUN = """\
# One run of pi-ray. `pi-ray plan run.yaml` says what it would do and cost, `pi-ray run run.yaml` does it.
# Keys that are not here keep their defaults; `section.key=value` on the command line overrides any of them.
name: my-task                  # names the run directory runs/my-task and the published adapter

task:                          # your data; paths are relative to this file
  train: train.jsonl           # labelled queries to learn from; a few hundred make a start
  dev: dev.jsonl               # other queries, for choosing among phases
  test: test.jsonl             # held-out queries, only evaluated
  template: template.md        # the prompt that you send with every query today
  max_bad_rows: 0              # stop when more rows than this cannot be used; they are listed in rejects.jsonl

model:
  base: smollm2-135m           # the model to adapt: a packaged name, a hub id, a local folder, or a .gguf file

prompt:
  chat: chatml                 # how a message is framed: chatml, model (its own chat template), or none (plain text)

schedule:                      # template and examples fall from all to nothing while the model learns them
  name: linear
  phases: 3                    # template rate 1, 0.5, 0
  shots: 2                     # retrieved examples in the first phase: 2, 1, 0
  epochs: [1, 1, 3]            # passes over the rows in each phase; most in the last, which sees the query alone

train:
  workers: 2                   # training processes; one for each GPU
  batch_size: 8                # rows of one update, over all workers
  objective: sft               # distill: also learn what only the template tells, from unlabelled queries in queries.jsonl (a request log)
"""

TEMPLATE = """\
<!--
The recurrent part of your prompt: everything that you send with each query and want the adapter to know by itself.
Text under "Instruction" and each "##" document are compressed apart, so keep one subject to a document.
Placeholders such as {{team}} or {name}, code, JSON, URLs and numbers survive compression byte for byte; compress.protect in
run.yaml names further terms. Comments like this one are never sent.
-->
# Instruction

You sort support messages for {{team}}. Answer with the queue's code and a priority from 1 (now) to 3 (this week), nothing else.

# Documents

## Queues

billing: Q7, logins: Q2, delivery: Q5, anything else: Q9

## Priorities

A customer who cannot work or pay is 1, one who waits for us is 2, a question or a wish is 3.
"""

ROWS = {
    "train": [("I was charged twice this month and my card is blocked now", "Q7 1"), ("Where can I see when my parcel arrives?", "Q5 3")],
    "dev": [("The password mail never comes, I cannot get in", "Q2 1"), ("I have been waiting for an invoice since Monday", "Q7 2")],
    "test": [("My parcel should have been here last week", "Q5 2"), ("It would be nice to log in with a key", "Q2 3")],
}
PURPOSE = {
    "train": "Training rows",
    "dev": "Rows for choosing among phases; no query of train or test",
    "test": "Held-out rows; no query of train or dev",
}
LAYOUT = """\
# {purpose}. One JSON object a line: "query" and "answer", and if you like "id" and "group" (test groups are reported apart).
# Alpaca, ShareGPT and OpenAI messages are read too. Lines that begin with # or // are comments.
"""


def write_task(folder: Path) -> list[Path]:
    """Write run.yaml, template.md and three files of rows into `folder`, and return their paths.

    Raises ConfigError, and writes nothing, when one of them is already there.
    """
    folder = Path(folder)
    contents = {"run.yaml": RUN, "template.md": TEMPLATE, **{f"{split}.jsonl": _rows(split) for split in ROWS}}
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: not a folder; give the name of a new or empty one")
    there = [name for name in contents if (folder / name).exists()]
    if there:
        raise ConfigError(f"{folder}: {', '.join(there)} already there, and nothing was overwritten; give the name of a new folder")
    return [write_atomic(folder / name, text) for name, text in contents.items()]


def _rows(split: str) -> str:
    lines = [json.dumps({"query": query, "answer": answer}, ensure_ascii=False) for query, answer in ROWS[split]]
    return LAYOUT.replace("{purpose}", PURPOSE[split]) + "\n".join(lines) + "\n"
