"""The prompt drift guard: what to do with a request that still carries the prompt which its adapter has taken in.

- The template as it was trained on, or one of its compressed forms, in front of the query or as system message: it is taken away, together with
  examples that stood in training, which may be turns of user and assistant, and the adapter gets the query. White space does not count.
- A changed template (at least SIMILAR of its three-word sequences are there): the base model answers. It reads the changed prompt compressed as far as
  that needs no compressor: from each run of RUN or more words that stand in the template, the words that its best compressed form left out are left out
  again (best: the highest rate below 1, which loses least); all other words stay, so nothing that is new is lost. Where the compressor rewrote the
  template instead of dropping words, the prompt stays as it came.
- A system message that says no more than "You are a helpful assistant." is taken away as well; any other one is refused, since the adapter was trained
  without, and to drop what it asks for in silence would be a wrong answer.
- Anything else is a query.

prompt.json, which `publish` writes beside the weights, has the template, its compressed forms, and hashes of the examples.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pi_ray.compress.words import join_words, word_spans
from pi_ray.config import PromptConfig
from pi_ray.prompt import Example
from pi_ray.run.artifact import digest

PROMPT_FILE = "prompt.json"
SIMILAR = 0.5
GRAM = 3  # words
RUN = 8  # words
LEAST_WORDS = 20  # of a template whose changed forms are recognised: a shorter one shares sequences with queries by chance
MAX_EXAMPLES = 50_000
MAX_TEMPLATE = 1 << 20  # characters
MARK = 16  # hex digits of an example's hash
PARAGRAPHS = 12  # of the longest example that is recognised
COURTESY = re.compile(r"you(?: are|'re) an?(?:,? (?:and )?(?:very )?(?:helpful|useful|friendly|polite|honest|harmless|smart|ai))* assistant\W*", re.IGNORECASE)


def collapse_whitespace(text: str) -> str:
    """The text with every run of white space as one space."""
    return " ".join(text.split())


def hash_example(example: str) -> str:
    """What prompt.json keeps of an example."""
    return digest(collapse_whitespace(example))[:MARK]


def format_example(form: str, query: str, answer: str) -> str:
    """An example as prompt.example words it, in one pass: what a client sends may spell out {answer} a thousand times."""
    return re.sub(r"\{(query|answer)\}", lambda found: query if found[1] == "query" else answer, form)


def prompt_record(template: str, compressed: Sequence[dict[str, Any]], examples: Sequence[str]) -> dict[str, Any]:
    """The content of prompt.json. `compressed` are {"rate", "text"}, `examples` their texts as training words them."""
    marks = sorted({hash_example(example) for example in examples[:MAX_EXAMPLES]})
    return {"format": 1, "template": template, "sha256": digest(collapse_whitespace(template)), "compressed": list(compressed), "examples": marks}


def prompt_record_error(data: dict[str, Any]) -> str:
    """What is wrong with the content of a prompt.json, or ""."""
    template, compressed, examples = data.get("template"), data.get("compressed"), data.get("examples")
    if not isinstance(template, str) or len(template) > MAX_TEMPLATE:
        return f"the template is not a text of at most {MAX_TEMPLATE} characters"
    if data.get("sha256") != digest(collapse_whitespace(template)):
        return "sha256 is not that of the template"
    if not isinstance(compressed, list) or len(compressed) > 100 or not all(_is_form(form) for form in compressed):
        return "compressed is not a list of rates and texts"
    if not isinstance(examples, list) or len(examples) > MAX_EXAMPLES or not all(isinstance(e, str) and re.fullmatch(rf"[0-9a-f]{{{MARK}}}", e) for e in examples):
        return "examples is not a list of hashes"
    return ""


def _is_form(form: Any) -> bool:
    return isinstance(form, dict) and isinstance(form.get("text"), str) and type(form.get("rate")) in (int, float) and 0 < form["rate"] < 1


@dataclass(frozen=True)
class GuardResult:
    """A request as the guard leaves it. `kind`, and with it what `text` is:

    internalised: the query, as it came; stripped: the query, without what came with it; drifted: the whole prompt, for the base model;
    unknown: messages before the query that are not of the adapter's prompt, so nothing can be done with them.
    """

    kind: str
    text: str


class PromptGuard:
    """Knows one adapter's prompt."""

    def __init__(self, prompt: dict[str, Any], config: PromptConfig):
        self.template = prompt["template"]
        self._forms = sorted(prompt["compressed"], key=lambda form: -form["rate"])
        self._known = sorted({text for t in (self.template, *(form["text"] for form in self._forms)) if (text := collapse_whitespace(t))}, key=len, reverse=True)
        self._examples = frozenset(prompt["examples"])
        self._config = config
        self._grams = _grams(self.template.split())

    def look(self, system: str, query: str, turns: Sequence[tuple[str, str]] = ()) -> GuardResult:
        """`system`: the text of system messages, "" for none; `query`: the last user message; `turns`: (role, text) of the messages between them."""
        seen = self._look(system, query, turns)
        if seen.kind == "unknown" and COURTESY.fullmatch(collapse_whitespace(system)):
            seen = self._look("", query, turns)
        return GuardResult("stripped", seen.text) if system and seen.kind == "internalised" else seen

    def _look(self, system: str, query: str, turns: Sequence[tuple[str, str]]) -> GuardResult:
        """Turns behind a template become examples in the words of training. Without one they are a conversation, of which the adapter knows nothing."""
        if [role for role, _ in turns] != ["user", "assistant"] * (len(turns) // 2):
            return GuardResult("unknown", query)
        shots = [Example(asked, answered) for (_, asked), (_, answered) in zip(turns[::2], turns[1::2], strict=True)]
        if shots and not system and (rest := self._behind_template(shots[0].query)) is not None:
            first = shots[0].query
            system, shots[0] = first[: len(first) - len(rest)], Example(rest.strip(), shots[0].answer)
        examples = [format_example(self._config.example, self._unworded(shot.query), shot.answer) for shot in shots]
        if examples and self._behind_template(system) is None and self.likeness(system or examples[0]) < SIMILAR:
            return GuardResult("unknown", query)
        seen = self._look_at(system, query) if all(hash_example(example) in self._examples for example in examples) else GuardResult("drifted", query)
        if seen.kind != "drifted":
            return seen
        heading = [self._config.examples_heading] if examples and self._config.examples_heading else []
        whole = "\n\n".join([*heading, *examples, query])
        return GuardResult("drifted", f"{self.compressed(system)}\n\n{whole}" if system else self.compressed(whole))

    def _look_at(self, system: str, query: str) -> GuardResult:
        """The same where there are no turns, or none that count; of what drifted the query alone."""
        head = system or query
        rest = self._behind_template(head)
        if rest is None:
            if self.likeness(head) >= SIMILAR:
                return GuardResult("drifted", query)
            return GuardResult("unknown" if system else "internalised", query)
        rest = self._behind_examples(rest)
        if system and rest == "":
            rest = self._behind_examples(query)
        elif system:
            rest = None  # something was added to the template
        return GuardResult("drifted", query) if rest is None else GuardResult("stripped", self._unworded(rest))

    def likeness(self, text: str) -> float:
        """Share of the template's three-word sequences that `text` has; 0 for a template too short to tell."""
        if len(self._words) < LEAST_WORDS:
            return 0.0
        return len(self._grams & _grams(text.split())) / len(self._grams)

    def compressed(self, text: str) -> str:
        """`text` without what the best compressed form left out of the template."""
        if self._kept is None:
            return text
        pieces = word_spans(text)
        words = [text[start:end] for start, end in pieces]
        kept, at = [True] * len(words), 0
        while at <= len(words) - RUN:
            place = self._runs.get(tuple(words[at : at + RUN]))
            if place is None:
                at += 1
                continue
            length = _common(self._words, place, words, at)
            kept[at : at + length] = self._kept[place : place + length]
            at += length
        return join_words(text, pieces, kept)

    def _behind_template(self, text: str) -> str | None:
        """What follows the template, or None where the text does not begin with it."""
        flat = collapse_whitespace(text)
        for known in self._known:
            whole_words = len(flat) == len(known) or flat[len(known) :][:1] == " " or not known[-1].isalnum()
            if flat.startswith(known) and whole_words:
                return text[_end(text, len(known.replace(" ", ""))) :]
        return None

    def _behind_examples(self, text: str) -> str | None:
        """What follows the examples, if there are any. None where they cannot all be told from the query: the prompt must not lose a part of that."""
        text, heading = text.strip(), collapse_whitespace(self._config.examples_heading)
        first, _, rest = text.partition("\n")
        headed = bool(heading) and collapse_whitespace(first) == heading
        paragraphs = [p for p in re.split(r"\n\s*\n", rest if headed else text) if p.strip()]
        found = at = 0
        while length := self._example_at(paragraphs, at):
            at, found = at + length, found + 1
        if not found:
            return None if headed else text
        left = paragraphs[at:]
        if len(left) > 1 and self._is_worded_as_example(left[0]):
            return None  # an example that did not stand in training
        return "\n\n".join(left).strip()

    def _example_at(self, paragraphs: Sequence[str], at: int) -> int:
        """Paragraphs of the known example that begins here; 0 for none."""
        lengths = range(1, min(PARAGRAPHS, len(paragraphs) - at) + 1) if self._examples else ()
        return next((n for n in lengths if hash_example("\n\n".join(paragraphs[at : at + n])) in self._examples), 0)

    def _unworded(self, text: str) -> str:
        """The bare query where it is worded as in training; the encoder words it again."""
        before, _, after = (part.strip() for part in self._config.query.partition("{query}"))
        format_example = text.startswith(before) and text.endswith(after) and len(text) >= len(before) + len(after)
        return text[len(before) : len(text) - len(after)].strip() if format_example else text

    @cached_property
    def _words(self) -> list[str]:
        return self.template.split()

    @cached_property
    def _runs(self) -> dict[tuple[str, ...], int]:
        """RUN words in a row -> where they first stand in the template."""
        return {tuple(self._words[i : i + RUN]): i for i in reversed(range(len(self._words) - RUN + 1))}

    @cached_property
    def _kept(self) -> list[bool] | None:
        """Which words of the template the best form kept that only dropped words."""
        return next((kept for form in self._forms if (kept := _kept(self._words, form["text"].split()))), None)

    def _is_worded_as_example(self, text: str) -> bool:
        """Whether the parts of prompt.example that are the same in every example stand in `text` in order."""
        first, *between, last = re.split(r"\{query\}|\{answer\}", self._config.example.strip())
        if not (text.startswith(first) and text.endswith(last)):
            return False
        at = len(first)
        for part in between:
            at = text.find(part, at) + len(part)
            if at < len(part):
                return False
        return at <= len(text) - len(last)


def _kept(words: Sequence[str], output: Sequence[str]) -> list[bool] | None:
    """Which of `words` stand in `output`, which has the same order; None where it has others too. Linear: both may come from a stranger."""
    kept, at = [False] * len(words), 0
    for word in output:
        while at < len(words) and words[at] != word:
            at += 1
        if at == len(words):
            return None
        kept[at] = True
        at += 1
    return kept


def _grams(words: Sequence[str]) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)}


def _common(one: Sequence[str], i: int, other: Sequence[str], j: int) -> int:
    """How many words from place `i` of one and `j` of the other on are equal."""
    length = 0
    while i + length < len(one) and j + length < len(other) and one[i + length] == other[j + length]:
        length += 1
    return length


def _end(text: str, count: int) -> int:
    """Where the `count`-th character that is not white space ends."""
    for word in re.finditer(r"\S+", text):
        if count <= len(word[0]):
            return word.start() + count
        count -= len(word[0])
    return len(text)


EMPTY_GUARD = PromptGuard(prompt_record("", [], []), PromptConfig())  # knows no prompt
