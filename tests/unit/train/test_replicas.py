"""Copies of the base model that generate: how many GPUs each takes, and Ray's options of its actor."""

from types import SimpleNamespace

import pytest
import torch

from pi_ray.config import RunConfig
from pi_ray.errors import ConfigError
from pi_ray.models import load_model
from pi_ray.train import replicas
from pi_ray.train.base_size import base_size
from pi_ray.train.replicas import check_replica, generation_workers, load_for_generation, replica_bytes, replica_gpus


@pytest.fixture
def mixtral(tmp_path):
    """A function: the config of a run on GPUs with Mixtral-8x7B, of which there is config.json alone."""
    from transformers import MixtralConfig

    MixtralConfig(sliding_window=None).save_pretrained(tmp_path)

    def config(**keys):
        return RunConfig(name="large").replace(**{"model.base": str(tmp_path), "train.gpu": True, **keys})

    return config


def test_mixtral_takes_two_gpus_of_80_gib_by_a_calculation_by_hand(mixtral):
    held = replica_bytes(mixtral())
    assert base_size(mixtral().model).cached == 2 * 8 * 128 * 32
    assert held["base weights"] == 46_702_792_704 * 2, "86.99 GiB"
    assert held["keys and values"] == 16_384 * 2 * 1024 * 32 * 2, "2 GiB"
    assert held["adapters"] == pytest.approx(0.02 * 46_702_792_704 * 2)
    assert replica_gpus(mixtral()) == 2
    assert replica_gpus(mixtral(**{"cluster.gpu_memory_gib": 40})) == 4, "three would do, and tensors are halved"
    assert replica_gpus(mixtral(**{"cluster.gpu_memory_gib": 141})) == 1, "an H200"


def test_four_bits_leave_what_is_not_a_linear_layer(mixtral):
    size, attention = base_size(mixtral().model), 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024)
    assert size.linear == attention, "experts are fused, and the router is none of torch's layers"
    quantised = mixtral(**{"model.quantize": "4bit"})
    assert replica_bytes(quantised)["base weights"] == pytest.approx(
        replicas.base_size(quantised.model).weights * 2 - attention * (2 - 0.516)
    )


def test_a_number_in_the_run_file_comes_first(mixtral):
    assert replica_gpus(mixtral(**{"cluster.gpus_per_replica": 8})) == 8


def test_a_smaller_gpu_of_this_machine_counts(mixtral, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(total_memory=(48 - i) << 30))
    assert replicas.gpu_gib(mixtral()) == 47 and replica_gpus(mixtral()) == 4
    assert replicas.gpu_gib(mixtral(**{"cluster.gpu_memory_gib": 24})) == 24


def test_a_base_that_no_node_holds_is_refused_with_the_smallest_cluster_that_would_do(mixtral):
    small = mixtral(**{"cluster.gpus_per_node": 2, "cluster.gpu_memory_gib": 24})
    with pytest.raises(ConfigError) as error:
        check_replica(small)
    for words in ("takes 91 GiB", "8 GPUs of 24 GiB", "a node has 2", "a node of 8 such GPUs", "model.quantize: 4bit"):
        assert words in str(error.value)
    check_replica(small.replace(**{"train.gpu": False}))
    check_replica(small.replace(**{"model.base": "/elsewhere"}))  # its size is known on the cluster alone


@pytest.mark.parametrize("nodes, workers", [
    ([{"CPU": 8.0, "GPU": 8.0}, {"CPU": 8.0, "GPU": 8.0}], 8),
    ([{"CPU": 8.0, "GPU": 3.0}, {"CPU": 8.0, "GPU": 1.0}, {"CPU": 64.0}], 1),  # a copy does not lie on two nodes
])
def test_as_many_actors_as_the_gpus_of_single_nodes_hold(mixtral, nodes, workers):
    assert generation_workers(mixtral(), nodes) == (workers, {"num_gpus": 2})
    assert generation_workers(mixtral(), nodes, actors=1) == (1, {"num_gpus": 2})


def test_nodes_with_too_few_gpus_are_named(mixtral):
    with pytest.raises(ConfigError, match=r"over 2 GPUs of a node \(cluster.gpus_per_replica\), and the largest node"):
        generation_workers(mixtral(), [{"GPU": 1.0, "CPU": 4.0}] * 4)


def test_a_node_without_gpus_gives_almost_all_of_its_cpus(mixtral):
    for gpu in ("auto", False):
        config = mixtral(**{"train.gpu": gpu})
        assert generation_workers(config, [{"CPU": 4.0}, {"CPU": 16.0}]) == (1, {"num_cpus": 15})
        assert generation_workers(config, [{"CPU": 1.0}]) == (1, {"num_cpus": 1})


def test_gpus_that_the_run_file_is_sure_of_are_asked_for_before_their_node_is_there(mixtral):
    assert generation_workers(mixtral(), [{"CPU": 16.0}]) == (1, {"num_gpus": 2})
    assert generation_workers(mixtral(), [{"CPU": 16.0}], actors=3) == (3, {"num_gpus": 2})


def test_what_the_run_file_asks_for_is_taken_as_it_is(mixtral):
    config = mixtral(**{"cluster.evaluate_resources": {"GPU": 4, "CPU": 2}})
    assert generation_workers(config, [{"GPU": 8.0, "CPU": 64.0}], actors=1) == (1, {"num_gpus": 4, "num_cpus": 2})
    assert generation_workers(config, [{"GPU": 8.0, "CPU": 64.0}] * 2)[0] == 4


def test_an_actor_with_several_gpus_spreads_the_base_over_them(monkeypatch):
    calls = []
    monkeypatch.setattr(replicas, "load_model", lambda *args, **keys: calls.append((args[1:], keys)))
    for gpus in (0, 1, 2):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpus=gpus: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        load_for_generation(RunConfig(name="large").model)
    assert calls == [(("cpu",), {}), (("cuda",), {}), (("cuda",), {"spread": True})]


def test_a_base_that_is_spread_stays_where_accelerate_put_it(monkeypatch, tiny_model):
    from transformers import AutoModelForCausalLM

    own, seen = AutoModelForCausalLM.from_pretrained, {}
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained",
        lambda *args, **keys: seen.update(keys) or own(*args, **{**keys, "device_map": "cpu"}),
    )
    model = load_model(RunConfig(name="large").replace(**{"model.base": str(tiny_model)}).model, "cuda", spread=True)
    assert seen["device_map"] == "balanced" and model.device.type == "cpu"
