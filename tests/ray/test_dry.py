"""A dry run of a run file for a mixture of experts under ZeRO-3, as a person starts it."""

import shlex

import pytest
from test_main_job import REPO, shell

from pi_ray.config import ModelConfig
from pi_ray.models import load_tokenizer
from tests.unit.experiments.test_full_tables import data

pytestmark = pytest.mark.ray


def test_every_step_of_a_mixtral_run_works_in_small(tmp_path, tiny_model, joining):
    from transformers import MixtralConfig

    MixtralConfig(sliding_window=None).save_pretrained(tmp_path / "mixtral")
    load_tokenizer(ModelConfig(base=str(tiny_model))).save_pretrained(tmp_path / "mixtral")
    overrides = [
        f"model.base={tmp_path / 'mixtral'}", f"task.folder={data('nl2bash')}", "train.workers=16",
        "train.micro_batch=0", "train.backend={name: deepspeed, zero_stage: 3}", "train.gradient_checkpointing=true",
        "evaluate.baseline=false",
    ]
    run = REPO / "jobs" / "paper" / "full" / "nl2bash.yaml"
    out = shell(f"pi-ray run {run} --dry {' '.join(map(shlex.quote, overrides))}", tmp_path, timeout=600, **joining)
    assert "a tiny random model like" in out and "selective in place of llmlingua2" in out
    assert "phase 2 done" in out and "Published" in out
    assert out.rstrip().endswith("every step works")
    assert not (REPO / "runs" / "nl2bash-full").exists() and not list(tmp_path.glob("runs"))
