"""The service's training files: the rows of each phase as chat messages in JSONL, in the words of PromptEncoder."""

from __future__ import annotations

import json
from pathlib import Path

from pi_ray.config import RunConfig
from pi_ray.errors import ConfigError
from pi_ray.prompt import render_prompt
from pi_ray.run.artifact import digest, is_current, staged
from pi_ray.run.directory import RunDir
from pi_ray.run.prepared import prepared_fingerprint, read_templates
from pi_ray.schedule import Phase, plan_phases


def write_training_files(run: RunDir, config: RunConfig) -> Path:
    """The artifact closed/files, made unless it is there: one `file_name` a phase, one line for each training row."""
    folder = run.root / "closed" / "files"
    fingerprint = digest([prepared_fingerprint(run), config.prompt.model_dump(mode="json")])
    if is_current(folder, fingerprint):
        return folder
    bank, templates = {r.id: r for r in run.read_rows("train")}, read_templates(run)
    with staged(folder, fingerprint=fingerprint) as made:
        for i, phase in enumerate(_tunable_phases(config)):
            shots = run.read_shots("train", bank, phase.shots)
            with open(made / file_name(i), "w", encoding="utf-8") as file:
                for r in run.read_rows("train", phase.rate):
                    examples = shots.get(r.id, ())
                    prompt = render_prompt(config.prompt, r.query, templates[phase.rate], examples, r.documents)
                    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": r.answer}]
                    file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return folder


def file_name(phase: int) -> str:
    return f"phase-{phase}.jsonl"


def _tunable_phases(config: RunConfig) -> list[Phase]:
    """The phases. Raises ConfigError for what a service cannot be asked for."""
    phases = plan_phases(config.schedule)
    if any(p.steps for p in phases):
        raise ConfigError(
            "schedule.steps: a fine-tuning service counts passes over the rows, not updates; "
            "use schedule.epochs with train.backend.name openai"
        )
    if config.train.objective != "sft":
        raise ConfigError(
            f"train.objective {config.train.objective}: a fine-tuning service learns from labels alone; "
            "take sft with train.backend.name openai"
        )
    return phases
