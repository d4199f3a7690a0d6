"""Registries: name -> implementation, for the seven kinds of part in protocols.py, imported when it is looked up.

A part is a line `"name": "module:attribute"` below, or an entry point in the group `pi_ray.<kind>` of an installed
package.
"""

from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from pi_ray.errors import ConfigError


class Registry:
    """The parts of one kind. `registry["name"]` imports and returns a part; `names()` lists all names."""

    def __init__(self, kind: str, parts: dict[str, str]):
        self.kind, self._parts = kind, parts

    def _all(self) -> dict[str, str]:
        return {**{e.name: e.value for e in entry_points(group=f"pi_ray.{self.kind}")}, **self._parts}

    def names(self) -> list[str]:
        return sorted(self._all())

    def why_unknown(self, name: str) -> str:
        """Why there is no such part, with the closest name; "" where there is one."""
        if name in self._parts or name in (parts := self._all()):
            return ""
        close = get_close_matches(name, parts, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"there are: {', '.join(sorted(parts))}"
        return f"no {self.kind} named '{name}'; {hint}"

    def __getitem__(self, name: str) -> Any:
        if reason := self.why_unknown(name):
            raise ConfigError(reason)
        module, _, attribute = self._all()[name].partition(":")
        return getattr(import_module(module), attribute)


tasks = Registry("task", {
    "jsonl": "pi_ray.tasks.jsonl:JsonlTask",
    "conversations": "pi_ray.tasks.conversations:ConversationsTask",
    "opsql": "pi_ray.tasks.opsql.task:OpsqlTask",
    "nl2bash": "pi_ray.tasks.nl2bash:Nl2BashTask",
    "mbpp": "pi_ray.tasks.mbpp:MbppTask",
    "nl2f": "pi_ray.tasks.nl2f:Nl2fTask",
    "nl2f-w": "pi_ray.tasks.nl2f_w:Nl2fWTask",
    "desk": "pi_ray.tasks.desk:DeskTask",
})
metrics = Registry("metric", {
    "exact_match": "pi_ray.metrics.exact_match:ExactMatch",
    "normalized": "pi_ray.metrics.normalized:Normalized",
    "contains": "pi_ray.metrics.contains:Contains",
    "regex": "pi_ray.metrics.regex:RegexMatch",
    "number": "pi_ray.metrics.number:NumberMatch",
    "choice": "pi_ray.metrics.choice:ChoiceMatch",
    "f1": "pi_ray.metrics.f1:WordF1",
    "bleu": "pi_ray.metrics.bleu:SentenceBleu",
    "rouge_l": "pi_ray.metrics.rouge_l:RougeL",
    "json": "pi_ray.metrics.json_fields:JsonFields",
    "tool_call": "pi_ray.metrics.tool_call:ToolCallMatch",
    "python": "pi_ray.metrics.python:ScoreFile",
    "judge": "pi_ray.metrics.judge:JudgeRubric",
})
compressors = Registry("compressor", {
    "llmlingua": "pi_ray.compress.llmlingua:LLMLingua",
    "longllmlingua": "pi_ray.compress.longllmlingua:LongLLMLingua",
    "llmlingua2": "pi_ray.compress.llmlingua2:LLMLingua2",
    "selective": "pi_ray.compress.selective:SelectiveContext",
    "generation": "pi_ray.compress.generation:GenerationCompressor",
    "none": "pi_ray.compress.none:NoCompression",
})
encoders = Registry("encoder", {
    "ngram": "pi_ray.retrieve.encoders:NgramEncoder",
    "sentence-transformers": "pi_ray.retrieve.encoders:SentenceEncoder",
})
schedules = Registry("schedule", {
    "linear": "pi_ray.schedule:linear",
    "exp": "pi_ray.schedule:exp",
    "inverse-exp": "pi_ray.schedule:inverse_exp",
    "constant": "pi_ray.schedule:constant",
    "list": "pi_ray.schedule:explicit",
})
backends = Registry("backend", {
    "deepspeed": "pi_ray.train.backends:DeepSpeedBackend",
    "ddp": "pi_ray.train.backends:DdpBackend",
})
engines = Registry("engine", {
    "transformers": "pi_ray.serve.engine.engine:TransformersEngine",
    "vllm": "pi_ray.serve.engine.vllm:VllmEngine",
})
KINDS = {r.kind: r for r in (tasks, metrics, compressors, encoders, schedules, backends, engines)}
