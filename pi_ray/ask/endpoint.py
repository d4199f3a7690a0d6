"""Writing by a model behind OpenAI's API (block `closed`): its cost, consent, and replies that are paid for once."""

from collections.abc import Callable, Iterator, Sequence

from pi_ray.ask.requests import WriteRequest, task_description
from pi_ray.config import RunConfig
from pi_ray.errors import TrainingError
from pi_ray.hosted.client import Sampling, replies
from pi_ray.progress import format_money
from pi_ray.prompt import PromptEncoder

CHOSEN_BY = "ask.writer 'endpoint'"


def write_by_endpoint(
    config: RunConfig, requests: Sequence[WriteRequest], template: str, limit: int
) -> Iterator[tuple[int, str]]:
    """Yield (place in `requests`, reply). What was paid for is kept in closed/answers.jsonl and not asked again.

    Raises TrainingError where the service does not answer, after some tries.
    """
    texts = [f"{task_description(template)}\n\n{request.prompt}" for request in requests]
    sampling: list[Sampling] = [
        {"temperature": config.ask.temperature, "top_p": config.ask.top_p, "seed": request.seed % 2**31}
        for request in requests
    ]
    longest = limit * max(request.count for request in requests)
    found = replies(config, config.closed.model, texts, longest, sampling=sampling, chosen_by=CHOSEN_BY)
    yield from enumerate(reply.text for reply in found)


def confirm_writing(
    config: RunConfig, requests: Sequence[WriteRequest], template: str, limit: int, encoder: PromptEncoder,
    confirm: Callable[[str], bool], tell: Callable[[str], None],
) -> None:
    """Have the cost of all rounds confirmed, or only told with closed.confirmed. Raises TrainingError where declined.

    `requests` are those of the first round; later ones have fewer.
    """
    closed, rounds = config.closed, config.ask.rounds
    prefix = len(encoder.prefix(task_description(template)))
    read = sum(prefix + len(encoder.row(request.prompt)) for request in requests) * rounds
    written = sum(limit * request.count for request in requests) * rounds
    cost = (read * closed.input_price + written * closed.output_price) / 1e6
    sentence = (
        f"Asking {closed.model} to write queries takes at most {len(requests) * rounds:,} requests in {rounds} rounds, "
        f"{read:,} input and {written:,} output tokens, {format_money(cost, config.cost.currency)} at the prices of "
        f"the block 'closed', tokens counted as {config.model.base} has them."
    )
    if closed.confirmed:
        tell(sentence)
    elif not confirm(sentence):
        raise TrainingError("not confirmed, so nothing was asked and nothing spent; the same command asks again, and "
            "closed.confirmed=true says yes at once")
