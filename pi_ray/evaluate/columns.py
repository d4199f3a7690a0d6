"""Columns: the ways of answering that an evaluation compares, each an adapter (or none), a template and a number of shots."""

from __future__ import annotations

import json
from dataclasses import dataclass

from pi_ray.config import RunConfig
from pi_ray.run.directory import RunDir
from pi_ray.schedule import plan_phases
from pi_ray.train.lora import CARD

LABELS = {
    "base": "Base, query alone",
    "base_full_prompt": "Base, full prompt",
    "plain": "Plain fine-tuning",
    "promptintern": "PromptIntern",
}


@dataclass(frozen=True)
class Column:
    """One way to answer the test rows. `adapter` is a folder or "" for the base model; `gist` tokens stand for the template if there are any.

    `rate` is the template's, by which documents that come with a row are compressed.
    """

    name: str
    adapter: str
    template: str
    shots: int
    rate: float = 0.0
    gist: int = 0


def columns_of(config: RunConfig) -> list[Column]:
    """The columns of a trained run; "plain" only when its baseline was trained."""
    run = RunDir(config.root)
    plain = run.baseline("plain").best
    return [
        Column("base", "", "", 0),
        Column("base_full_prompt", "", template_at(run, 1.0), config.evaluate.shots or max(p.shots for p in plan_phases(config.schedule)), 1.0),
        *([Column("plain", str(plain.resolve()), "", 0)] if config.evaluate.baseline else []),
        trained(config),
    ]


def trained(config: RunConfig) -> Column:
    """The run's best adapter, with the prompt that it was trained to see at inference."""
    best = RunDir(config.root).best.resolve()
    card = json.loads((best / CARD).read_text())
    return Column("promptintern", str(best), card["template"], card["shots"], card["rate"], card.get("gist", 0))


def untrained(config: RunConfig) -> Column:
    """The base model with the prompt of the run's last phase."""
    last = plan_phases(config.schedule)[-1]
    return Column("base", "", template_at(RunDir(config.root), last.rate), last.shots, last.rate)


def template_at(run: RunDir, rate: float) -> str:
    if not rate:
        return ""
    return next(t["text"] for t in json.loads((run.templates / "templates.json").read_text()) if t["rate"] == rate)
