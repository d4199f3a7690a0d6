"""Reference answers that a teacher wrote, not people: what the report says of them (run/answered.py has the facts)."""

from collections.abc import Iterator
from typing import Any

from pi_ray.protocols import SPLITS
from pi_ray.run.answered import reference_teacher


def is_own_teacher(summary: dict[str, Any]) -> bool:
    """Whether the base model with the full prompt wrote the reference answers, and agrees with itself."""
    return reference_teacher(summary).get("by") == "base"


def name_teacher(facts: dict[str, Any]) -> str:
    """The teacher within a sentence."""
    return "the base model that reads the full prompt" if facts["by"] == "base" else f"its teacher {facts['teacher']}"


def answered_sentence(facts: dict[str, Any]) -> str:
    """Say where rows come from that a teacher made: `facts` are those of run/answered.py."""
    asked, kept = sum(facts["asked"].values()), sum(facts["kept"].values())
    agreed = f" and were the same in all {facts['views']} orders of the prompt" if facts["views"] > 1 else ""
    rows = ", ".join(f"{facts['kept'][split]:,} {split}" for split in SPLITS if split in facts["kept"])
    labelled = f", beside {facts['labelled']:,} labelled ones" if facts["labelled"] else ""
    return (
        f"The rows come from {facts['queries']:,} queries without answers{labelled}: {facts['teacher']} with the whole "
        f"prompt was asked {asked:,} of them, and {kept:,} answers ended in time{agreed} ({rows})."
    )


def teacher_caveats(facts: dict[str, Any], split: str) -> Iterator[str]:
    """The limits of a measurement against a teacher's answers, one sentence each."""
    yield "Agreement with the teacher is measured, not truth: where the teacher is wrong, its mistake counts as right."
    if left := facts["asked"][split] - facts["kept"][split]:
        why = "its answer differed between orders of the prompt or never ended" if facts["views"] > 1 else (
            "its answer never ended")
        yield f"{left:,} of {facts['asked'][split]:,} held-out queries have no reference and are not measured: {why}."
    if facts["by"] == "base":
        yield "The base model with the full prompt wrote the reference answers, so its own agreement is no result."
