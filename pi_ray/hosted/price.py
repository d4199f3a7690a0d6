"""Money before it is spent: what the phases still to be trained and the evaluation will cost, and whether that is wanted."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pi_ray.errors import ConfigError, TrainingError
from pi_ray.models import load_tokenizer
from pi_ray.progress import format_money
from pi_ray.prompt import PromptEncoder
from pi_ray.run.artifact import read_manifest
from pi_ray.run.directory import RunDir
from pi_ray.run.phases import phases_of

if TYPE_CHECKING:
    from pi_ray.config import RunConfig

Prompt = tuple[str, int, float]  # template, number of examples, template rate


@dataclass(frozen=True)
class Estimate:
    """Tokens, counted with the tokenizer of `model.base`. `training` maps phases to rows x tokens x passes."""

    training: dict[int, int]
    rows: int
    input: int
    output: int

    def cost(self, config: RunConfig) -> tuple[float, float]:
        """Money for training, and for evaluation."""
        prices = config.closed
        return sum(self.training.values()) * prices.train_price / 1e6, (self.input * prices.input_price + self.output * prices.output_price) / 1e6

    def sentence(self, config: RunConfig) -> str:
        """What a person reads before saying yes."""
        training, evaluation = self.cost(config)
        write = lambda amount: format_money(amount, config.cost.currency)  # noqa: E731
        phases = ", ".join(f"phase {i}: {n:,}" for i, n in self.training.items())
        tuning = f"Fine-tuning {config.closed.model} takes about {sum(self.training.values()):,} tokens ({phases}), {write(training)}. " if phases else ""
        return (
            f"{tuning}Evaluation on {self.rows:,} rows takes about {self.input:,} input and {self.output:,} output tokens, {write(evaluation)}. "
            f"Together about {write(training + evaluation)} at the prices of the block 'closed', tokens counted as {config.model.base} has them."
        )


def phase_tokens(config: RunConfig, index: int, epochs: int) -> int:
    """Tokens that the service trains on in a phase, from the prepared rows."""
    manifest = read_manifest(RunDir(config.root).phase(index))
    tokens = manifest["tokens"]
    return round(manifest["rows"] * (tokens["prefix"] + tokens["row_mean"] + tokens["label_mean"]) * epochs)


def estimate(config: RunConfig, phases: Sequence[int], prompts: Sequence[Prompt]) -> Estimate:
    """Of training these phases, and of asking each test row with each of these prompts."""
    run, encoder = RunDir(config.root), PromptEncoder(load_tokenizer(config.model), config.prompt)
    rows, bank = run.read_rows(config.evaluate.split), {r.id: r for r in run.read_rows("train")}
    asked = 0
    for template, shots, rate in prompts:
        near, own = run.read_shots(config.evaluate.split, bank, shots), run.read_rows(config.evaluate.split, rate)
        asked += len(rows) * len(encoder.prefix(template)) + sum(len(encoder.row(r.query, near.get(r.id, ()), r.documents)) for r in own)
    answered = len(prompts) * sum(len(encoder.answer(r.answer)) for r in rows)
    return Estimate({i: phase_tokens(config, i, p.epochs) for i, p in phases_of(config) if i in phases}, len(rows), asked, answered)


def confirmed(config: RunConfig, phases: Sequence[int], prompts: Sequence[Prompt], tell: Callable[[str], None], confirm: Callable[[str], bool]) -> None:
    """Have the cost confirmed, or only told where closed.confirmed says yes at once. Raises TrainingError when it is declined."""
    sentence = estimate(config, phases, prompts).sentence(config)
    if config.closed.confirmed:
        tell(sentence)
    elif not confirm(sentence):
        raise TrainingError("not confirmed, so nothing was uploaded and nothing spent; the same command asks again, and closed.confirmed=true says yes at once")


def ask() -> Callable[[str], bool]:
    """The command line's `confirm`: a question on a terminal. Elsewhere it raises ConfigError, since nobody can answer."""

    def confirm(sentence: str) -> bool:
        if not sys.stdin.isatty():
            raise ConfigError(f"{sentence}\nNobody is here to confirm this. Add closed.confirmed=true to the command to spend it")
        print(sentence)
        try:
            return input("Spend it? [y/N] ").strip().lower() in ("y", "yes")
        except EOFError:
            return False

    return confirm
