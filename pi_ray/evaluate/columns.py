"""Columns: the ways of answering that an evaluation compares, each a model, a template and a number of examples.

An answerer answers them, with adapters on this cluster or at a service.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pi_ray import hosted
from pi_ray.config import RunConfig
from pi_ray.data.find_neighbours import read_facts
from pi_ray.errors import DataError, TrainingError
from pi_ray.evaluate.knowledge import Knowledge
from pi_ray.models import load_tokenizer
from pi_ray.prompt import PromptEncoder
from pi_ray.protocols import Row
from pi_ray.run.directory import CARD_FILE, RunDir
from pi_ray.run.fingerprint import wants_unlabelled
from pi_ray.run.phases import plain_finetuning_config, prompts_of_columns

LABELS = {
    "base": "Base, query alone", "base_full_prompt": "Base, full prompt", "plain": "Plain fine-tuning",
    "teacher": "Teacher, full prompt",
    "promptintern": "PromptIntern",
}
RowWatch = Callable[[str, int, int], None]  # (column, rows done, rows in all)


@dataclass(frozen=True)
class Column:
    """One way to answer the test rows."""

    name: str
    adapter: str  # a folder, or the id of a model that a service has tuned; "" is the base model
    template: str
    shots: int
    rate: float = 0.0  # of the template, at which the documents of a row are compressed too
    gist: int = 0  # number of tokens that stand for the template


def columns_of(config: RunConfig) -> list[Column]:
    """The columns of a trained run: "plain" where evaluate.baseline is set, "teacher" where an adapter taught.

    Raises TrainingError where the run or its baseline was not prepared or not trained.
    """
    RunDir(config.root).prepared_fingerprint()
    adapters = {"base": "", "base_full_prompt": "", **({"plain": plain} if (plain := _plain_adapter(config)) else {})}
    if wants_unlabelled(config) and config.train.distill.teacher == "adapter":
        adapters["teacher"] = str(RunDir(config.root).adapter(0))
    prompts = prompts_of_columns(config)
    return [*(Column(name, adapter, *prompts[name]) for name, adapter in adapters.items()), trained_column(config)]


def require_examples(config: RunConfig, columns: Sequence[Column]) -> None:
    """Raises DataError where evaluate.shots asks for more examples of each row than preparation retrieved."""
    stored = read_facts(RunDir(config.root)).get("shots", 0)
    if config.evaluate.shots > stored and any(column.shots > stored for column in columns):
        raise DataError(
            f"prepare again: only {stored} examples of each row were retrieved, and evaluate.shots is "
            f"{config.evaluate.shots}; run 'pi-ray prepare' with it, or lower it"
        )


def trained_column(config: RunConfig) -> Column:
    """The run's best adapter with the prompt that it was trained to see at inference; from a service its last model.

    Raises TrainingError where the service has not tuned one yet.
    """
    if hosted.is_hosted(config):
        model = hosted.tuned_phases(config)[-1].get("model")
        if not model:
            cure = "run 'pi-ray train' (or 'pi-ray run') with this run.yaml first"
            raise TrainingError(f"{config.root}: no model was tuned with these settings; {cure}")
        return Column("promptintern", model, *prompts_of_columns(config)["promptintern"])
    best = _chosen_adapter(RunDir(config.root), "adapter was")
    card = json.loads((best / CARD_FILE).read_text())
    return Column("promptintern", str(best), card["template"], card["shots"], card["rate"], card.get("gist", 0))


def untrained_column(config: RunConfig) -> Column:
    """The base model with the prompt of the run's last phase."""
    return Column("base", "", *prompts_of_columns(config)["promptintern"])


def _plain_adapter(config: RunConfig) -> str:
    """The baseline's adapter or tuned model; "" when there is none."""
    plain = plain_finetuning_config(config)
    if not config.evaluate.baseline:
        return ""
    if not hosted.is_hosted(config):
        return str(_chosen_adapter(RunDir(plain.root), "baseline was"))
    return hosted.tuned_phases(plain)[-1].get("model", "") if RunDir(plain.root).rows.exists() else ""


def _chosen_adapter(run: RunDir, what: str) -> Path:
    """The adapter that training chose. Raises TrainingError before one is."""
    if not run.best.is_dir():
        cure = "run 'pi-ray train' (or 'pi-ray run') with this run.yaml first"
        raise TrainingError(f"{run.root}: no {what} trained; {cure}")
    return run.best


class AnswerLengths(NamedTuple):
    """In tokens: the limit of an answer, and a typical length, with which requests are timed.

    `one_line`: no known answer has a line break, so that an answer ends at its first one. Models that were not trained
    go on to the limit otherwise, which takes minutes and wins nothing.
    """

    limit: int
    typical: int
    one_line: bool = False


class Answers(NamedTuple):
    """One column's answers in the order of the rows, with tokens and seconds of a request and results of probes.

    `knowledge`: of the trained adapter, what it knows of each unit of the prompt, where it was asked.
    """

    texts: list[str]
    measured: dict[str, Any]
    knowledge: Knowledge | None = None


def answer_lengths(config: RunConfig, rows: Sequence[Row], bank: Sequence[Row] = ()) -> AnswerLengths:
    """A quarter more than the longest known answer, unless evaluate.max_new_tokens sets a limit; and the mean."""
    encoder = PromptEncoder(load_tokenizer(config.model), config.prompt)
    tokens = [len(encoder.answer(r.answer)) for r in rows]
    longest = max(tokens + [len(encoder.answer(r.answer)) for r in bank])
    limit = config.evaluate.max_new_tokens or math.ceil(1.25 * longest)
    one_line = not any("\n" in r.answer.strip() for r in (*rows, *bank))
    return AnswerLengths(limit, round(sum(tokens) / len(tokens)), one_line)
