"""The synthetic mixture of experts that `tests.bench.load` writes, and its measure of memory."""

import subprocess
import sys
from subprocess import PIPE

import torch
from transformers import AutoModelForCausalLM

from tests.bench import load


def test_its_checkpoint_is_a_mixtral_of_the_hub(tmp_path, monkeypatch):
    for name, value in {"HIDDEN": 32, "INNER": 64, "EXPERTS": 4, "HEADS": 4, "KV_HEADS": 2, "VOCABULARY": 50}.items():
        monkeypatch.setattr(load, name, value)
    size = load.write_checkpoint(tmp_path, 0.0001)
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.bfloat16)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert size == sum(p.numel() * 2 for p in model.parameters())
    assert model.model.layers[1].mlp.experts.gate_up_proj.std().item() > 0.01, "experts came from the files"


TAKES_64_MIB = """
import mmap
print("before", flush=True), input()
block = mmap.mmap(-1, 64 << 20)
block.write(bytes(range(256)) * (1 << 18))
print("after", flush=True), input()
"""


def test_memory_of_a_process_is_what_the_system_says():
    # A small process of its own: this one shares much of its memory with processes that come and go.
    with subprocess.Popen([sys.executable, "-c", TAKES_64_MIB], stdin=PIPE, stdout=PIPE, text=True) as process:
        assert process.stdout.readline() == "before\n"
        before, _ = load.pss(process.pid)
        process.stdin.write("\n"), process.stdin.flush()
        assert process.stdout.readline() == "after\n"
        after, files = load.pss(process.pid)
        process.stdin.write("\n")
    assert 60 << 20 < after - before < 80 << 20 and 0 < files < after
    assert load.pss(2**30) == (0.0, 0.0), "a process that has ended takes nothing"
