"""What the service gets: the chat rows of each phase as JSONL. The words are PromptEncoder's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from pi_ray.errors import ConfigError, TrainingError
from pi_ray.prompt import text_of
from pi_ray.run.artifact import digest, is_current, read_manifest, staged
from pi_ray.run.directory import RunDir
from pi_ray.run.phases import phases_of

if TYPE_CHECKING:
    from pi_ray.config import RunConfig
    from pi_ray.schedule import Phase


def files_of(run: RunDir, config: RunConfig) -> Path:
    """The folder closed/files, an artefact: phase-0.jsonl and on, one line of messages for each training row. Made when it is not there yet."""
    folder, fingerprint = run.root / "closed" / "files", digest([prepared(run), config.prompt.model_dump(mode="json")])
    if is_current(folder, fingerprint):
        return folder
    bank, templates = {r.id: r for r in run.read_rows("train")}, templates_of(run)
    with staged(folder, fingerprint=fingerprint) as made:
        for i, phase in _phases(config):
            shots = run.read_shots("train", bank, phase.shots)
            with open(made / file_name(i), "w", encoding="utf-8") as file:
                for row in run.read_rows("train", phase.rate):
                    prompt = text_of(config.prompt, row.query, templates[phase.rate], shots.get(row.id, ()), row.documents)
                    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": row.answer}]
                    file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return folder


def file_name(phase: int) -> str:
    return f"phase-{phase}.jsonl"


def prepared(run: RunDir) -> str:
    """The fingerprint of what preparation left. Raises TrainingError where it has not been done."""
    manifest = read_manifest(run.rows)
    if manifest is None:
        raise TrainingError(f"{run.root}: nothing prepared; run 'pi-ray prepare' (or 'pi-ray run') with this run.yaml first")
    return manifest["fingerprint"]


def templates_of(run: RunDir) -> dict[float, str]:
    """rate -> text; rate 0 is no template."""
    entries = json.loads((run.templates / "templates.json").read_bytes())
    return {**{e["rate"]: e["text"] for e in entries}, 0.0: ""}


def prompts_of_columns(config: RunConfig) -> dict[str, tuple[str, int, float]]:
    """column -> (template, examples, template rate) of the prompt that it is asked with."""
    templates, last = templates_of(RunDir(config.root)), [p for _, p in phases_of(config)][-1]
    shots = config.evaluate.shots or max(p.shots for _, p in phases_of(config))
    nothing = ("", 0, 0.0)
    return {"base": nothing, "base_full_prompt": (templates[1.0], shots, 1.0), "plain": nothing, "promptintern": (templates[last.rate], last.shots, last.rate)}


def _phases(config: RunConfig) -> list[tuple[int, Phase]]:
    """The phases. Raises ConfigError for what a service cannot be asked for."""
    phases = list(phases_of(config))
    if any(getattr(p, "steps", 0) for _, p in phases):
        raise ConfigError("schedule.steps: a fine-tuning service counts passes over the rows, not updates; use schedule.epochs with train.backend.name openai")
    if getattr(config.train, "objective", "sft") != "sft":
        raise ConfigError(f"train.objective {config.train.objective}: a fine-tuning service learns from labels alone; take sft with train.backend.name openai")
    return phases
