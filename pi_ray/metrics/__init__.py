"""Metrics of a user's own rows (`task.metric`): one file for each, and the scorer that applies those of a run file.

A row and an output enter, numbers from 0 to 1 leave. A task calls the scorer; evaluate/judge.py asks the judge.
"""

from pi_ray.metrics.exact_match import exact_match
from pi_ray.metrics.scorer import RowScorer

__all__ = ["RowScorer", "exact_match"]
