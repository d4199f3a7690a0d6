"""Writing by a small base: it sees facts and requests of other applications, since it follows examples better than an
instruction.
"""

from collections.abc import Iterator, Sequence

from pi_ray.ask.requests import WriteRequest, adapter_prompt
from pi_ray.ask.writing_workers import write_locally
from pi_ray.config import PromptConfig, RunConfig
from pi_ray.units import Unit

# (facts as a prompt states them, what somebody who needs them asks); one or two facts, as requests have them
DEMONSTRATIONS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("Garage: the gate closes at 22 o'clock",), "Until when can I fetch my car in the evening?"),
    (("Baggage: one suitcase of 23 kg is free",), "How heavy may my suitcase be?"),
    (("Menu: soup: 4 euros", "Menu: bread: 1 euro"), "What do I pay for a soup and some bread?"),
    (("Queues: printers: P4",), "My printer gives out nothing but blank pages."),
    (("A fault is severe when more than 100 users are affected.",), "250 people cannot log in since this morning."),
    (("Refunds are made within 30 days of purchase.",), "I bought a lamp six weeks ago, can I give it back?"),
    (("Parking: free at weekends", "Parking: 2 euros an hour from Monday to Friday"),
        "Is it cheaper to park on Sunday than on Tuesday?"),
    (("Commands: list: shows the files of a folder",), "Show me what is in the folder photos."),
)


class FewShotWriter:
    """The base without an adapter, in plain text: DEMONSTRATIONS, then the facts of a request. One line is a query."""

    one_each = True

    def __init__(self, config: RunConfig, limit: int):
        self.config, self.limit = config, limit

    def write(self, requests: Sequence[WriteRequest]) -> Iterator[tuple[int, str]]:
        prompt = PromptConfig(chat="none", query="{query}")
        for place, reply in write_locally(
            self.config, requests, prompt, demonstrations(), "", self.limit, one_line=True
        ):
            yield place, reply.strip().split("\n")[0].strip()


def demonstrations() -> str:
    """What stands before each request."""
    return "\n\n".join(f"{adapter_prompt(Unit('', fact, 'rule') for fact in facts)}\n{query}"
        for facts, query in DEMONSTRATIONS)
