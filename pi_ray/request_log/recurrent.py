"""The recurrent part of requests: system message, tools, few-shot turns, and what all users' first texts begin with.

A log may hold the requests of several applications. `find_prompts` tells their prompts apart, and `Prompt.strip` takes
a request's own words out of it.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from statistics import fmean
from typing import NamedTuple

from pi_ray.prompt import Template
from pi_ray.request_log.growth import longest
from pi_ray.request_log.pattern import Likeness, Pattern, find_patterns, is_common
from pi_ray.request_log.request import Message, Request

COVERED = 0.9  # least share of all requests that common kinds of them make up
SENTENCE = 3  # words, on the average, of a value that can be a query
# From strict to loose: a text with passages or records in it shares less with others than it has of its own.
SAME = Likeness(0.6, 0)
SYSTEM_LEVELS = (SAME, Likeness(0, 400), Likeness(0, 80))
USER_LEVELS = (Likeness(0.6, 40), Likeness(0, 400), Likeness(0, 40))


class StrippedRequest(NamedTuple):
    """A request, its values that vary, its query, and its turns without what recurs."""

    request: Request
    values: tuple[str, ...]
    query: str
    turns: tuple[Message, ...]


@dataclass(frozen=True)
class Prompt:
    """The recurrent parts of one application's requests."""

    system: Pattern
    tools: str  # JSON as sent; "" for none
    shots: tuple[Message, ...]  # turns of user and assistant that every request begins with
    user: Pattern | None = None  # of the first user's text after them; None where these have nothing in common
    query_slot: int = -1  # which of the user pattern's values is the query
    conversations: int = 0  # of the sample that it was found in

    def find_values(self, request: Request) -> tuple[tuple[str, ...], str] | None:
        """The values that vary and the query of a request; None where it is not one of this prompt."""
        first = next(iter(request.turns[len(self.shots) :]), None)
        values = self.system.values(request.system)
        if first is None or values is None or tools_key(request.tools) != tools_key(self.tools):
            return None
        if request.turns[: len(self.shots)] != self.shots:
            return None
        if self.user is None:
            return values, first["content"]
        found, slot = self.user.values(first["content"]), self.query_slot
        return None if found is None else ((*values, *found[:slot], *found[slot + 1 :]), found[slot].strip())

    def strip(self, request: Request) -> StrippedRequest | None:
        """A request without what recurs; None where it is not one of this prompt.

        Values that vary stand at the head of the first user's text, each on a line with its name. Raises ValueError
        where nothing else is left of that text.
        """
        if (found := self.find_values(request)) is None:
            return None
        values, query = found
        if not query:
            raise ValueError("the user's text has nothing beside what all requests have in common")
        named = zip(self.value_names, values, strict=True)
        head = "\n".join(f"{name}: {value.strip()}" for name, value in named if value.strip())
        first, *rest = request.turns[len(self.shots) :]
        content = "\n\n".join(filter(None, [head, query]))
        return StrippedRequest(request, values, query, ({**first, "content": content}, *rest))

    @cached_property
    def value_names(self) -> list[str]:
        """The names of the values that vary, the query aside, each once."""
        system, user = self._names
        return [*system, *(name for i, name in enumerate(user) if i != self.query_slot)]

    @property
    def _names(self) -> tuple[list[str], list[str]]:
        """The names of the values of system message and user's text; of two that are called alike, the later has _2."""
        system, user = self.system.value_names(), self.user.value_names() if self.user else []
        seen, names = Counter[str](), list[str]()
        for i, name in enumerate([*system, *user]):
            is_query = i == len(system) + self.query_slot and self.user is not None
            seen[name] += not is_query
            names.append(name if is_query or seen[name] == 1 else f"{name}_{seen[name]}")
        return names[: len(system)], names[len(system) :]

    @property
    def text(self) -> str:
        """The constant text, with a placeholder such as {current_time} for each value that varies."""
        system, user = self._names
        parts = [_fill(self.system.parts, system)]
        at = self.query_slot
        if self.shots:
            turns = (f"{shot['role'].capitalize()}: {shot['content']}" for shot in self.shots)
            parts.append("## Examples\n\n" + "\n".join(turns))
        if self.user:
            parts += [_fill(self.user.parts[: at + 1], user[:at]), _fill(self.user.parts[at + 1 :], user[at + 1 :])]
        return "\n\n".join(filter(None, map(str.strip, parts)))

    @property
    def template(self) -> str:
        """The content of template.md."""
        return f"# Instruction\n\n{self.text}\n"

    @property
    def loses_text(self) -> bool:
        """Whether the grammar of template.md drops some of the text, such as an HTML comment."""
        return Template.parse(self.template).text.split() != self.text.split()

    def describe(self) -> str:
        """Its parts in words."""
        slots = ", ".join(f"{{{name}}}" for name in self.value_names)
        tools = len(json.loads(self.tools)) if self.tools else 0
        head = self.user.constant if self.user else 0
        found = [
            f"a system message of {self.system.constant:,} characters" if self.system.constant else "",
            f"{tools} tool{'s' * (tools > 1)}" if tools else "",
            f"{len(self.shots)} few-shot turns" if self.shots else "",
            f"{head:,} characters around each query" if head else "", f"values that vary: {slots}" if slots else "",
        ]
        return ", ".join(filter(None, found)) or "nothing"

    @property
    def begins(self) -> str:
        """The first words, by which people tell it from others."""
        text = " ".join(self.text.split()) or "no recurrent text"
        return text if len(text) <= 60 else f"{text[:57]}..."


@lru_cache(maxsize=64)
def tools_key(tools: str) -> str:
    """The key by which tools are compared: their definitions, in any order."""
    return json.dumps(sorted(json.dumps(tool, sort_keys=True) for tool in json.loads(tools))) if tools else ""


def find_prompts(requests: Sequence[Request]) -> list[Prompt]:
    """The prompts of a sample of requests, that of the most conversations first."""
    by_tools: dict[str, list[Request]] = defaultdict(list)
    for request in requests:
        by_tools[tools_key(request.tools)].append(request)
    found = list[Prompt]()
    for group in by_tools.values():
        for system, of_system in _split_system(group):
            conversations = longest((request, system.values(request.system) or ()) for request in of_system)
            for count, of_shots in _split_shots(conversations):
                found += _split_users(Prompt(system, group[0].tools, of_shots[0].turns[:count]), of_shots)
    return sorted(found, key=lambda prompt: -prompt.conversations)


def _split_system(requests: Sequence[Request]) -> Sequence[tuple[Pattern, list[Request]]]:
    """Requests by the pattern of their system message."""
    texts = [request.system for request in requests]
    best = _best_level(requests, texts, Counter(texts), SYSTEM_LEVELS)
    return best or _by_pattern(requests, texts, find_patterns(Counter(texts), SAME))


def _split_users(prompt: Prompt, requests: Sequence[Request]) -> Iterator[Prompt]:
    """The prompt with what its users' first texts have in common: once for each kind of text."""
    texts = [request.turns[len(prompt.shots)]["content"] for request in requests]
    best = _best_level(requests, texts, Counter(set(texts)), USER_LEVELS)
    for pattern, members in best or ():
        values = [pattern.values(request.turns[len(prompt.shots)]["content"]) or () for request in members]
        yield replace(prompt, user=pattern, query_slot=_find_query(values), conversations=len(members))
    if best is None:
        yield replace(prompt, conversations=len(requests))


def _find_query(values: Sequence[Sequence[str]]) -> int:
    """Which of the values of users' texts is the query: the last one that is a sentence and seldom the same, if any is;
    else the longest.
    """
    slots = list(zip(*values, strict=True))
    sizes = [sum(map(len, slot)) for slot in slots]
    words = [fmean(len(value.split()) for value in slot) for slot in slots]
    sentences = [i for i, slot in enumerate(slots) if words[i] >= SENTENCE and 2 * len(set(slot)) > len(slot)]
    return sentences[-1] if sentences else sizes.index(max(sizes))


def _best_level(
    requests: Sequence[Request], texts: Sequence[str], counts: Mapping[str, int], levels: Sequence[Likeness],
) -> list[tuple[Pattern, list[Request]]] | None:
    """Requests by the patterns of their texts, at the level at which one pattern takes most text out of them all.

    None where at no level common patterns cover nearly all requests. A pattern of a user's text has a value, the query.
    """
    best, most = None, 0
    for least in levels:
        patterns = [p for p in find_patterns(counts, least) if levels is SYSTEM_LEVELS or len(p.parts) > 1]
        kinds = _by_pattern(requests, texts, patterns)
        common = [(pattern, len(members)) for pattern, members in kinds if is_common(len(members), len(requests))]
        if sum(count for _, count in common) >= COVERED * len(requests):
            taken = max(pattern.constant * count for pattern, count in common)
            best, most = (kinds, taken) if taken > most else (best, most)
    return best


def _by_pattern(
    requests: Sequence[Request], texts: Sequence[str], patterns: Sequence[Pattern],
) -> list[tuple[Pattern, list[Request]]]:
    """Each pattern with its requests; those of no pattern are left out."""
    found: dict[Pattern, list[Request]] = defaultdict(list)
    for request, text in zip(requests, texts, strict=True):
        fits = next((pattern for pattern in patterns if pattern.values(text) is not None), None)
        if fits is not None:
            found[fits].append(request)
    return list(found.items())


def _fill(parts: Sequence[str], names: Sequence[str]) -> str:
    """Constant parts with a placeholder for each value between them."""
    return parts[0] + "".join(f"{{{name}}}{part}" for name, part in zip(names, parts[1:], strict=True))


def _split_shots(requests: Sequence[Request], count: int = 0) -> list[tuple[int, list[Request]]]:
    """Requests by the few-shot turns that they begin with, and how many turns these are.

    A pair of turns is an example where it is one of few with which nearly all requests begin.
    """
    by_pair: dict[str, list[Request]] = defaultdict(list)
    for request in requests:
        pair = request.turns[count : count + 2]
        is_pair = [turn["role"] for turn in pair] == ["user", "assistant"] and not pair[1].get("tool_calls")
        goes_on = len(request.turns) > count + 2 and request.turns[count + 2]["role"] == "user"
        by_pair[json.dumps(pair) if is_pair and goes_on else ""].append(request)
    rest = by_pair.pop("", [])
    common = [members for members in by_pair.values() if len(members) > 1 and is_common(len(members), len(requests))]
    if sum(map(len, common)) < COVERED * len(requests) or not common:
        return [(count, list(requests))]
    rest += [r for members in by_pair.values() if members not in common for r in members]
    split = [part for members in common for part in _split_shots(members, count + 2)]
    return [*split, *([(count, rest)] if rest else [])]
