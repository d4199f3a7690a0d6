"""Answers of the service's models, several requests at a time.

Each is kept in closed/answers.jsonl, so that none is paid for twice.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from pi_ray.config import RunConfig
from pi_ray.hosted.client import Reply, Service
from pi_ray.run.artifact import digest

PARALLEL = 8  # requests at a time


def replies(
    config: RunConfig, model: str, prompts: Sequence[str], limit: int,
    watch: Callable[[int, int], None] = lambda done, total: None, wait: Callable[[float], None] = time.sleep,
) -> list[Reply]:
    """The model's reply to each prompt, greedy, at most `limit` tokens.

    `watch` gets (distinct prompts answered, distinct prompts). Raises TrainingError when the service cannot be reached.
    """
    log = config.root / "closed" / "answers.jsonl"
    keys = [digest([config.closed.base_url, model, prompt, limit]) for prompt in prompts]
    known, wanted = _read_log(log), dict(zip(keys, prompts, strict=True))
    todo = {key: prompt for key, prompt in wanted.items() if key not in known}
    watch(len(wanted) - len(todo), len(wanted))
    if todo:
        service = Service(config.closed, wait)
        with ThreadPoolExecutor(PARALLEL) as pool, _open_log(log) as file:
            asked = {pool.submit(service.chat, model, prompt, limit): key for key, prompt in todo.items()}
            try:
                for i, done in enumerate(as_completed(asked), start=1):
                    key = asked[done]
                    known[key] = done.result()
                    entry = {"key": key, "model": model, **asdict(known[key])}
                    file.write(json.dumps(entry, ensure_ascii=False) + "\n")
                    file.flush()
                    watch(len(wanted) - len(todo) + i, len(wanted))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return [known[key] for key in keys]


def _read_log(log: Path) -> dict[str, Reply]:
    """Key -> reply; half a line, which a kill leaves, is passed over."""
    found = {}
    for line in log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else ():
        try:
            entry = json.loads(line)
            found[entry["key"]] = Reply(*(entry[k] for k in Reply.__dataclass_fields__))
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _open_log(log: Path) -> TextIO:
    log.parent.mkdir(parents=True, exist_ok=True)
    file = open(log, "a", encoding="utf-8")  # noqa: SIM115  the caller's `with` closes it
    file.write("\n" if file.tell() else "")  # ends the half line that a kill left
    return file
