"""Money before it is spent: the cost of the phases still to be tuned and of the evaluation, and a person's consent."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pi_ray.config import RunConfig
from pi_ray.errors import ConfigError, TrainingError
from pi_ray.models import load_tokenizer
from pi_ray.progress import format_money
from pi_ray.prompt import PromptEncoder
from pi_ray.run.artifact import read_manifest, write_atomic
from pi_ray.run.directory import RunDir
from pi_ray.run.phases import ColumnPrompt
from pi_ray.schedule import plan_phases


def phase_tokens(config: RunConfig, index: int, epochs: int) -> int:
    """Tokens that the service trains on in a prepared phase."""
    manifest = read_manifest(RunDir(config.root).phase(index)) or {}
    tokens = manifest["tokens"]
    return round(manifest["rows"] * (tokens["prefix"] + tokens["row_mean"] + tokens["label_mean"]) * epochs)


def describe_cost(config: RunConfig, phases: Sequence[int], prompts: Sequence[ColumnPrompt]) -> str:
    """Say in words what training these phases and asking each test row with each of these prompts costs."""
    run, split, closed = RunDir(config.root), config.evaluate.split, config.closed
    encoder = PromptEncoder(load_tokenizer(config.model), config.prompt)
    rows, bank = run.read_rows(split), {r.id: r for r in run.read_rows("train")}
    read = 0
    for template, count, rate in prompts:
        shots = run.read_shots(split, bank, count)
        read += len(rows) * len(encoder.prefix(template))
        read += sum(len(encoder.row(r.query, shots.get(r.id, ()), r.documents)) for r in run.read_rows(split, rate))
    written = len(prompts) * sum(len(encoder.answer(r.answer)) for r in rows)
    plan = plan_phases(config.schedule)
    training = {i: phase_tokens(config, i, plan[i].epochs) for i in phases}
    trained = sum(training.values())
    costs = trained * closed.train_price, read * closed.input_price + written * closed.output_price
    tuning, evaluation, both = (format_money(cost / 1e6, config.cost.currency) for cost in (*costs, sum(costs)))
    each = ", ".join(f"phase {i}: {n:,}" for i, n in training.items())
    first = f"Fine-tuning {closed.model} takes about {trained:,} tokens ({each}), {tuning}. " if training else ""
    second = f"Evaluation on {len(rows):,} rows takes about {read:,} input and {written:,} output tokens, {evaluation}"
    how = f"at the prices of the block 'closed', tokens counted as {config.model.base} has them"
    return f"{first}{second}. Together about {both} {how}."


def confirm_cost(
    config: RunConfig, phases: Sequence[int], prompts: Sequence[ColumnPrompt],
    tell: Callable[[str], None], confirm: Callable[[str], bool],
) -> None:
    """Have the cost confirmed, or only told with closed.confirmed. Raises TrainingError when it is declined.

    What the evaluation asks is noted, so that `is_confirmed` knows it.
    """
    require_consent(config, describe_cost(config, phases, prompts), "uploaded", tell, confirm)
    write_atomic(_consent_path(config), json.dumps(_asked(config)) + "\n")


def is_confirmed(config: RunConfig) -> bool:
    """Whether the cost of an evaluation of this split, these rows and this length of answers was confirmed."""
    path = _consent_path(config)
    return path.is_file() and json.loads(path.read_bytes()) == _asked(config)


def _consent_path(config: RunConfig) -> Path:
    return config.root / "closed" / "confirmed.json"


def _asked(config: RunConfig) -> dict[str, Any]:
    settings = config.evaluate
    return {
        "split": settings.split, "max_new_tokens": settings.max_new_tokens, "shots": settings.shots,
        "rows": RunDir(config.root).prepared_fingerprint(),
    }


def require_consent(
    config: RunConfig, sentence: str, undone: str, tell: Callable[[str], None], confirm: Callable[[str], bool]
) -> None:
    """Have a sentence about money confirmed, or only told with closed.confirmed.

    Raises TrainingError when it is declined, which says that nothing was `undone`.
    """
    if config.closed.confirmed:
        tell(sentence)
    elif not confirm(sentence):
        cure = "the same command asks again, and closed.confirmed=true says yes at once"
        raise TrainingError(f"not confirmed, so nothing was {undone} and nothing spent; {cure}")


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
