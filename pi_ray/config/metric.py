"""Block `task.metric`: how the answers to a user's own rows are scored, one entry for each metric."""

from typing import Annotated, Any

from pydantic import Field

from pi_ray.config.block import Amount, Block, forbid_unused, omit_default, refuse
from pi_ray.registry import metrics

SETTINGS: dict[str, tuple[str, ...]] = {  # metric -> the keys that it reads; one of a package may read any
    "exact_match": (), "normalized": (), "contains": (), "f1": (), "bleu": (), "rouge_l": (),
    "regex": ("pattern",), "number": ("tolerance", "relative_tolerance"), "choice": ("choices",),
    "json": ("fields", "file"), "tool_call": ("otherwise",), "python": ("file", "sandbox"),
    "judge": ("rubric", "model"),
}
NEEDED = {"regex": "pattern", "choice": "choices", "python": "file", "judge": "rubric"}
NO_LABEL = {"bleu", "python"}  # corpus BLEU is known by its name; a score file names its numbers itself
SIMPLE = tuple(name for name, keys in SETTINGS.items() if not keys)
LONGEST_PATTERN = 2_000  # characters
RESERVED = (  # names that a number of a report cannot have, since they mean something else there
    "bleu", "sentence_bleu", "token_accuracy", "label", "rows", "groups", "intervals", "input_tokens", "output_tokens",
    "prefix_tokens", "cut_off", "latency_s", "latency_cached_s", "latency_merged_s", "off_task_perplexity", "recited",
    "longest_run",
)


class MetricConfig(Block):
    """One metric. In a run file its name alone will do where it needs no settings: `metric: [number, f1]`."""

    name: str
    label: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$|^$")] = omit_default("", "its name in reports, where "
        "it is not the metric's, such as with the same metric twice")
    tolerance: Amount = omit_default(0.0, "number: distance from the answer that is accepted")
    relative_tolerance: Amount = omit_default(0.0, "number: the same as a share of the answer, such as 0.01")
    pattern: str = omit_default("", "regex: what is compared of output and answer: its first group, or all that it "
        "finds")
    choices: tuple[str, ...] = omit_default((), "choice: the answers that there are")
    fields: tuple[str, ...] = omit_default((), "json: the fields that count, such as name or address.city; none: all")
    file: str = omit_default("", "python: a file with score(row, output) -> {name: 0 to 1}; json: a JSON Schema that "
        "outputs must follow; relative to run.yaml")
    otherwise: str = omit_default("", "tool_call: the metric of rows whose answer calls no function, such as bleu; "
        "empty: the output must not call one either")
    sandbox: bool = omit_default(False, "python: run the file in the sandbox; 'pi-ray submit' sets it")
    rubric: str = omit_default("", "judge: what makes an answer good, in words")
    model: str = omit_default("", "judge: its model at the service of the block 'closed'; empty: closed.model")

    def model_post_init(self, context: Any) -> None:
        name = self.name
        refuse(reason := metrics.why_unknown(name), reason)
        known = SETTINGS.get(name)
        if known is not None:
            others = tuple(key for key in type(self).model_fields if key not in ("name", "label", *known))
            forbid_unused(self, others, "task.metric", f"{name} does not read it")
        needed = NEEDED.get(name, "")
        refuse(needed and not getattr(self, needed), f"{name} needs {needed}")
        refuse(self.label and name in NO_LABEL, f"{name} takes no label")
        refuse(self.label in RESERVED, f"the label '{self.label}' means something else in reports; take another")
        refuse(len(self.pattern) > LONGEST_PATTERN, f"a pattern has at most {LONGEST_PATTERN:,} characters")
        refuse(self.otherwise and self.otherwise not in SIMPLE, f"otherwise is one of {', '.join(SIMPLE)}")

    @property
    def key(self) -> str:
        """The name of its number in scores; "" for a score file, which names its numbers itself."""
        return "" if self.name == "python" else self.label or self.name

    @property
    def asks_service(self) -> bool:
        """Whether each score is paid for, so that it is computed in evaluations alone."""
        return self.name == "judge"


MetricEntries = str | MetricConfig | tuple[str | MetricConfig, ...]  # as a run file may have them


def as_metrics(value: Any) -> Any:
    """`exact_match` or `{name: number, ...}` alone -> a list; names in a list -> `{name: ...}`."""
    entries = list(value) if isinstance(value, (list, tuple)) else [value] if value else []
    return [{"name": entry} if isinstance(entry, str) else entry for entry in entries]


def check_metrics(entries: tuple[MetricConfig, ...]) -> None:
    """Raise ValueError for metrics that cannot stand together."""
    keys = [entry.key for entry in entries]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    refuse(twice == "", "task.metric has two score files; let one file give both numbers")
    refuse(twice, f"task.metric has '{twice}' twice; give one of them a label")
