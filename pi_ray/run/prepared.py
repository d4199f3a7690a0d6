"""A prepared run as later steps read it: its fingerprint, the template at each rate, and each column's prompt."""

from __future__ import annotations

import json
from typing import NamedTuple

from pi_ray.config import RunConfig
from pi_ray.errors import TrainingError
from pi_ray.run.artifact import read_manifest
from pi_ray.run.directory import RunDir
from pi_ray.run.phases import max_shots
from pi_ray.schedule import plan_phases


class ColumnPrompt(NamedTuple):
    """A template, the number of examples, and the rate at which template and documents are compressed."""

    template: str
    shots: int
    rate: float


def prepared_fingerprint(run: RunDir) -> str:
    """The fingerprint of the prepared rows. Raises TrainingError where nothing was prepared."""
    manifest = read_manifest(run.rows)
    if manifest is None:
        raise TrainingError(
            f"{run.root}: nothing prepared; run 'pi-ray prepare' (or 'pi-ray run') with this run.yaml first"
        )
    return manifest["fingerprint"]


def read_templates(run: RunDir) -> dict[float, str]:
    """rate -> template text; rate 0 is no template."""
    entries = json.loads((run.templates / "templates.json").read_bytes())
    return {**{e["rate"]: e["text"] for e in entries}, 0.0: ""}


def prompts_of_columns(config: RunConfig) -> dict[str, ColumnPrompt]:
    """Column -> the prompt that its model is asked with; PromptIntern's is that of the last phase."""
    templates, last = read_templates(RunDir(config.root)), plan_phases(config.schedule)[-1]
    nothing = ColumnPrompt("", 0, 0.0)
    return {
        "base": nothing,
        "base_full_prompt": ColumnPrompt(templates[1.0], config.evaluate.shots or max_shots(config), 1.0),
        "plain": nothing,
        "promptintern": ColumnPrompt(templates[last.rate], last.shots, last.rate),
    }
