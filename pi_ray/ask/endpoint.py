"""Writing by a model behind OpenAI's API (block `closed`): its cost, consent, and replies that are paid for once."""

from collections.abc import Callable, Iterator, Sequence

from pi_ray.ask.requests import WriteRequest, task_description
from pi_ray.config import RunConfig
from pi_ray.hosted.client import Sampling, replies, unpaid_places
from pi_ray.hosted.price import require_consent
from pi_ray.progress import format_money
from pi_ray.prompt import PromptEncoder

CHOSEN_BY = "ask.writer 'endpoint'"


def write_by_endpoint(
    config: RunConfig, requests: Sequence[WriteRequest], template: str, limit: int
) -> Iterator[tuple[int, str]]:
    """Yield (place in `requests`, reply). What was paid for is kept in closed/answers.jsonl and not asked again.

    Raises TrainingError where the service does not answer, after some tries.
    """
    texts, limits, sampling = _chats(config, requests, template, limit)
    found = replies(config, config.closed.model, texts, limits, sampling=sampling, chosen_by=CHOSEN_BY)
    yield from enumerate(reply.text for reply in found)


def confirm_writing(
    config: RunConfig, requests: Sequence[WriteRequest], round_number: int, template: str, limit: int,
    encoder: PromptEncoder, confirm: Callable[[str], bool], tell: Callable[[str], None],
) -> None:
    """Have the cost of what is not paid for confirmed, or only told with closed.confirmed, of this round and all later.

    `requests` are all of this round; later ones have fewer. Raises TrainingError where declined.
    """
    closed, later = config.closed, config.ask.rounds - 1 - round_number
    texts, limits, sampling = _chats(config, requests, template, limit)
    unpaid = [requests[i] for i in unpaid_places(config, closed.model, texts, limits, sampling)]
    asked = [*unpaid, *list(requests) * later]
    prefix = len(encoder.prefix(task_description(template)))
    read = sum(prefix + len(encoder.row(request.prompt)) for request in asked)
    written = sum(limit * request.count for request in asked)
    cost = (read * closed.input_price + written * closed.output_price) / 1e6
    paid = f" ({len(requests) - len(unpaid):,} others are paid for)" if len(requests) > len(unpaid) else ""
    sentence = (
        f"Asking {closed.model} to write queries takes at most {len(asked):,} requests in {later + 1} rounds{paid}, "
        f"{read:,} input and {written:,} output tokens, {format_money(cost, config.cost.currency)} at the prices of "
        f"the block 'closed', tokens counted as {config.model.base} has them."
    )
    require_consent(config, sentence, "asked", tell, confirm)


def _chats(
    config: RunConfig, requests: Sequence[WriteRequest], template: str, limit: int
) -> tuple[list[str], list[int], list[Sampling]]:
    """(prompt, the most tokens of a reply, sampling) of each request, as three lists."""
    texts = [f"{task_description(template)}\n\n{request.prompt}" for request in requests]
    sampling: list[Sampling] = [
        {"temperature": config.ask.temperature, "top_p": config.ask.top_p, "seed": request.seed % 2**31}
        for request in requests
    ]
    return texts, [limit * request.count for request in requests], sampling
