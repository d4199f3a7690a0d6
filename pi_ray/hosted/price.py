"""Money before it is spent: the cost of the phases still to be tuned and of the evaluation, and a person's consent."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pi_ray.config import RunConfig
from pi_ray.errors import ConfigError, TrainingError
from pi_ray.models import load_tokenizer
from pi_ray.progress import format_money
from pi_ray.prompt import PromptEncoder
from pi_ray.run.artifact import read_manifest
from pi_ray.run.directory import RunDir
from pi_ray.run.prepared import ColumnPrompt
from pi_ray.schedule import plan_phases


@dataclass(frozen=True)
class TokenEstimate:
    """Tokens, counted with the tokenizer of `model.base`. `training` maps phases to rows x tokens x passes."""

    training: dict[int, int]
    rows: int
    input: int
    output: int

    def cost(self, config: RunConfig) -> tuple[float, float]:
        """Money for training, and for evaluation."""
        prices = config.closed
        evaluation = self.input * prices.input_price + self.output * prices.output_price
        return sum(self.training.values()) * prices.train_price / 1e6, evaluation / 1e6

    def sentence(self, config: RunConfig) -> str:
        """The cost in words, which a person reads before saying yes."""
        costs = self.cost(config)
        training, evaluation, both = (format_money(amount, config.cost.currency) for amount in (*costs, sum(costs)))
        phases = ", ".join(f"phase {i}: {n:,}" for i, n in self.training.items())
        total = f"{sum(self.training.values()):,} tokens ({phases})"
        tuning = f"Fine-tuning {config.closed.model} takes about {total}, {training}. " if phases else ""
        return (
            f"{tuning}Evaluation on {self.rows:,} rows takes "
            f"about {self.input:,} input and {self.output:,} output tokens, {evaluation}. "
            f"Together about {both} at the prices of the block 'closed', "
            f"tokens counted as {config.model.base} has them."
        )


def phase_tokens(config: RunConfig, index: int, epochs: int) -> int:
    """Tokens that the service trains on in a prepared phase."""
    manifest = read_manifest(RunDir(config.root).phase(index)) or {}
    tokens = manifest["tokens"]
    return round(manifest["rows"] * (tokens["prefix"] + tokens["row_mean"] + tokens["label_mean"]) * epochs)


def estimate_tokens(config: RunConfig, phases: Sequence[int], prompts: Sequence[ColumnPrompt]) -> TokenEstimate:
    """The tokens of training these phases, and of asking each test row with each of these prompts."""
    run, split = RunDir(config.root), config.evaluate.split
    encoder = PromptEncoder(load_tokenizer(config.model), config.prompt)
    rows, bank = run.read_rows(split), {r.id: r for r in run.read_rows("train")}
    asked = 0
    for template, count, rate in prompts:
        shots = run.read_shots(split, bank, count)
        asked += len(rows) * len(encoder.prefix(template))
        asked += sum(len(encoder.row(r.query, shots.get(r.id, ()), r.documents)) for r in run.read_rows(split, rate))
    answered = len(prompts) * sum(len(encoder.answer(r.answer)) for r in rows)
    plan = enumerate(plan_phases(config.schedule))
    training = {i: phase_tokens(config, i, p.epochs) for i, p in plan if i in phases}
    return TokenEstimate(training, len(rows), asked, answered)


def confirm_cost(
    config: RunConfig, phases: Sequence[int], prompts: Sequence[ColumnPrompt],
    tell: Callable[[str], None], confirm: Callable[[str], bool],
) -> None:
    """Have the cost confirmed, or only told with closed.confirmed. Raises TrainingError when it is declined."""
    sentence = estimate_tokens(config, phases, prompts).sentence(config)
    if config.closed.confirmed:
        tell(sentence)
    elif not confirm(sentence):
        raise TrainingError(
            "not confirmed, so nothing was uploaded and nothing spent; "
            "the same command asks again, and closed.confirmed=true says yes at once"
        )


def ask_on_terminal(sentence: str) -> bool:
    """The command line's `confirm`. Raises ConfigError where there is no terminal, since nobody can answer."""
    if not sys.stdin.isatty():
        advice = "Nobody is here to confirm this. Add closed.confirmed=true to the command to spend it"
        raise ConfigError(f"{sentence}\n{advice}")
    print(sentence)
    try:
        return input("Spend it? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False
