"""The prompt guard: how to answer a request that still carries the prompt which its adapter has internalised.

- The template of training or a compressed form of it, before the query or as system message, is stripped, with examples
  of training rows, also as turns of user and assistant: the adapter gets the query. White space does not count.
- Values that vary (varying_values.py) may stand in the template, and it may begin as system message and end before the
  query.
- A changed template (at least SIMILAR of its n-grams are there) goes to the base model, compressed as far as that needs
  no compressor: where MIN_MATCH or more words in a row are the template's, those are left out that its best compressed
  form (that of the highest rate below 1) leaves out. Where the compressor rewrote the template, the prompt stays.
- A system message that says no more than "You are a helpful assistant." is stripped. Any other is refused: the adapter
  was trained without it, and to drop its request in silence would give a wrong answer.
- Anything else is a query.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Self

from pydantic import BaseModel, Field, model_validator

from pi_ray.compress.words import join_words, kept_in_order, word_spans
from pi_ray.config import PromptConfig
from pi_ray.prompt import format_example
from pi_ray.run.artifact import digest
from pi_ray.store.varying_values import MAX_VALUES, VaryingPrompt, put_before
from pi_ray.store.white_space import collapse_whitespace, text_behind

PROMPT_FILE = "prompt.json"
SIMILAR = 0.5
NGRAM = 3  # words
MIN_MATCH = 8  # words
MIN_WORDS = 20  # of a template whose changed forms are recognised: a shorter one shares n-grams with queries by chance
MAX_EXAMPLES = 50_000
MAX_TEMPLATE = 1 << 20  # characters
HASH_DIGITS = 16  # of an example's hash
MAX_PARAGRAPHS = 12  # of an example that is recognised
ExampleHash = Annotated[str, Field(pattern=f"^[0-9a-f]{{{HASH_DIGITS}}}$")]
ValueName = Annotated[str, Field(pattern=r"^[^\W\d]\w{0,63}$")]
ADJECTIVES = "helpful|useful|friendly|polite|honest|harmless|smart|ai"
COURTESY = re.compile(rf"you(?: are|'re) an?(?:,? (?:and )?(?:very )?(?:{ADJECTIVES}))* assistant\W*", re.IGNORECASE)


def hash_example(example: str) -> str:
    """The hash by which prompt.json knows an example."""
    return digest(collapse_whitespace(example))[:HASH_DIGITS]


class CompressedForm(BaseModel):
    """The template as it was compressed to a rate."""

    rate: Annotated[float, Field(gt=0, lt=1, strict=True)]
    text: str


class PromptRecord(BaseModel):
    """The content of prompt.json."""

    template: Annotated[str, Field(max_length=MAX_TEMPLATE)]
    sha256: str
    compressed: Annotated[list[CompressedForm], Field(max_length=100)]
    examples: Annotated[list[ExampleHash], Field(max_length=MAX_EXAMPLES)]
    values: Annotated[list[ValueName], Field(max_length=MAX_VALUES)] = []

    @model_validator(mode="after")
    def _check_hash(self) -> Self:
        if self.sha256 != digest(collapse_whitespace(self.template)):
            raise ValueError("sha256 is not that of the template")
        return self


def prompt_record(
    template: str, compressed: Sequence[dict[str, Any]], examples: Sequence[str], values: Sequence[str] = ()
) -> dict[str, Any]:
    """The content of prompt.json. `compressed` are {"rate", "text"}, `examples` their texts as training words them,
    `values` the names of values that vary.
    """
    hashes = sorted({hash_example(e) for e in examples[:MAX_EXAMPLES]})
    known = {"template": template, "sha256": digest(collapse_whitespace(template)), "compressed": list(compressed)}
    return {"format": 1, **known, "examples": hashes, **({"values": list(values)} if values else {})}


@dataclass(frozen=True)
class GuardResult:
    """A request as the guard leaves it. `kind` says which text `text` is:

    internalised: the query, as it came; stripped: the query, without the prompt that came with it; drifted: the whole
    prompt, for the base model; unknown: the query, behind messages that are foreign to the adapter and not answered.
    """

    kind: str
    text: str


class PromptGuard:
    """Recognises one adapter's prompt. `prompt` is the content of its prompt.json, `config` its wording."""

    def __init__(self, prompt: dict[str, Any], config: PromptConfig):
        self.template = prompt["template"]
        self._words = self.template.split()
        self._ngrams = _ngrams(self._words)
        self._compressed = [form["text"] for form in sorted(prompt["compressed"], key=lambda form: -form["rate"])]
        known = {collapse_whitespace(text) for text in (self.template, *self._compressed)} - {""}
        self._known = sorted(known, key=len, reverse=True)
        self._examples = frozenset(prompt["examples"])
        self._varying = VaryingPrompt(self.template, prompt.get("values", ()))
        first, *between, last = map(re.escape, re.split(r"\{query\}|\{answer\}", config.example.strip()))
        between = [f"(?>.*?{part})" for part in between]  # atomic, so that it takes linear time
        self._example_wording = re.compile("".join([first, *between, ".*", last]), re.DOTALL)
        self._config = config

    def inspect(self, system: str, query: str, turns: Sequence[tuple[str, str]] = ()) -> GuardResult:
        """Recognise the prompt in a request: `system` is the text of its system messages, "" for none, `query` that of
        the last user message, `turns` are (role, text) of the messages between them.
        """
        system = system if system.strip() else ""
        if whole := self._find_whole(system, query, turns):
            return whole
        result = self._inspect(system, query, turns)
        if result.kind == "unknown" and COURTESY.fullmatch(collapse_whitespace(system)):
            result = self._inspect("", query, turns)
        return GuardResult("stripped", result.text) if system and result.kind == "internalised" else result

    def _find_whole(self, system: str, query: str, turns: Sequence[tuple[str, str]]) -> GuardResult | None:
        """The query behind a template with values in it, or behind one that goes on from the system message into the
        user's text; None for any other request.
        """
        first = turns[0][1] if turns else query
        if system and (taken := self._varying.take(system, whole=True)):
            lines, filled = taken
            result = self._inspect(filled, query, turns)
        else:
            text = f"{system}\n\n{first}" if system else first
            taken = self._varying.take(text, whole=False)
            lines, filled = taken or ("", text)
            rest = self._after_template(filled) if taken or system else None
            if rest is None or len(rest) > len(first):  # a system message that goes on behind the template is another
                return None
            asked, shots = (query, [("user", filled), *turns[1:]]) if turns else (filled, [])
            result = self._inspect("", asked, shots)
        return GuardResult("stripped", put_before(lines, result.text)) if result.kind == "stripped" else None

    def _inspect(self, system: str, query: str, turns: Sequence[tuple[str, str]]) -> GuardResult:
        """Turns after a template are examples; without a template they are a conversation, unknown to the adapter."""
        if [role for role, _ in turns] != ["user", "assistant"] * (len(turns) // 2):
            return GuardResult("unknown", query)
        shots = [(asked, answer) for (_, asked), (_, answer) in zip(turns[::2], turns[1::2], strict=True)]
        if shots and not system and (rest := self._after_template(shots[0][0])) is not None:
            asked, answer = shots[0]
            system, shots[0] = asked[: len(asked) - len(rest)], (rest.strip(), answer)
        examples = [format_example(self._config.example, self._bare_query(asked), answer) for asked, answer in shots]
        if examples and self._after_template(system) is None and self.similarity(system or examples[0]) < SIMILAR:
            return GuardResult("unknown", query)
        if all(hash_example(e) in self._examples for e in examples) and (result := self._inspect_single(system, query)):
            return result
        heading = [self._config.examples_heading] if examples and self._config.examples_heading else []
        whole = "\n\n".join([*heading, *examples, query])
        return GuardResult("drifted", f"{self.compress(system)}\n\n{whole}" if system else self.compress(whole))

    def _inspect_single(self, system: str, query: str) -> GuardResult | None:
        """The same without turns; None for a drifted prompt."""
        prompt = system or query
        rest = self._after_template(prompt)
        if rest is None:
            is_drifted = self.similarity(prompt) >= SIMILAR
            return None if is_drifted else GuardResult("unknown" if system else "internalised", query)
        rest = self._after_examples(rest)
        if system:  # in which nothing but examples may follow the template
            rest = self._after_examples(query) if rest == "" else None
        return None if rest is None else GuardResult("stripped", self._bare_query(rest))

    def similarity(self, text: str) -> float:
        """The share of the template's n-grams that `text` has; 0 for a template too short to tell."""
        if len(self._words) < MIN_WORDS:
            return 0.0
        return len(self._ngrams & _ngrams(text.split())) / len(self._ngrams)

    def compress(self, text: str) -> str:
        """`text` without the words that the best compressed form left out of the template."""
        if self._kept is None:
            return text
        spans = word_spans(text)
        words = [text[start:end] for start, end in spans]
        kept, at = [True] * len(words), 0
        while at <= len(words) - MIN_MATCH:
            start = self._runs.get(tuple(words[at : at + MIN_MATCH]))
            if start is None:
                at += 1
                continue
            end = min(len(words) - at, len(self._words) - start)
            length = next((n for n in range(MIN_MATCH, end) if words[at + n] != self._words[start + n]), end)
            kept[at : at + length] = self._kept[start : start + length]
            at += length
        return join_words(text, spans, kept)

    def _after_template(self, text: str) -> str | None:
        """The text after the template, or None where `text` does not begin with a form of it."""
        flat = collapse_whitespace(text)
        for known in self._known:
            ends_a_word = flat[len(known) : len(known) + 1] in ("", " ") or not known[-1].isalnum()
            if flat.startswith(known) and ends_a_word:
                return text_behind(text, known)
        return None

    def _after_examples(self, text: str) -> str | None:
        """The text after its examples, if any; None where these cannot be told from the query, which must stay."""
        text, heading = text.strip(), collapse_whitespace(self._config.examples_heading)
        first, _, rest = text.partition("\n")
        has_heading = bool(heading) and collapse_whitespace(first) == heading
        paragraphs = [p for p in re.split(r"\n\s*\n", rest if has_heading else text) if p.strip()]
        at = 0
        while length := self._example_length(paragraphs, at):
            at += length
        if not at:
            return None if has_heading else text
        left = paragraphs[at:]
        if len(left) > 1 and self._example_wording.fullmatch(left[0]):
            return None  # an example that is not one of training
        return "\n\n".join(left).strip()

    def _example_length(self, paragraphs: Sequence[str], at: int) -> int:
        """The number of paragraphs of the known example that begins at `at`; 0 for none."""
        lengths = range(1, min(MAX_PARAGRAPHS, len(paragraphs) - at) + 1) if self._examples else ()
        return next((n for n in lengths if hash_example("\n\n".join(paragraphs[at : at + n])) in self._examples), 0)

    def _bare_query(self, text: str) -> str:
        """The query without the wording of training, which the encoder adds again."""
        before, _, after = (part.strip() for part in self._config.query.partition("{query}"))
        is_worded = text.startswith(before) and text.endswith(after) and len(text) >= len(before) + len(after)
        return text[len(before) : len(text) - len(after)].strip() if is_worded else text

    @cached_property
    def _runs(self) -> dict[tuple[str, ...], int]:
        """MIN_MATCH words in a row -> their first index in the template."""
        return {tuple(self._words[i : i + MIN_MATCH]): i for i in reversed(range(len(self._words) - MIN_MATCH + 1))}

    @cached_property
    def _kept(self) -> list[bool] | None:
        """Which words of the template the best form kept that only dropped words."""
        return next((kept for text in self._compressed if (kept := kept_in_order(self._words, text.split()))), None)


def _ngrams(words: Sequence[str]) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)}


EMPTY_GUARD = PromptGuard(prompt_record("", [], []), PromptConfig())  # recognises no prompt
