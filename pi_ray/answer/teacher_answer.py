"""The answer of a base model or a service to one query, before it becomes a row."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TeacherAnswer:
    """An answer, whether it ended within the limit, the share of views that give it, and the log-probability of its
    least sure token by the views' mean.
    """

    text: str
    ended: bool = True
    agreement: float = 1.0
    confidence: float = 0.0
