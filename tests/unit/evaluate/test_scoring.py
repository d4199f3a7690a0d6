"""Which rows of an evaluation are resampled together."""

import pytest

from pi_ray.config import RunConfig
from pi_ray.evaluate.scoring import clusters_of

IDS = ["ticket#1", "ticket#2", "other#1"]


@pytest.mark.parametrize(("task", "clusters"), [
    ({"name": "conversations"}, ["ticket", "ticket", "other"]),
    ({"name": "conversations", "learn": "last"}, None),  # the numbers are a user's own
    ({"name": "opsql"}, None),
])
def test_turns_of_a_conversation_are_one_cluster_where_every_turn_is_a_row(task, clusters):
    assert clusters_of(RunConfig.model_validate({"name": "a", "task": task}), IDS) == clusters
