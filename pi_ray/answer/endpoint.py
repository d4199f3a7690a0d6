"""A model behind OpenAI's API as teacher (block `closed`): its cost, consent, and answers that are paid for once."""

from collections.abc import Callable, Sequence

from pi_ray.answer.teacher_answer import TeacherAnswer
from pi_ray.config import RunConfig
from pi_ray.hosted.client import Reply, Service, replies, unpaid_places
from pi_ray.hosted.price import require_consent
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

    What was paid for is kept in closed/answers.jsonl and not asked again, but where a smaller limit cut it off. Raises
    TrainingError where the service does not answer, after some tries.
    """
    found = replies(
        config, config.closed.model, _prompts(config, rows, template), limit, watch, chosen_by=CHOSEN_BY,
        named_limit=config.train.distill.max_tokens,
    )
    encoder = PromptEncoder(load_tokenizer(config.model), config.prompt)
    return [TeacherAnswer(reply.text, ended=has_ended(reply, limit, encoder)) for reply in found]


def has_ended(reply: Reply, limit: int, encoder: PromptEncoder) -> bool:
    """Whether the model ended its reply. Where the service says nothing of it, the base's tokenizer counts the text."""
    if reply.cut_off is None:
        return len(encoder.answer(reply.text)) - 1 < limit  # the end token is not the service's
    return not reply.cut_off


def confirm_answers(
    config: RunConfig, rows: Sequence[Row], template: str, limit: int,
    confirm: Callable[[str], bool], tell: Callable[[str], None],
) -> None:
    """Have the cost of the answers that are not paid for confirmed, or only told with closed.confirmed.

    Raises TrainingError if declined.
    """
    unpaid = unpaid_places(config, config.closed.model, _prompts(config, rows, template), limit,
        named_limit=config.train.distill.max_tokens)
    if not unpaid:
        return
    asked = [rows[place] for place in unpaid]
    closed, encoder = config.closed, PromptEncoder(load_tokenizer(config.model), config.prompt)
    prefix = len(encoder.prefix(template))
    read = sum(prefix + len(encoder.row(row.query, (), row.documents)) for row in asked)
    written = limit * len(asked)
    cost = format_money((read * closed.input_price + written * closed.output_price) / 1e6, config.cost.currency)
    paid = f" ({len(rows) - len(asked):,} others are there)" if len(rows) > len(asked) else ""
    sentence = (
        f"Asking {closed.model} for {len(asked):,} answers{paid} takes about {read:,} input and at most "
        f"{written:,} output tokens, at most {cost} at the prices of the block 'closed', tokens counted as "
        f"{config.model.base} has them. Answers that are paid for are kept."
    )
    require_consent(config, sentence, "asked", tell, confirm)


def _prompts(config: RunConfig, rows: Sequence[Row], template: str) -> list[str]:
    return [render_prompt(config.prompt, row.query, template, (), row.documents) for row in rows]
