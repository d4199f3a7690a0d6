"""The prompt guard of an adapter that was trained on conversations: it knows their system message and their tools.

- A request that has neither, or either or both as in training or in a compressed form of it, is the adapter's: they are
  taken away. White space in the system message does not count, nor do the order of the tools and of their keys. A
  system message that says no more than "You are a helpful assistant." counts as none.
- Values that vary may stand in the system message: they are put before the user's first text, as training has them.
- A request with another system message or other tools has drifted: the base model reads it as it came.
"""

import json
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

from pi_ray.conversation import split_tools
from pi_ray.store.prompt_guard import COURTESY
from pi_ray.store.varying_values import VaryingPrompt
from pi_ray.store.white_space import collapse_whitespace


class ConversationGuard:
    """Recognises the recurrent part of one adapter's conversations. `prompt` is the content of its prompt.json."""

    def __init__(self, prompt: dict[str, Any]):
        self.template: str = prompt["template"]
        forms = [split_tools(text) for text in (self.template, *(form["text"] for form in prompt["compressed"]))]
        self.tools = tuple(forms[0][1])
        self._systems = {collapse_whitespace(system) for system, _ in forms} | {""}
        self._varying = VaryingPrompt(forms[0][0], prompt.get("values", ()))
        self._tools = {_normalise(tools) for _, tools in forms} | {_normalise(())}

    def inspect(self, system: str, tools: Sequence[dict[str, Any]]) -> tuple[str, str]:
        """(kind, values) of a request with this system message, "" for none, and these tools.

        The kind is a GuardResult's; the values are lines that belong before the user's first text, "" for none.
        """
        if not system and not tools:
            return "internalised", ""
        text = collapse_whitespace(system)
        lines, filled = self._varying.take(system, whole=True) or ("", text)
        is_known = collapse_whitespace(filled) in self._systems or COURTESY.fullmatch(text)
        return ("stripped", lines) if is_known and _normalise(tools) in self._tools else ("drifted", "")


def _normalise(tools: Sequence[dict[str, Any]]) -> str:
    """The tools as a model is told of them, in any order. `strict` is for the server."""
    kept = [{k: v for k, v in tool["function"].items() if v is not None and k != "strict"} for tool in tools]
    return json.dumps(sorted(kept, key=itemgetter("name")), sort_keys=True)
