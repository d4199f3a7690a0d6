"""Base models: how long a text each can read, whatever its config calls that."""

import pytest
import transformers

from pi_ray.config import ModelConfig
from pi_ray.models import NO_LIMIT, context_length


@pytest.mark.parametrize(("family", "settings", "length"), [
    ("Llama", {"max_position_embeddings": 77}, 77),
    ("GPT2", {"n_positions": 77}, 77),
    ("Bloom", {"seq_length": 77}, 77),
    ("Bloom", {}, NO_LIMIT),
    ("Mpt", {"max_seq_len": 77}, 77),
    ("Mamba", {}, NO_LIMIT),
    ("Gemma3", {"text_config": {"max_position_embeddings": 77}}, 77),
])  # fmt: skip
def test_the_context_is_found_under_each_familys_own_name(family, settings, length, tmp_path):
    getattr(transformers, f"{family}Config")(**settings).save_pretrained(tmp_path)
    assert context_length(ModelConfig(base=str(tmp_path))) == length
