"""Collectives of training workers: hosts with other versions are refused by name."""

import pytest

from pi_ray.errors import TrainingError
from pi_ray.train import distributed
from pi_ray.train.distributed import WorkerGroup
from tests import workers


def versions_apart(other):
    """In a worker: the error where rank 1 has version `other` of torch."""
    group = WorkerGroup("cpu")
    own = distributed._version
    if group.rank == 1 and other:
        distributed._version = lambda package: other if package == "torch" else own(package)
        distributed.socket.gethostname = lambda: "gpu-node-7"
    try:
        group.refuse_other_versions(["torch", "peft", "no-such-package"])
    except TrainingError as error:
        return str(error)
    return ""


def test_a_host_with_another_version_is_named_on_every_worker():
    first, second = workers.run(2, versions_apart, "1.0")
    assert first == second and first.startswith("gpu-node-7 has torch 1.0 (not ")
    assert "install the same versions on every host" in first


def test_equal_hosts_and_a_worker_alone_are_let_in():
    assert workers.run(2, versions_apart, "") == ["", ""]
    assert versions_apart("") == ""


def test_a_package_that_is_missing_counts_as_a_version():
    assert distributed._version("no-such-package") == "none" != distributed._version("torch")


def test_one_worker_has_nobody_to_compare_with(monkeypatch):
    monkeypatch.setattr(distributed, "_version", lambda package: pytest.fail("asked") if package == "x" else "1")
    WorkerGroup("cpu").refuse_other_versions([])
