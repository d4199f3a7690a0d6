"""Cost of asking, for `pi-ray plan`: who writes how many queries about how many units, and in what time."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from pi_ray.ask.ask import queries_fingerprint
from pi_ray.ask.coverage import Coverage
from pi_ray.ask.needs import needed_units, touched_units
from pi_ray.ask.requests import SURPLUS, adapter_prompt, instruction, task_description
from pi_ray.ask.sources import Sources
from pi_ray.ask.train_writer import BATCH_ROWS, taught_sections
from pi_ray.ask.writers import Name, choose_writer, written_kinds
from pi_ray.config import RunConfig
from pi_ray.models import load_tokenizer
from pi_ray.plan import estimate
from pi_ray.run.artifact import is_current, read_manifest
from pi_ray.run.directory import RunDir
from pi_ray.units import Unit, UnitIndex

WHO: dict[Name, str] = {
    "adapter": "an adapter learns in {updates} updates to write queries, then writes",
    "prompt": "the base model writes", "few-shot": "the base model writes", "endpoint": "{model} writes",
}


@dataclass(frozen=True)
class AskingPlan:
    """`queries` are those that are there, or are kept at most; `seconds` do not count a service's."""

    queries: int
    seconds: float
    text: str


def plan_asking(
    config: RunConfig, sources: Sources, size: estimate.ModelSize, speed: estimate.Speed, new_token: float
) -> AskingPlan:
    """`new_token`: tokens of training that one new token costs to generate. Raises DataError as asking would."""
    run = RunDir(config.root)
    if is_current(run.queries, queries_fingerprint(config, sources)):
        there = (read_manifest(run.queries) or {})["queries"]
        return AskingPlan(there, 0.0, f"{there:,} generated queries are there")
    name, units = choose_writer(config, len(sources.labelled)), sources.units()
    index = UnitIndex(units)
    needed = needed_units(sources.labelled, touched_units(sources.labelled, index), index)
    sections = taught_sections(needed, units) if name == "adapter" else None
    coverage = Coverage(units, written_kinds(config, name), config.ask.queries, sections)
    written = SURPLUS * len(coverage.cells) * coverage.target
    who = WHO[name].format(updates=config.ask.updates, model=config.closed.model)
    kinds, about = " and ".join(coverage.kinds), len({cell.unit for cell in coverage.cells})
    text = (f"{who} about {written:,} queries ({kinds}) for {about} of {len(units)} units of the template, and what is "
        f"missing again, in at most {config.ask.rounds} rounds; at most {config.ask.queries:,} are kept")
    if name == "endpoint":
        return AskingPlan(config.ask.queries, 0.0, f"{text}. What it costs is said, and consent asked for, before")
    seconds = _seconds(config, name, sources, units, written, size, speed, new_token)
    return AskingPlan(config.ask.queries, seconds, text)


def _seconds(
    config: RunConfig, name: Name, sources: Sources, units: Sequence[Unit], written: int,
    size: estimate.ModelSize, speed: estimate.Speed, new_token: float,
) -> float:
    """Seconds of the adapter's training and of one round's writing."""
    tokenizer = load_tokenizer(config.model)

    def tokens(texts: Sequence[str]) -> float:
        return fmean(len(ids) for ids in tokenizer(list(texts)).input_ids) if texts else 0.0

    def row_seconds(row: float, label: float) -> float:
        shape = estimate.Shape(0, row, label)
        return estimate.update_seconds(size, shape, config, speed) / config.train.batch_size

    query = tokens([row.query for row in sources.labelled[:256]]) or 32
    if name == "adapter":
        prompt = tokens([adapter_prompt([unit]) for unit in units])
        training = config.ask.updates * BATCH_ROWS * row_seconds(prompt, query)
        return training + written * row_seconds(prompt + new_token * query, query)
    prompt = tokens([instruction([unit], "direct", 1, []) for unit in units])
    return row_seconds(tokens([task_description(sources.template)]), 1) + written * row_seconds(
        prompt + new_token * query, query
    )
