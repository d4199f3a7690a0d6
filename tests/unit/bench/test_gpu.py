"""The parts of `tests.bench.gpu` that a CPU can run too, and what it says where there is no GPU."""

import json
import subprocess
import sys

import pytest
import torch

from tests.bench import gpu


@pytest.mark.parametrize("part", ["evaluate", "latency", "serve"])
def test_a_part_runs_on_a_cpu_as_it_would_on_a_card(part, tiny_model, monkeypatch):
    monkeypatch.setattr(gpu, "PREFIX", 20)
    figures = gpu.PARTS[part](str(tiny_model), "cpu")
    assert all(value > 0 for value in figures.values())
    assert figures.get("tokens_as_on_cpu", 1) == 1, "the same device gives the same answers"
    assert figures.get("tokens_as_alone", 1) > 0.9


def test_equal_tokens_are_counted_at_their_places():
    assert gpu.share_of_equal([[1, 2, 3], [4]], [[1, 9, 3], [4], [7]]) == 0.75


def test_a_part_that_fails_says_why(tiny_model):
    found, why = gpu.run_part("quantize", str(tiny_model))
    assert torch.cuda.is_available() or (found is None and ("CUDA" in why or "NVIDIA" in why))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_ends_well():
    done = subprocess.run([sys.executable, "-m", "tests.bench.gpu"], capture_output=True, text=True, check=True)
    assert "there is no GPU here: 0 of 8 ran" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1]) == {"ran": 0, "parts": 8}
    wrong = subprocess.run([sys.executable, "-m", "tests.bench.gpu", "--only", "fast"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "no part fast" in wrong.stderr
