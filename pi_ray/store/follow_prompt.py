"""A refresh after the prompt changed: the published run's teacher reads the new prompt, and the student follows.

What it takes lies in the run directory of the published adapter: its first phase's adapter, which has learned to read
the prompt, and the template. Where they are gone, or no teacher was made, the refresh trains all phases.
"""

import shutil
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any

from pi_ray.config import RunConfig
from pi_ray.protocols import SPLITS, UNLABELLED, Row
from pi_ray.run.answered import has_labelled
from pi_ray.run.artifact import digest, read_manifest, staged
from pi_ray.run.directory import CARD_FILE, RunDir
from pi_ray.run.fingerprint import wants_unlabelled
from pi_ray.schedule import plan_phases
from pi_ray.store.prompt_guard import PROMPT_FILE
from pi_ray.store.verify import WEIGHTS_FILE, read_json
from pi_ray.tasks.changed_prompt import QUERIES_FILE, TEMPLATE_FILE, ChangedPromptTask, open_task
from pi_ray.tasks.prompt_change import LabelCorrection, compare_prompts

PUBLISHED = "published"  # in the refresh's run directory: the old template, and queries that were generated from it
TEACHER = "teacher"
PASSES = 3  # over the rows about the change and those that are replayed


def follow_prompt(config: RunConfig, first: Path, tell: Callable[[str], None]) -> RunConfig:
    """The refresh `config`, whose start adapter is copied, as it follows a changed template; else as it is.

    `first` is the run directory of the run file: the published run's is that, or one of a refresh beside it. `tell`
    gets lines for people: the changed units, and what becomes of the rows.
    """
    card = read_json(Path(config.train.init_adapter) / CARD_FILE)
    if digest(open_task(config.task).template().text) == card.get("full_template_sha256"):
        return config
    tell("The prompt has changed since the adapter was published.")
    if reason := _why_not(config, card):
        tell(f"All phases are trained: {reason}.")
        tell_stale_labels(config, tell)
        return config
    phases, root = plan_phases(config.schedule), config.root
    if not all(read_manifest(root / name) for name in (TEACHER, PUBLISHED)):  # else an earlier try has kept them
        if not (source := _published_run(config, first, card["full_template_sha256"])):
            tell(f"All phases are trained: the published adapter's run directory is neither {first} nor beside it.")
            tell_stale_labels(config, tell)
            return config
        _keep(source, config)
    config = config.replace(ask={}, **{"task.published": str(root / PUBLISHED), "task.generate": False})
    task = ChangedPromptTask(config.task)
    counts = task.count()
    for line in [f"{task.change}:".capitalize(), *(f"  {line}" for line in task.change.lines), f"{counts}."]:
        tell(line)
    if unasked := task.unasked():
        tell(f"No row and no query is about: {'; '.join(unasked)}. Add some to task.queries, or they are not learned.")
    steps = ceil(PASSES * max(1, counts.rows) / config.train.batch_size)
    reads = {"rate": 1.0, "shots": phases[0].shots, "steps": 1}  # one update that is skipped: the teacher has learned
    answers = {"rate": card["rate"], "shots": card["shots"], "steps": steps}
    return config.replace(
        schedule={"name": "list", "list": [reads, answers]},
        **{"train.distill.teacher_adapter": str(root / TEACHER), "evaluate.baseline": False},
    )


def tell_stale_labels(config: RunConfig, tell: Callable[[str], None]) -> None:
    """Say of a refresh that trains all phases how many labels follow the old prompt: it learns them as they are.

    The start adapter is copied. Nothing is said where its template is the present one, or every label follows that.
    """
    start, task = Path(config.train.init_adapter), open_task(config.task)
    published, new = read_json(start / CARD_FILE).get("full_template_sha256"), task.template().text
    if digest(new) == published:
        return
    old = read_json(start / PROMPT_FILE)["template"] if (start / PROMPT_FILE).is_file() else ""
    if digest(old) != published:
        tell("The prompt has changed, and labels are learned as they are: correct those that follow the old one.")
        return
    correction = LabelCorrection(old, compare_prompts(old, new))
    splits = [split for split in SPLITS if not config.answers_first or has_labelled(config, split)]
    rows = (row for split in splits for row in task.rows(split) if isinstance(row, Row))
    if stale := [row.id for row in rows if correction.correct(row) is not row]:
        some = f"such as those of {', '.join(stale[:3])}"
        tell(f"{len(stale)} labels may follow the old prompt, {some}. They are learned as they are: "
            "correct them in your files.")


def _why_not(config: RunConfig, card: dict[str, Any]) -> str:
    if not wants_unlabelled(config) or config.train.distill.teacher != "adapter":
        return "no adapter of this run teaches (train.objective: distill makes one)"
    if examples := card.get("fixed_examples"):
        return f"the published prompt ends with {examples} examples (schedule.floor), and the floor decides anew"
    return "" if config.train.lora.method != "pissa" else "train.lora.method pissa starts anew each time"


def _published_run(config: RunConfig, first: Path, template: str) -> RunDir | None:
    """The run directory, of the first run or of a refresh, that has the start adapter, its teacher and its template."""
    weights = (read_manifest(Path(config.train.init_adapter)) or {})["files"][WEIGHTS_FILE]["sha256"]
    for folder in [first, *sorted(first.parent.glob(f"{first.name}-????-??-??*"), reverse=True)]:
        run = RunDir(folder)
        found = (read_manifest(run.best) or {}).get("files", {}).get(WEIGHTS_FILE, {}).get("sha256")
        if found == weights and read_manifest(run.adapter(0)) and digest(run.read_templates()[1.0]) == template:
            return run
    return None


def _keep(source: RunDir, config: RunConfig) -> None:
    """Copy what the refresh needs into its own run directory, whatever becomes of the source's."""
    with staged(config.root / TEACHER, source=str(source.root)) as tmp:
        shutil.copytree(source.adapter(0), tmp, dirs_exist_ok=True)
    with staged(config.root / PUBLISHED, source=str(source.root)) as tmp:
        (tmp / TEMPLATE_FILE).write_text(source.read_templates()[1.0], encoding="utf-8")
        if config.task.generate:
            kept = source.root / PUBLISHED / QUERIES_FILE  # where a refresh has it: its rows are a selection
            shutil.copyfile(kept if kept.is_file() else source.rows_of(UNLABELLED).path, tmp / QUERIES_FILE)
