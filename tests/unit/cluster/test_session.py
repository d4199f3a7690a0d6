"""Joining Ray quietly: one known line is left out, everything else is heard. And which nodes do what."""

import os
import socket
from contextlib import nullcontext

import pytest
from pydantic import ValidationError

from pi_ray.cluster import session
from pi_ray.cluster.placement import describe_placement, training_scaling, worker_options
from pi_ray.cluster.session import _muted
from pi_ray.config import RunConfig
from pi_ray.errors import ClusterError, ConfigError
from tests.conftest import unset


def test_only_the_named_line_is_left_out_even_when_the_block_fails(capfd):
    with pytest.raises(RuntimeError), _muted("log level"):
        os.write(2, b"Set ray log level to 3\nno space left on device\n")
        raise RuntimeError
    assert capfd.readouterr().err == "no space left on device\n"
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"


@pytest.fixture
def rays_token(monkeypatch, tmp_path):
    """The file of Ray's token, which is there. No Ray is started or joined."""
    unset(monkeypatch, "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS")
    path = tmp_path / "auth_token"
    path.write_text("x" * 32)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    return path


@pytest.mark.parametrize("address", ["", "local"])
@pytest.mark.parametrize("mode", ["disabled", "Disabled", "token", ""])
def test_a_ray_of_this_process_has_a_token_whatever_the_environment_says(rays_token, monkeypatch, address, mode):
    from ray._private.authentication.authentication_token_setup import enable_token_auth_by_default

    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    session.connect()
    assert enable_token_auth_by_default(), "with which ray.init() starts a cluster"


@pytest.mark.parametrize("mode, there, refused", [
    ("disabled", True, True), ("", True, False), ("", False, True), ("token", True, False),
])  # fmt: skip
@pytest.mark.parametrize("address", ["10.1.2.3:6379", "ray://head.example:10001", "auto"])
def test_no_cluster_on_the_network_is_joined_without_authentication(
    rays_token, monkeypatch, address, mode, there, refused,
):
    monkeypatch.setenv("RAY_ADDRESS", address)
    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    if not there:
        rays_token.unlink()
    with pytest.raises(ClusterError, match="anyone who reaches that cluster") if refused else nullcontext():
        session.connect()
    assert refused or os.environ["RAY_AUTH_MODE"] == "token"


def test_a_cluster_of_this_machine_alone_may_be_open(rays_token, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    session.connect()
    assert os.environ["RAY_AUTH_MODE"] == "disabled"


@pytest.mark.parametrize("address, on_loopback", [("", True), ("local", True), ("127.0.0.1:6379", False)])
def test_a_ray_of_this_process_has_the_loopback_address(rays_token, monkeypatch, address, on_loopback):
    """Where its metrics, which name adapters, listen: Ray's agent takes the node's address, else every one."""
    from ray._private import ray_constants, services

    found = []
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray._private.worker._global_node", None)
    monkeypatch.setattr(services, "node_ip_address_from_perspective", lambda address: "192.0.2.7")
    monkeypatch.setattr("ray.init", lambda **options: found.append(services.get_node_ip_address()))
    before = ray_constants.ENABLE_RAY_CLUSTER
    session.connect()
    assert found == ["127.0.0.1" if on_loopback else "192.0.2.7"] and before == ray_constants.ENABLE_RAY_CLUSTER


@pytest.mark.parametrize("bound, alone", [("127.0.0.1", True), ("0.0.0.0", False)])
def test_a_head_that_answers_at_the_loopback_address_alone_is_told_from_others(monkeypatch, bound, alone):
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.2")  # stands for that on the network
    with socket.create_server((bound, 0)) as server:
        port = server.getsockname()[1]
        assert session._is_on_loopback_alone(f"127.0.0.1:{port}") is alone
        assert not session._is_on_loopback_alone(f"ray://127.0.0.1:{port}")
        assert not session._is_on_loopback_alone(f"10.1.2.3:{port}") and not session._is_on_loopback_alone("auto")
    assert not session._is_on_loopback_alone(f"127.0.0.1:{port}"), "nobody answers there"


@pytest.mark.parametrize("gone", [True, False])
def test_a_ray_that_the_network_would_see_is_refused_with_the_way_out(rays_token, monkeypatch, gone):
    """Where Ray has lost the switch, or no longer heeds it."""
    from ray._private import ray_constants

    ended = []
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda **options: None)
    monkeypatch.setattr("ray.shutdown", lambda: ended.append(True))
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "192.0.2.7")
    if gone:
        monkeypatch.delattr(ray_constants, "ENABLE_RAY_CLUSTER")
    with pytest.raises(ClusterError, match=r"ray start --head --node-ip-address=127\.0\.0\.1"):
        session.connect()
    assert ended == ([] if gone else [True])


def settings(workers=1, gpu="auto", **cluster) -> RunConfig:
    return RunConfig(name="demo", train={"workers": workers, "gpu": gpu, "batch_size": workers}, cluster=cluster)


def per_worker(config, *nodes) -> dict:
    return training_scaling(config, nodes)["resources_per_worker"]


@pytest.mark.parametrize("workers, nodes, cpus", [
    (1, [{"CPU": 2}], 2), (2, [{"CPU": 2}], 1), (4, [{"CPU": 2}], 0.5), (2, [{"CPU": 5}], 2),
    (1, [{"CPU": 2}, {"CPU": 8}, {"CPU": 4}], 8), (2, [{"CPU": 2}, {"CPU": 8}], 4), (3, [{"CPU": 2}, {"CPU": 8}], 2),
    (2, [{"CPU": 8}, {"CPU": 8}], 8),
])  # fmt: skip
def test_workers_share_cpus_as_the_nodes_can_hold_them(workers, nodes, cpus):
    assert per_worker(settings(workers), *nodes) == {"CPU": cpus}


def test_one_worker_has_one_gpu_and_its_share_of_that_nodes_cpus():
    head, cpu, gpu = {"CPU": 4}, {"CPU": 64}, {"CPU": 32, "GPU": 8}
    made = training_scaling(settings(8), [head, cpu, gpu])
    assert (
        made["resources_per_worker"] == {"GPU": 1, "CPU": 4}
        and made["use_gpu"]
        and made["placement_strategy"] == "PACK"
        and made["num_workers"] == 8
    )
    assert per_worker(settings(16), head, gpu, gpu) == {"GPU": 1, "CPU": 4}
    assert per_worker(settings(9), head, cpu, gpu) == {"CPU": 10}, "too few GPUs: auto takes CPUs"


def test_a_range_of_workers_is_rays_elastic_group():
    config = RunConfig.model_validate({
        "name": "a", "train": {"workers": [4, 16], "batch_size": 128, "resize_every_s": 5},
    })
    assert (config.train.min_workers, config.train.workers) == (4, 16)
    made = training_scaling(config, [{"CPU": 32, "GPU": 8}])
    assert made["num_workers"] == (4, 16) and made["elastic_resize_monitor_interval_s"] == 5
    assert made["use_gpu"], "as many GPUs as the least workers take"
    assert "4 to 16 training worker(s)" in describe_placement(config)
    with pytest.raises(ValidationError, match="the least comes first"):
        RunConfig.model_validate({"name": "a", "train": {"workers": [4, 2], "batch_size": 128}})


def test_a_cluster_that_is_still_to_grow_gets_gpus_where_run_yaml_asks_for_them():
    made = training_scaling(settings(8, train_resources={"GPU": 1}), [{"CPU": 4}])
    assert made["use_gpu"] and made["resources_per_worker"] == {"GPU": 1, "CPU": 1}


def test_resources_of_your_own_and_labels_bind_the_gang():
    config = settings(
        2, train_resources={"trainer": 0.5, "CPU": 3}, labels={"train": {"ray.io/accelerator-type": "A100"}}
    )
    made = training_scaling(config, [{"CPU": 64}, {"CPU": 8, "trainer": 1}])
    assert (
        made["resources_per_worker"] == {"trainer": 0.5, "CPU": 3}
        and made["label_selector"] == {"ray.io/accelerator-type": "A100"}
        and not made["use_gpu"]
    )
    assert per_worker(settings(2, train_resources={"trainer": 0.5}), {"CPU": 64}, {"CPU": 8, "trainer": 1}) == {
        "trainer": 0.5, "CPU": 4,
    }


@pytest.mark.parametrize("gpu, asked", [("auto", 0.5), (True, 2), (False, 1)])
def test_a_training_worker_has_exactly_one_gpu_or_none(gpu, asked):
    with pytest.raises(ConfigError, match="one GPU"):
        training_scaling(settings(1, gpu, train_resources={"GPU": asked}), [{"CPU": 8, "GPU": 4}])


def test_a_step_takes_what_run_yaml_asks_for_and_else_nothing_of_its_own():
    config = settings(
        prepare_resources={"CPU": 0.5, "highmem": 1}, evaluate_resources={"GPU": 0.5, "memory": 1e9},
        labels={"serve": {"pool": "serve"}},
    )
    assert worker_options(config, "prepare") == {"num_cpus": 0.5, "resources": {"highmem": 1}}
    assert worker_options(config, "evaluate") == {"num_gpus": 0.5, "memory": 1e9}
    assert worker_options(config, "serve") == {"label_selector": {"pool": "serve"}}
    assert worker_options(settings(), "prepare") == {}


def test_the_plan_says_in_one_sentence_where_each_step_runs():
    said = describe_placement(
        settings(
            8, train_resources={"GPU": 1, "CPU": 12}, prepare_resources={"CPU": 2},
            labels={"evaluate": {"pool": "a100"}},
        )
    )
    assert said.count(".") == 1 and "8 training worker(s) start together, all or none" in said
    assert (
        "GPU nodes, one worker a GPU (1 GPU, 12 CPU each)" in said
        and "prepare on nodes with 2 CPU for each worker" in said
        and "labelled pool=a100" in said
    )
