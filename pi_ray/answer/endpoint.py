"""A model behind OpenAI's API as teacher (block `closed`): its cost, consent, and answers that are paid for once."""

from collections.abc import Callable, Sequence

from pi_ray.answer.base import TeacherAnswer
from pi_ray.config import RunConfig
from pi_ray.errors import TrainingError
from pi_ray.hosted.client import Service, replies
from pi_ray.models import load_tokenizer
from pi_ray.progress import format_money
from pi_ray.prompt import PromptEncoder, render_prompt
from pi_ray.protocols import Row

CHOSEN_BY = "train.distill.teacher 'endpoint'"


def require_endpoint(config: RunConfig) -> None:
    """Raises ConfigError without the endpoint's key, MissingExtraError without the openai package."""
    Service(config.closed, chosen_by=CHOSEN_BY)


def answer_by_endpoint(
    config: RunConfig, rows: Sequence[Row], template: str, limit: int, watch: Callable[[int, int], None]
) -> list[TeacherAnswer]:
    """The model's answer to each row behind the whole prompt, of at most `limit` tokens.

    What was paid for is kept in closed/answers.jsonl and not asked again. Raises TrainingError where the service does
    not answer, after some tries.
    """
    prompts = [render_prompt(config.prompt, row.query, template, (), row.documents) for row in rows]
    found = replies(config, config.closed.model, prompts, limit, watch, chosen_by=CHOSEN_BY)
    return [TeacherAnswer(reply.text, ended=(reply.output_tokens or 0) < limit) for reply in found]


def confirm_answers(
    config: RunConfig, rows: Sequence[Row], template: str, limit: int,
    confirm: Callable[[str], bool], tell: Callable[[str], None],
) -> None:
    """Have the cost of the answers confirmed, or only told with closed.confirmed. Raises TrainingError if declined."""
    closed, encoder = config.closed, PromptEncoder(load_tokenizer(config.model), config.prompt)
    prefix = len(encoder.prefix(template))
    read = sum(prefix + len(encoder.row(row.query, (), row.documents)) for row in rows)
    written = limit * len(rows)
    cost = format_money((read * closed.input_price + written * closed.output_price) / 1e6, config.cost.currency)
    sentence = (
        f"Asking {closed.model} for {len(rows):,} answers takes about {read:,} input and at most {written:,} output "
        f"tokens, at most {cost} at the prices of the block 'closed', tokens counted as {config.model.base} has them. "
        "Answers that are paid for are kept."
    )
    if closed.confirmed:
        tell(sentence)
    elif not confirm(sentence):
        raise TrainingError("not confirmed, so nothing was asked and nothing spent; the same command asks again, and "
            "closed.confirmed=true says yes at once")
