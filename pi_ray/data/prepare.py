"""Prepare, paper Algorithm 1 lines 1 to 7: rows -> templates at each rate -> neighbours -> a dataset for each phase.

Each step is an artifact in the run directory, written once and skipped when it was made from the same fingerprint.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from pi_ray.config import RunConfig
from pi_ray.data import phase_dataset
from pi_ray.data.context import ConversationContext
from pi_ray.data.find_neighbours import find_neighbours, has_neighbours
from pi_ray.data.ingest import ingest
from pi_ray.data.phase_dataset import PhaseData
from pi_ray.data.pieces import Pieces, partial_folder, run_pipeline
from pi_ray.data.row_documents import compress_documents, has_documents
from pi_ray.data.templates import compress_templates
from pi_ray.errors import ModelError
from pi_ray.models import known_context_length, load_tokenizer, preparation_digest
from pi_ray.prompt import PromptEncoder
from pi_ray.protocols import SPLITS, UNLABELLED, Task
from pi_ray.run.artifact import is_current, set_aside_damaged
from pi_ray.run.directory import RunDir
from pi_ray.run.fingerprint import prepare_fingerprint, wants_unlabelled
from pi_ray.run.lock import run_lock
from pi_ray.run.queries import queries_digest
from pi_ray.schedule import plan_phases

Progress = Callable[[str], None]


def prepare(config: RunConfig, progress: Progress = print) -> str:
    """Bring the run directory up to date and return the fingerprint of its content. What is damaged is made again.

    Raises DataError for rows or a template that cannot be used, ModelError for a tokenizer that cannot, StorageError
    while another process prepares this run.
    """
    with run_lock(config.root, "is preparing this run"):
        return _prepare(config, progress)


def _prepare(config: RunConfig, progress: Progress) -> str:
    from pi_ray.tasks.changed_prompt import open_task

    task: Task = open_task(config.task)
    run, models = RunDir(config.root), preparation_digest(config)
    fingerprint = prepare_fingerprint(config, task.fingerprint(), queries_digest(run), models)
    for folder in (run.rows, run.templates, run.documents, *(run.phase(data.name) for data in plan_datasets(config))):
        set_aside_damaged(folder, fingerprint, progress)
    if _is_done(config, run, fingerprint):
        progress("prepare: nothing to do, the run directory is up to date")
        return fingerprint
    tokenizer = load_tokenizer(config.model)
    encoder = PromptEncoder(tokenizer, config.prompt)
    template = task.template()
    if not is_current(run.rows, fingerprint):
        context = ConversationContext(config, encoder, template) if config.prompt.conversation else None
        ingest(task, config.task, run, fingerprint, progress, _splits(config), context)
    if not is_current(run.templates, fingerprint):
        compress_templates(config, template, tokenizer, run, fingerprint, progress)
    if not has_documents(run, fingerprint, wanted_documents(config)):
        compress_documents(config, run, fingerprint, wanted_documents(config), progress)
    if not has_neighbours(config, run, fingerprint):
        find_neighbours(config, run, fingerprint, _splits(config), progress)
    _tokenise_phases(config, encoder, run, fingerprint, progress)
    return fingerprint


def _is_done(config: RunConfig, run: RunDir, fingerprint: str) -> bool:
    folders = [run.rows, run.templates, *(run.phase(data.name) for data in plan_datasets(config))]
    if not all(is_current(folder, fingerprint) for folder in folders):
        return False
    return has_documents(run, fingerprint, wanted_documents(config)) and has_neighbours(config, run, fingerprint)


def plan_datasets(config: RunConfig) -> list[PhaseData]:
    """Every dataset of the run: one for each phase, and its unlabelled queries where a teacher answers them.

    Dev rows have the last phase's prompt, and with early stop each phase's.
    """
    phases = [PhaseData(str(i), "train", p.rate, p.shots) for i, p in enumerate(plan_phases(config.schedule))]
    dev, unlabelled = phases[-1]._replace(name="dev", split="dev"), []
    if wants_unlabelled(config):
        unlabelled = [data._replace(name=f"{UNLABELLED}-{data.name}", split=UNLABELLED) for data in phases]
    early = [data._replace(name=f"dev-{data.name}", split="dev") for data in phases] if config.train.early_stop else []
    return [*phases, *unlabelled, dev, *early]


def wanted_documents(config: RunConfig) -> list[tuple[str, float]]:
    """(split, template rate) of all rows' documents that are needed compressed: datasets', and test rows' at inference.

    With a floor, a server may send the prompt of any phase, and dev rows are scored under each.
    """
    plan = plan_datasets(config)
    served = {p.rate for p in plan_phases(config.schedule)[0 if config.schedule.floor else -1 :]}
    wanted = {(data.split, data.rate): None for data in plan} | {(s, r): None for s in ("dev", "test") for r in served}
    return [(split, rate) for split, rate in wanted if 0 < rate < 1]


def _splits(config: RunConfig) -> tuple[str, ...]:
    return (*SPLITS, UNLABELLED) if wants_unlabelled(config) else SPLITS


def _row_context(config: RunConfig) -> int | None:
    """The model's context, with which rows are compared; None where it is not known, as of a closed model, whose
    tokenizer alone is there. Conversations were cut to it.
    """
    with suppress(ModelError):
        return None if config.prompt.conversation else known_context_length(config.model)
    return None


def _tokenise_phases(
    config: RunConfig, encoder: PromptEncoder, run: RunDir, fingerprint: str, progress: Progress,
) -> None:
    """One Ray Data job over the unfinished pieces of all datasets, then each dataset is sealed."""
    texts = run.read_templates()
    plan = plan_datasets(config)
    phase_dataset.remove_stale(run.phases, {data.name for data in plan}, fingerprint)
    todo = [data for data in plan if not is_current(run.phase(data.name), fingerprint)]
    folders = {data.name: partial_folder(run.phase(data.name), fingerprint) for data in todo}
    outputs: dict[str, dict[str, str]] = {}
    for data in todo:
        outputs.setdefault(data.split, {})[data.name] = f"{folders[data.name]}/part-"
    pieces = Pieces(run, phase_dataset.SCHEMA, phase_dataset.PIECE_ROWS, outputs)
    ranges = pieces.unfinished("phases", progress)
    run_pipeline(config, pieces, ranges, phase_dataset.TokeniseRows, config, fingerprint, todo)
    for name, _, rate, shots in todo:
        text, phase = texts[rate], {"rate": rate, "shots": shots}
        made = phase_dataset.publish_phase(
            folders[name], run.phase(name), encoder.prefix(text), _row_context(config), fingerprint=fingerprint,
            template=text, phase=phase,
        )
        if not made["rows"]:
            continue
        tokens = made["tokens"]
        counts = f"{made['rows']} rows, {tokens['prefix']} + {tokens['row_mean']:.0f} tokens a row"
        if cut := made.get("cut_rows"):
            counts += f"; {cut} left out examples to fit into {config.prompt.context} tokens"
        progress(f"phase {name}: rate {rate:g}, {shots} shots, {counts}")
