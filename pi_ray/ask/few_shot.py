"""Writing by a small base: it sees facts and requests of other applications, and goes on with a request that is begun.

A small model follows examples better than an instruction.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random

from pi_ray.ask.requests import WriteRequest, adapter_prompt
from pi_ray.ask.writing_workers import write_locally
from pi_ray.config import PromptConfig, RunConfig
from pi_ray.units import Unit, words_of

# (a fact as a prompt states it, a request of somebody who needs it and names it)
DEMONSTRATIONS = (
    ("Garage: night rate: 5 euros", "How much is the night rate of the garage?"),
    ("Trains: platform 3: to Madrid", "Which trains leave from platform 3?"),
    ("Menu: tomato soup: 4 euros", "What does the tomato soup cost?"),
    ("Pool hours: Sunday: 8 to 12 o'clock", "Is the pool open on Sunday at 10?"),
    ("Refunds are made within 30 days of purchase.", "Can I get a refund after 40 days?"),
    ("Queues: printers: P4", "Where do I send a ticket about printers?"),
    ("Baggage: second suitcase: 30 euros", "Do I have to pay for a second suitcase?"),
    ("Staff: night nurse: extension 77", "Who do I call when I need the night nurse?"),
    ("Alarms are severe when more than 100 users are affected.", "Tell me if an alarm with 250 users is severe."),
    ("Hotel: checkout: until 11 o'clock", "When is the checkout?"),
)
# Words that a request begins with: a small base left alone begins most of them alike.
OPENINGS = ("What", "When", "Where", "Which", "How", "How much", "Is", "Are", "Can I", "Do I", "Tell me", "I need")
TELLING = 4  # letters from which a word of a fact says what it is about


class FewShotWriter:
    """The base without an adapter, in plain text: DEMONSTRATIONS, then the facts of a request. One line is a query."""

    one_each = True

    def __init__(self, config: RunConfig, limit: int):
        self.config, self.limit = config, limit

    def write(self, requests: Sequence[WriteRequest]) -> Iterator[tuple[int, str]]:
        """Replies that name nothing of their fact come back empty."""
        prompt, openings = PromptConfig(chat="none", query="{query}"), [opening(request) for request in requests]
        begun = [replace(r, prompt=f"{r.prompt} {first}") for r, first in zip(requests, openings, strict=True)]
        for place, reply in write_locally(
            self.config, begun, prompt, demonstrations(), "", self.limit, one_line=True
        ):
            line = f"{openings[place]} {reply.strip().split(chr(10))[0].strip()}"
            yield place, line if names_fact(line, requests[place].prompt) else ""


def demonstrations() -> str:
    """Facts of other applications with a query each, as text that stands before each request."""
    return "\n\n".join(f"{adapter_prompt([Unit('', fact, 'rule')])} {query}" for fact, query in DEMONSTRATIONS)


def opening(request: WriteRequest) -> str:
    """The words that the reply to this request begins with."""
    return Random(request.seed).choice(OPENINGS)


def names_fact(query: str, prompt: str) -> bool:
    """Whether a query has a word of the fact in its prompt, beside its section's name, that is long enough to tell."""
    fact = prompt.removeprefix("Fact: ").removesuffix("Request:")
    if fact.count(": ") > 1:  # section: name: value
        fact = fact.partition(": ")[2]
    return not {word for word in words_of(fact) if len(word) >= TELLING}.isdisjoint(words_of(query))
