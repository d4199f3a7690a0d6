"""Fixtures that many tests share: tiny random models with a real tokenizer, and one local Ray."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

UNIT, CLUSTER = (Path(__file__).parent / name for name in ("unit", "cluster"))

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "0")  # a node's last 30 s, in which nobody asks anything
if "PYTEST_XDIST_WORKER" in os.environ:  # processes side by side: more threads than cores would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("LOKY_MAX_CPU_COUNT", "1")  # joblib's count, by which evaluation takes its threads


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log) -> Any:
    """Give tests to `pytest -n 2`'s processes file by file, since tests of a file share fixtures, in the order of
    "testpaths": those that start Ray come last, since it stays in their process, and some unit tests want none.

    Clusters and servers have ports and times to keep, so that one process has all of these.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            name = nodeid.partition("::")[0]
            file = config.rootpath / name
            serves = "serve" in file.name and not file.is_relative_to(UNIT)
            return "clusters and servers" if serves or file.is_relative_to(CLUSTER) else name

    config.option.loadscopereorder = False  # by size
    return ByFile(config, log)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A random Llama of 2 layers and width 32 with SmolLM2's tokenizer, as a folder that `model.base` can name."""
    return tiny(tmp_path_factory.mktemp("tiny-llama"), "Llama")


@pytest.fixture(scope="session")
def tiny_mixtral(tmp_path_factory) -> Path:
    """A random Mixtral like `tiny_model`: each layer has 4 experts, and a token uses 2 of them."""
    return tiny(tmp_path_factory.mktemp("tiny-mixtral"), "Mixtral", num_local_experts=4, num_experts_per_tok=2)


def tiny(folder: Path, family: str, **settings) -> Path:
    """A random model of `family` with SmolLM2's tokenizer in `folder`."""
    import torch
    import transformers

    from pi_ray.config import ModelConfig
    from pi_ray.models import load_tokenizer

    tokenizer = load_tokenizer(ModelConfig())
    torch.manual_seed(0)
    shape = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }
    config = getattr(transformers, f"{family}Config")(**{**shape, **settings})
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def unset(monkeypatch, *names: str) -> None:
    """Remove environment variables until the test ends, whatever the code under test sets meanwhile.

    `monkeypatch.delenv(name, raising=False)` alone remembers nothing about a missing variable: a value that the code
    sets would stay for all later tests.
    """
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def ray_local():
    """One Ray on this machine for all Ray tests."""
    import ray

    from pi_ray.cluster import session

    session.connect()
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def joining(ray_local) -> dict[str, str]:
    """Variables with which a command joins the Ray of `ray_local`, as a person on a cluster does, in place of starting
    one, which takes some 20 s of the processor.
    """
    return {"RAY_ADDRESS": ray_local.get_runtime_context().gcs_address, "RAY_AUTH_MODE": "token"}
