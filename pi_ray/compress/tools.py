"""Compression of tools: each function is a document whose JSON stays valid at every rate.

Until the rate is met there go, in this order: words of descriptions, by the run's compressor; the descriptions of
optional parameters; whole functions, those first that the labels use least. Names, parameters, types, required and
enums of a function stay as long as it does.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from pi_ray.compress import words
from pi_ray.compress.protection import Protection
from pi_ray.compress.rate_control import Choice, CompressedTemplate, RateSearch, _Part
from pi_ray.config import CompressConfig
from pi_ray.conversation import join_tools, split_tools
from pi_ray.prompt import Template
from pi_ray.protocols import Compressor

LEAST = 0.3  # of the words of descriptions: with fewer, a description says nothing, and other things go first
ONE_SCHEMA, SCHEMAS = ("items", "additionalProperties"), ("anyOf", "oneOf", "allOf", "prefixItems")
NAMED_SCHEMAS = ("$defs", "definitions")


class ToolsSearch(RateSearch):
    """Compresses the tools of a template at one rate. Its parts are their descriptions."""

    def __init__(
        self, compressor: Compressor, template: Template, rate: float, tokenizer: Any, config: CompressConfig
    ):
        super().__init__(compressor, Template("", (), template.tools), rate, tokenizer, config)
        found = [(i, *place) for i, tool in enumerate(template.tools) for place in _descriptions(json.loads(tool))]
        self.functions = [i for i, _, _ in found]  # of each description
        self.parts = [_Part(node["description"], config) for _, node, _ in found]
        # The later of two functions that are used alike goes first, and so does the later of two descriptions.
        uses = template.tool_uses or (0,) * len(template.tools)
        self.least_used = sorted(reversed(range(len(uses))), key=lambda i: uses[i])
        optional = [i for i in reversed(range(len(found))) if found[i][2]]
        self.optional = sorted(optional, key=lambda i: self.least_used.index(self.functions[i]))
        self.silent, self.gone = set[int](), set[int]()  # descriptions and functions that are left out

    def run(self) -> CompressedTemplate:
        """The closest result, with a note that names the functions which are left out."""
        if self.config.name == "none":
            return replace(self._result(self.template.text), note="none leaves tools whole")
        least = self._choose(self._compress(LEAST), Protection.ALWAYS)
        if self._draft(least).achieved <= self.rate:
            return super().run()
        texts = self._texts(least)

        def without(steps: int) -> CompressedTemplate:
            self._leave_out(steps)
            return self._result(self._render(texts))

        steps = range(len(self.optional) + len(self.least_used) + 1)
        first = bisect_left(steps, True, key=lambda n: without(n).achieved <= self.rate)
        best = min(without(max(0, first - 1)), without(first), key=self._error)
        if self._error(best) > self.config.tolerance:  # words of the others take the room of a function that went
            best = min(best, super().run(), key=self._error)
        kept = {tool["function"]["name"] for tool in split_tools(best.text)[1]}
        names = [json.loads(tool)["function"]["name"] for tool in self.template.tools]
        gone = [name for name in names if name not in kept]
        notes = [f"{len(gone)} of {len(names)} functions left out: {', '.join(gone)}"] if gone else []
        if self._error(best) > self.config.tolerance:
            notes.append(f"a function stays or goes as a whole, and {best.achieved:.2f} comes closest")
        return replace(best, note="; ".join(notes))

    def _leave_out(self, steps: int) -> None:
        """Leave out the first `steps` of: each optional parameter's description, then each function."""
        self.silent = set(self.optional[:steps])
        self.gone = set(self.least_used[: max(0, steps - len(self.optional))])

    def _compress(self, rate: float) -> tuple[str, ...]:
        """The text that the compressor leaves of each description.

        Descriptions of a function are one text, so that it knows more; one that would go as a whole is compressed by
        itself.
        """
        outputs = list[str]()
        for function in range(len(self.template.tools)):
            texts = [part.text for i, part in zip(self.functions, self.parts, strict=True) if i == function]
            whole = "\n".join(texts)
            left = self.compressor.compress(whole, rate).split() if whole else []
            kept = iter(words.find_kept_words(whole.split(), left))
            for text in texts:
                words_left = " ".join(word for word in text.split() if next(kept))
                outputs.append(words_left or self.compressor.compress(text, rate))
        return tuple(outputs)

    def _draft(self, choice: Choice) -> CompressedTemplate:
        return self._result(self._render(self._texts(choice)))

    def _render(self, texts: Sequence[str]) -> str:
        """The tools that are not gone, with `texts` as the descriptions of all; an empty one is left out."""
        tools, left = [], iter("" if i in self.silent else text for i, text in enumerate(texts))
        for i, source in enumerate(self.template.tools):
            tool = json.loads(source)
            for node, _ in list(_descriptions(tool)):
                node["description"] = next(left)
                if not node["description"]:
                    del node["description"]
            tools += [] if i in self.gone else [tool]
        return join_tools("", tools)


def _descriptions(tool: dict[str, Any]) -> Iterator[tuple[dict[str, Any], bool]]:
    """Each object of a tool that has a description, and whether that is one of an optional parameter."""
    function = tool["function"]
    if isinstance(function.get("description"), str):
        yield function, False
    yield from _in_schema(function.get("parameters"), False)


def _in_schema(schema: Any, optional: bool) -> Iterator[tuple[dict[str, Any], bool]]:
    """The same within a JSON schema; what stands below an optional parameter is optional too."""
    if not isinstance(schema, dict):
        return
    if isinstance(schema.get("description"), str):
        yield schema, optional
    required = schema["required"] if isinstance(schema.get("required"), list) else []
    properties = schema.get("properties")
    for name, inner in properties.items() if isinstance(properties, dict) else ():
        yield from _in_schema(inner, optional or name not in required)
    for key in ONE_SCHEMA:
        yield from _in_schema(schema.get(key), optional)
    several = [schema.get(key) for key in SCHEMAS]
    several += [list(found.values()) for key in NAMED_SCHEMAS if isinstance(found := schema.get(key), dict)]
    for inner in (inner for schemas in several if isinstance(schemas, list) for inner in schemas):
        yield from _in_schema(inner, optional)
