"""Which device is taken, and that training, generation and serving do on Apple's GPU nothing that it cannot do."""

import math

import pytest
import torch

from pi_ray.config import ModelConfig, ServeConfig
from pi_ray.errors import ConfigError
from pi_ray.models import device, load_model, model_dtype
from pi_ray.plan import estimate
from pi_ray.protocols import GenerationRequest
from pi_ray.serve.engine import engine, kv_cache
from pi_ray.train import replicas, sampling
from pi_ray.train.generation import generate_greedy, request_seconds
from pi_ray.train.trainer import train_worker
from tests.fake_mps import FakeMps
from tests.prepared import prepare_by_hand, tiny_config
from tests.unit.train.test_train import log_of, settings


@pytest.fixture
def apple(monkeypatch):
    """A Mac with a GPU, and macOS 14."""
    device.has_bfloat16.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: (major, minor) <= (14, 0))
    monkeypatch.setattr(torch.mps, "synchronize", lambda: None)
    yield
    device.has_bfloat16.cache_clear()


def test_the_fastest_device_is_taken(monkeypatch, apple):
    assert device.best_device() == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.best_device() == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert device.best_device() == "cpu"


@pytest.mark.parametrize("given, workers, backend, gpu, taken", [
    ("cpu", 1, "ddp", "auto", "mps"), ("cpu", 1, "ddp", True, "mps"), ("cpu", 1, "ddp", False, "cpu"),
    ("cpu", 2, "ddp", "auto", "cpu"), ("cpu", 1, "deepspeed", "auto", "cpu"), ("cuda:1", 1, "ddp", "auto", "cuda:1"),
])
def test_one_worker_without_deepspeed_trains_on_apples_gpu(apple, given, workers, backend, gpu, taken):
    assert device.training_device(given, workers, backend, gpu) == taken


def test_bfloat16_is_taken_where_the_gpu_has_it(apple, monkeypatch, tiny_model):
    auto = ModelConfig(base=str(tiny_model))
    assert model_dtype(auto, "mps") == model_dtype(auto, "cuda") == torch.bfloat16
    device.has_bfloat16.cache_clear()
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: False)
    assert model_dtype(auto, "mps") == torch.float32 and model_dtype(auto, "cuda") == torch.bfloat16
    with pytest.raises(ConfigError, match=r"bfloat16 needs macOS 14 on Apple's GPUs; take float32, or auto"):
        model_dtype(ModelConfig(base=str(tiny_model), dtype="bfloat16"), "mps")
    with pytest.raises(ConfigError, match="4bit needs a GPU with CUDA"):
        load_model(ModelConfig(base=str(tiny_model), quantize="4bit"), "mps")


def test_memory_is_what_the_device_has_left(apple, monkeypatch):
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 8 << 30)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 2 << 30)
    assert device.free_bytes(torch.device("mps")) == 6 << 30 and device.free_bytes(torch.device("cpu")) is None
    assert kv_cache.kv_cache_limit(ServeConfig(), torch.device("mps")) == 3 << 30


def test_training_gives_the_losses_of_the_cpu(apple, tiny_model, tmp_path):
    found = []
    for kind in ("cpu", "mps"):
        config = tiny_config(tiny_model, tmp_path / kind, **{"train.backend.name": "ddp", "model.dtype": "float32"})
        prepare_by_hand(config)
        with FakeMps() as fake:
            train_worker({**settings(config), "device": kind})
        assert (fake.moved > 0) == (kind == "mps")
        found.append([entry["loss"] for entry in log_of(config) if "loss" in entry])
    assert found[0] == found[1] and len(found[0]) > 3


def test_a_teacher_and_evaluation_generate_and_are_timed(apple, tiny_model):
    plain = load_model(ModelConfig(base=str(tiny_model)))
    expected = generate_greedy(plain, [5, 6], [[7, 8], [9]], 4, -1)
    with FakeMps() as fake:
        model = replicas.load_for_generation(ModelConfig(base=str(tiny_model), dtype="float32"))
        assert fake.moved and generate_greedy(model, [5, 6], [[7, 8], [9]], 4, -1) == expected
        assert request_seconds(model, [5, 6], [7], new_tokens=2) > 0


def test_the_server_loads_its_model_there(apple, tiny_model, monkeypatch):
    asked = []

    def load(model, device):
        asked.append((model.dtype, device))
        return load_model(model.model_copy(update={"dtype": "float32"}), "cpu")

    monkeypatch.setattr(engine, "load_model", load)
    engine.TransformersEngine(ModelConfig(base=str(tiny_model)), ServeConfig()).close()
    assert asked == [("auto", "mps")]


class OnMps:
    """Logits as a GPU without float64 has them."""

    device = torch.device("mps")

    def __init__(self, values):
        self.values = values

    def cpu(self):
        return self.values


def test_sampling_needs_no_float64_on_the_gpu():
    logits, request = torch.tensor([[0.0, 1.0, 3.0, 0.5]]), GenerationRequest([0], 1, "", 1.0, 0.9, 7)
    here, there = (sampling._draw(given, [sampling.Sampler(request)], True) for given in (logits, OnMps(logits)))
    assert here == there


def test_the_plan_measures_apples_gpu(apple, tiny_model, tmp_path):
    config = tiny_config(tiny_model, tmp_path)
    with FakeMps():
        speed = estimate.measure_speed(config)
    assert speed.device == "cpu" and speed.name == "Apple's GPU" and math.isfinite(speed.operations)
    assert estimate.measure_speed(config.replace(**{"train.gpu": False})).name.startswith("this CPU")


@pytest.mark.parametrize(("limit", "used", "reclaimed"), [
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
])
def test_a_containers_limit_bounds_the_memory_that_is_left(tmp_path, monkeypatch, limit, used, reclaimed):
    monkeypatch.setattr(device, "CGROUPS", [(tmp_path, limit, used, reclaimed)])
    machine = device.free_host_bytes()
    assert machine > 1 << 20, "no container"
    (tmp_path / limit).write_text("1000000\n")
    (tmp_path / used).write_text("700000\n")
    (tmp_path / "memory.stat").write_text(f"anon 500000\n{reclaimed} 200000\n")
    assert device.free_host_bytes() == 500_000
    (tmp_path / used).write_text("1300000\n")
    assert device.free_host_bytes() == 0
    (tmp_path / limit).write_text("max\n" if limit == "memory.max" else f"{1 << 62}\n")
    assert device.free_host_bytes() > 1 << 20
