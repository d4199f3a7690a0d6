"""The files of a task out of a request log, which is read twice: for what recurs in it, and for the rows."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.resources import files
from itertools import accumulate
from pathlib import Path
from random import Random
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import jinja2

from pi_ray.compress.rate_control import count_tokens
from pi_ray.config import ModelConfig
from pi_ray.conversation import join_tools, render_turn
from pi_ray.errors import DataError
from pi_ray.models import load_tokenizer
from pi_ray.protocols import SPLITS, Reject
from pi_ray.request_log.growth import longest
from pi_ray.request_log.recurrent import Prompt, StrippedRequest, find_prompts
from pi_ray.request_log.request import Request, read_requests
from pi_ray.request_log.rows import QUERIES, RowFile, SplitCounts, write_splits
from pi_ray.run.artifact import place_files, translate_disk_errors

SAMPLE = 1000  # requests in which prompts are looked for
COUNTED = 200  # of them whose tokens are counted
REJECTS, ROWS = "rejects.jsonl", "rows"
FILES = ("run.yaml", "template.md", "tools.json", *(f"{name}.jsonl" for name in (*SPLITS, QUERIES)), REJECTS)
FOREIGN = -1  # the place of no prompt
SHOWN = 3  # rejects that are kept for people


class TokenShare(NamedTuple):
    """Tokens of a mean request, and how many of them recur, as the packaged model counts them."""

    recurrent: int
    whole: float


@dataclass(frozen=True)
class LoggedTask:
    """A task that was made of a log, and what there is to tell about it."""

    files: list[Path]
    prompt: Prompt
    split: SplitCounts
    requests: int  # of the log that can be read
    rejected: int
    rejects: list[Reject]  # the first few
    others: list[tuple[Prompt, int]]  # prompts that were not taken, with the number of their requests
    foreign: int  # requests of none of these prompts
    tokens: TokenShare


def write_logged_task(log: Path, folder: Path) -> LoggedTask:
    """Write template.md, tools.json, the rows, run.yaml and rejects.jsonl into `folder`, each if there is any.

    Raises DataError for a log of which no task can be made, StorageError where the disk does not take it.
    """
    if not log.is_file():
        raise DataError(f"{log}: no such file; --from names a log of requests, one JSON object a line")
    is_new = not folder.exists()
    try:
        with translate_disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(prefix=".log-", dir=folder, ignore_cleanup_errors=True) as made:
                return _write(log, folder, Path(made))
    except DataError:
        with suppress(OSError):
            if is_new:
                folder.rmdir()
        raise


def _write(log: Path, folder: Path, made: Path) -> LoggedTask:
    sample = _draw_sample(log)
    prompt, *others = find_prompts(sample)
    if not prompt.text and not prompt.tools:
        raise DataError(f"{log}: its requests have no system message, tools, few-shot turns or beginning in common, so "
            "there is nothing that an adapter could spare them")
    rows, reading = RowFile(made / ROWS), _Reading((prompt, *others))
    rows.write(reading.rows(log, made / REJECTS))
    rows.is_conversation |= bool(prompt.tools)
    split = write_splits(rows, made)
    (made / ROWS).unlink()
    if not reading.rejected:
        (made / REJECTS).unlink()
    if rows.is_conversation and not split.rows.get("train"):
        raise DataError(f"{log}: none of its conversations has an answer, and a teacher answers single queries alone; "
            "give a log with responses")
    for name, text in _settings(log, folder, prompt, split, rows.is_conversation).items():
        (made / name).write_text(text, encoding="utf-8")
    tokens = _count_tokens(prompt, sample)
    return LoggedTask(
        files=place_files(made, folder), prompt=prompt, split=split, requests=reading.counts.total(),
        rejected=reading.rejected, rejects=reading.first, foreign=reading.counts[FOREIGN],
        others=[(other, reading.counts[place]) for place, other in enumerate(others, start=1)], tokens=tokens,
    )


def _settings(
    log: Path, folder: Path, prompt: Prompt, split: SplitCounts, is_conversation: bool,
) -> dict[str, str]:
    """File name -> content of the files beside the rows."""
    name = re.sub(r"[^a-z0-9._-]+", "-", folder.resolve().name.lower()).strip("-._")[:64] or "my-task"
    source = files("pi_ray.request_log").joinpath("run.yaml.j2").read_text(encoding="utf-8")
    options: dict[str, Any] = {"trim_blocks": True, "keep_trailing_newline": True, "undefined": jinja2.StrictUndefined}
    run = jinja2.Template(source, **options).render(
        log=log.name, name=name, conversations=is_conversation, tools=bool(prompt.tools),
        rows={split_name: split.rows.get(split_name, 0) for split_name in (*SPLITS, QUERIES)},
    )
    made = {"run.yaml": run, "template.md": prompt.template}
    if prompt.tools:
        made["tools.json"] = json.dumps(json.loads(prompt.tools), ensure_ascii=False, indent=1) + "\n"
    return made


def _count_tokens(prompt: Prompt, sample: Sequence[Request]) -> TokenShare:
    """Tokens of a request, over all requests that the conversations of the sample stand for."""
    tokenizer = load_tokenizer(ModelConfig())
    recurrent = count_tokens(tokenizer, join_tools(prompt.text, json.loads(prompt.tools or "[]")))
    own = list[int]()
    found = [(request, *values) for request in sample if (values := prompt.find_values(request))]
    for request in longest((request, values) for request, values, query in found if query)[:COUNTED]:
        turns = stripped.turns if (stripped := prompt.strip(request)) else ()
        before = list(accumulate((count_tokens(tokenizer, render_turn(turn)) for turn in turns), initial=0))
        asked = [before[i] for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        own += asked or before[-1:]
    return TokenShare(recurrent, recurrent + fmean(own))


class _Reading:
    """The second reading of a log, and what it counts. The first of `prompts` is the one that is taken."""

    def __init__(self, prompts: Sequence[Prompt]):
        self.prompts = prompts
        self.counts = Counter[int]()  # requests of each prompt, by its place, and FOREIGN ones
        self.first, self.rejected = list[Reject](), 0

    def rows(self, log: Path, rejects: Path) -> Iterator[StrippedRequest]:
        """The requests of the prompt without what recurs; what cannot be used goes to `rejects`."""
        with open(rejects, "w", encoding="utf-8") as file:
            for found in read_requests(log):
                row = self._strip(found, log) if isinstance(found, Request) else found
                if isinstance(row, StrippedRequest):
                    yield row
                elif row:
                    self.rejected += 1
                    self.first += [row] if len(self.first) < SHOWN else []
                    file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")

    def _strip(self, request: Request, log: Path) -> StrippedRequest | Reject | None:
        """The rest of a request of the prompt, or the reason why there is none; None for one of another prompt."""
        place = next((i for i, prompt in enumerate(self.prompts) if prompt.find_values(request)), FOREIGN)
        self.counts[place] += 1
        try:
            return self.prompts[0].strip(request) if place == 0 else None
        except ValueError as reason:
            return Reject(str(log), request.line, str(reason))


def _draw_sample(log: Path) -> list[Request]:
    """SAMPLE requests of the log, each with equal probability. Raises DataError for none."""
    sample, seen, random = list[Request](), 0, Random(0)
    first: Reject | None = None
    for found in read_requests(log):
        if isinstance(found, Reject):
            first = first or found
            continue
        seen += 1
        if len(sample) < SAMPLE:
            sample.append(found)
        elif (place := random.randrange(seen)) < SAMPLE:
            sample[place] = found
    if not sample:
        reason = f"; line {first.line}: {first.reason}" if first else "; it is empty"
        raise DataError(f"{log}: no request in it can be used{reason}")
    return sample
