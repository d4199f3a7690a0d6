"""Summary of `pi-ray init --from`: what was found, what recurs and what that would save, and what was left out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pi_ray.config import CostConfig
from pi_ray.progress import format_money
from pi_ray.protocols import SPLITS
from pi_ray.request_log.rows import QUERIES
from pi_ray.request_log.task import LoggedTask

MOST_OTHERS = 5  # prompts that are named
PERSONAL = (
    "These files hold what your users wrote, as it was logged. Whether it may be used, and what must be taken out "
    "first, such as names, is for you to decide: pi-ray takes nothing out, and an adapter can repeat what it has read."
)


def describe_logged_task(task: LoggedTask, log: Path) -> Iterator[str]:
    """Sentences for people, one a line."""
    rows = ", ".join(f"{task.split.rows[name]:,} {name}" for name in (*SPLITS, QUERIES) if name in task.split.rows)
    yield f"{log}: {task.requests:,} requests; lines that cannot be used: {task.rejected:,}"
    for reject in task.rejects:
        yield f"  line {reject.line}: {reject.reason}"
    if task.rejected > len(task.rejects):
        yield "  and so on; rejects.jsonl has all of them"
    yield f"Prompt: {task.prompt.describe()}"
    if names := task.prompt.value_names:
        head = "\n".join(f"{name}: ..." for name in names)
        yield f"  Values that vary stand before each query: send them in the user's first text too, as {head!r}"
    if task.prompt.loses_text:
        yield "  template.md lacks some of it: HTML comments and a line '# Documents' mean something else there"
    near = f"; left out as near copies of held-out ones: {task.split.near_copies:,}" if task.split.near_copies else ""
    yield f"Rows: {rows}{near}"
    if task.others or task.foreign:
        yield f"Left out: requests of {_others(task)}"
    (recurrent, whole), requests, price = task.tokens, task.split.requests, CostConfig()
    saved = recurrent * requests
    costs = [format_money(amount, price.currency) for amount in (price.input, saved / 1e6 * price.input)]
    yield f"Recurrent: {recurrent:,} of the {whole:,.0f} tokens of a mean request, {recurrent / whole:.0%}"
    yield (
        f"  Without them the {requests:,} requests that these rows stand for send {_millions(saved)} tokens less: "
        f"{costs[1]} at {costs[0]} a million (cost.input)"
    )
    yield PERSONAL


def _others(task: LoggedTask) -> str:
    named = [f"{count:,} of {prompt.begins!r}" for prompt, count in task.others[:MOST_OTHERS]]
    if more := sum(count for _, count in task.others[MOST_OTHERS:]) + task.foreign:
        named.append(f"{more:,} of other prompts")
    return ", ".join(named) + "; for another prompt, give a log of its requests alone"


def _millions(tokens: float) -> str:
    return f"{tokens / 1e6:,.1f} million" if tokens >= 1e6 else f"{tokens:,.0f}"
