"""The vLLM engine without vLLM: what Ray's LLM deployment is given, what is read of its answers, and what is said where
it is not installed.

tests/ray/test_serve.py runs against vLLM itself where it and a GPU are there.
"""

import asyncio
import importlib.util
import json
import sys
from contextlib import aclosing
from functools import partial
from types import SimpleNamespace

import psutil
import pytest
import ray
from ray.exceptions import RayTaskError

from pi_ray.config import ModelConfig, RunConfig, ServeConfig
from pi_ray.errors import AdapterError, ConfigError, MissingExtraError
from pi_ray.protocols import GenerationRequest, Token
from pi_ray.registry import engines
from pi_ray.serve.engine import vllm
from pi_ray.serve.engine.refusal import RefusedError
from pi_ray.store.adapters import AdapterStore, StoreUnavailableError
from tests.lora import put_in_store, rewrite


@pytest.fixture(scope="module")
def store(tiny_model, tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    put_in_store(store, "colours", tiny_model)
    put_in_store(store, "shapes", tiny_model, seed=2)
    return store


def config(store, tiny_model, model=None, **limits):
    return RunConfig(
        name="t", store=str(store), model=ModelConfig(base=str(tiny_model), **(model or {})),
        serve=ServeConfig(engine="vllm", **limits),
    )


def test_the_options_come_from_the_store_and_the_serve_block(store, tiny_model):
    found = vllm.llm_config_arguments(
        config(store, tiny_model, max_loras=8, max_ongoing_requests=32, min_replicas=0, max_replicas=3)
    )
    assert found["engine_kwargs"] == {
        "dtype": "bfloat16", "trust_remote_code": False, "max_num_seqs": 32, "enable_prefix_caching": True,
        "enable_lora": True, "max_loras": 3, "max_cpu_loras": 8, "max_lora_rank": 32, "tensor_parallel_size": 1,
        "structured_outputs_config": {"backend": "guidance"},
    }  # fmt: skip
    assert found["lora_config"] == {"max_num_adapters_per_replica": 8}
    assert (
        found["deployment_config"]["max_ongoing_requests"] == 32
        and "max_queued_requests" not in found["deployment_config"]
    )
    assert found["deployment_config"]["autoscaling_config"]["max_replicas"] == 3
    assert found["runtime_env"]["env_vars"]["VLLM_NO_USAGE_STATS"] == "1"
    assert found["model_loading_config"]["model_source"] == str(tiny_model)


def test_on_cpus_it_asks_for_the_cpu_of_its_worker_alone_and_binds_no_thread(store, tiny_model):
    found = vllm.llm_config_arguments(config(store, tiny_model), on_cpus=True)
    assert found["accelerator_config"] == {"kind": "cpu"}
    assert found["deployment_config"]["ray_actor_options"] == {"num_cpus": 0}
    assert found["runtime_env"]["env_vars"]["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert found["engine_kwargs"]["dtype"] == "float32"  # as all models of this width
    assert 0 < found["engine_kwargs"]["kv_cache_memory_bytes"] <= psutil.virtual_memory().total / 4
    asked = config(store, tiny_model).replace(**{"cluster.serve_resources": {"CPU": 4}})
    assert vllm.llm_config_arguments(asked, on_cpus=True)["deployment_config"]["ray_actor_options"] == {"num_cpus": 4}


def test_a_base_of_several_gpus_is_split_over_them(store, tiny_model):
    run = config(store, tiny_model).replace(**{"cluster.gpus_per_replica": 4})
    assert vllm.llm_config_arguments(run)["engine_kwargs"]["tensor_parallel_size"] == 4


def test_the_options_are_those_that_the_installed_ray_knows(store, tiny_model):
    from ray import serve
    from ray.llm._internal.serve.core.configs.llm_config import LLMConfig, LoraConfig, ModelLoadingConfig

    found = vllm.llm_config_arguments(config(store, tiny_model))
    made = LLMConfig(**found)
    assert made.multiplex_config().max_num_models_per_replica == 16
    assert set(found["lora_config"]) <= set(LoraConfig.model_fields) and set(found["model_loading_config"]) <= set(
        ModelLoadingConfig.model_fields
    )
    serve.deployment(type("D", (), {}), **found["deployment_config"])  # raises for an option that Serve does not have


def test_the_lora_rank_is_rounded_up_to_a_supported_one_and_refused_adapters_are_ignored(tiny_model, tmp_path):
    folder = put_in_store(tmp_path, "colours", tiny_model)
    run = RunConfig(
        name="t", store=str(tmp_path), model=ModelConfig(base=str(tiny_model)), train={"lora": {"rank": 33}}
    )
    assert vllm.llm_config_arguments(run)["engine_kwargs"]["max_lora_rank"] == 64
    adapter = json.loads((folder / "adapter_config.json").read_text())
    rewrite(folder, "adapter_config.json", {**adapter, "r": 4000})  # its matrices say otherwise
    assert vllm.llm_config_arguments(run)["engine_kwargs"]["max_lora_rank"] == 64
    with pytest.raises(ConfigError, match="rank 600"):
        vllm.llm_config_arguments(run.replace(**{"train.lora.rank": 600, "serve.max_lora_rank": 1024}))


def test_the_deployment_itself_asks_for_no_gpu(store, tiny_model):
    run = config(store, tiny_model).replace(**{"cluster.serve_resources": {"CPU": 4, "GPU": 1, "server": 1}})
    assert vllm.llm_config_arguments(run)["deployment_config"]["ray_actor_options"] == {
        "num_cpus": 4, "resources": {"server": 1},
    }


def test_the_room_for_keys_and_values_is_passed_on(store, tiny_model):
    for on_cpus in (False, True):
        found = vllm.llm_config_arguments(config(store, tiny_model, kv_cache_mb=300), on_cpus)
        assert found["engine_kwargs"]["kv_cache_memory_bytes"] == 300 << 20


def test_merge_is_refused_and_quantisation_revision_and_prefix_cache_are_passed_on(store, tiny_model):
    with pytest.raises(ConfigError, match=r"serve\.merge"):
        vllm.llm_config_arguments(config(store, tiny_model, merge="colours"))
    quantized = config(store, tiny_model, {"quantize": "4bit", "revision": "abc"}, prefix_cache_mb=0)
    assert vllm.llm_config_arguments(quantized)["engine_kwargs"].items() >= {
        "quantization": "bitsandbytes", "revision": "abc", "enable_prefix_caching": False,
    }.items()  # fmt: skip


@pytest.mark.skipif(
    importlib.util.find_spec("vllm") is not None, reason="vLLM is installed: tests/ray/test_serve.py runs it"
)
def test_without_vllm_the_error_says_what_to_install(store, tiny_model):
    with pytest.raises(MissingExtraError, match=r"pip install 'pi-ray\[vllm\]'.*GPU"):
        engines["vllm"].deployment(config(store, tiny_model))


def test_gpus_may_be_on_nodes_that_are_still_to_come(store, tiny_model, monkeypatch):
    def build(arguments, **keys):
        return arguments

    monkeypatch.setitem(sys.modules, "ray.serve.llm", SimpleNamespace(LLMConfig=dict, build_llm_deployment=build))
    monkeypatch.setattr(vllm.vllm_options, "is_for_cpus", lambda: False)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    run = config(store, tiny_model)
    with pytest.raises(ConfigError, match="needs a GPU, and the cluster has none"):
        engines["vllm"].deployment(run)
    for keys in ({"train.gpu": True}, {"cluster.serve_resources": {"GPU": 1}}):
        assert engines["vllm"].deployment(run.replace(**keys))["engine_kwargs"]


def test_only_verified_folders_reach_vllm(store, tiny_model):
    loader = partial(vllm.VerifiedDownloader, str(store), ModelConfig(base=str(tiny_model)), 64)(
        download_timeout_s=1, max_tries=1
    )
    hashes = [AdapterStore(store).open(name).hash for name in ("colours", "shapes")]
    first, second = (
        asyncio.run(loader.load_model_from_config(f"{name}@v0001#{found}", None))
        for name, found in zip(("colours", "shapes"), hashes, strict=True)
    )
    assert first.local_path == str(store / "colours" / "v0001")
    request = GenerationRequest([1], 1, first.local_path, adapter_hash=hashes[0])
    assert vllm.adapter_id(request) == first.model_id == f"colours@v0001#{hashes[0]}"
    assert first.lora_assigned_int_id != second.lora_assigned_int_id
    with pytest.raises(StoreUnavailableError, match="replaced"):
        asyncio.run(loader.load_model_from_config(f"colours@v0001#{hashes[1]}", None))
    for name in ("unknown@v0001", "../colours", "s3://bucket/adapter", "colours@v0002"):
        with pytest.raises(AdapterError):
            asyncio.run(loader.load_model_from_config(name, None))
    low = vllm.VerifiedDownloader(str(store), ModelConfig(base=str(tiny_model)), 2)
    with pytest.raises(AdapterError, match=r"rank 4; this server takes up to 2"):
        asyncio.run(low.load_model_from_config(f"colours@v0001#{hashes[0]}", None))
    other = vllm.VerifiedDownloader(str(store), ModelConfig(base="another"), 64)
    with pytest.raises(AdapterError, match="another base model"):
        asyncio.run(other.load_model_from_config("colours@v0001", None))


def test_a_completion_request_has_prompt_ids_and_every_sampling_setting():
    asked = vllm.completion_fields(GenerationRequest([1, 2, 3], 9, "", 0.5, 0.9, 7, ("END",), 2))
    assert asked == {
        "prompt": [1, 2, 3], "stream": True, "max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "seed": 7,
        "stop": ["END"], "logprobs": 2,
        "add_special_tokens": False, "return_token_ids": True, "return_tokens_as_token_ids": True,
    }  # fmt: skip


def test_the_cache_salt_is_passed_on():
    assert vllm.completion_fields(GenerationRequest([1], 9, cache_salt="team"))["cache_salt"] == "team"


def event(ids, **rest):
    return f"data: {json.dumps({'choices': [{'text': 'x', 'token_ids': ids, **rest}]})}\n\n"


class Handle:
    """Stands in for the deployment's handle: streams `answers`, notes what was asked and whether it was cancelled."""

    def __init__(self, *answers):
        self.answers, self.options_of, self.cancelled = answers, [], False

    def options(self, **options):
        self.options_of.append(options)
        return self

    @property
    def completions(self):
        return self

    def remote(self, body):
        self.body = body
        return self

    def cancel(self):
        self.cancelled = True

    async def __aiter__(self):
        for answer in self.answers:
            yield answer


def generate(handle, request, stop_after=None):
    engine = vllm.VllmEngine.__new__(vllm.VllmEngine)
    engine._handle, engine._completion_request = handle, dict
    found = []

    async def use():
        async with aclosing(engine.generate(request)) as tokens:
            async for token in tokens:
                found.append(token)
                if len(found) == stop_after:
                    break

    asyncio.run(use())
    return found


class LoadsOnce(Handle):
    """The first request for an adapter comes while another one has it loaded."""

    def remote(self, body):
        self.answers = self.answers if hasattr(self, "body") else (ValueError(f"LoRA 'a' {vllm.LOADED_MEANWHILE}."),)
        return super().remote(body)

    async def __aiter__(self):
        for answer in self.answers:
            if isinstance(answer, Exception):
                self.answers = (event([1, 2]),)
                raise answer
            yield answer


def test_an_adapter_that_two_first_requests_load_at_once_is_asked_again():
    assert generate(LoadsOnce(), GenerationRequest([7], 5)) == [Token(1), Token(2)]
    broken = LoadsOnce()
    broken.remote = lambda body: Handle.remote(broken, body)
    broken.answers = (ValueError("no such adapter"),)
    with pytest.raises(ValueError, match="no such adapter"):
        generate(broken, GenerationRequest([7], 5))


class Refuses(Handle):
    """Ray's error of an adapter that the replica refuses, whose text is a traceback."""

    async def __aiter__(self):
        cause = AdapterError("it has rank 128; this server takes up to 64")
        traceback = "ray::ServeReplica:Vllm (pid=7, ip=10.0.0.5)\n  File '/srv/secret/vllm.py', line 3"
        raise RayTaskError("f", traceback, cause).as_instanceof_cause()
        yield


def test_of_a_refused_adapter_the_client_sees_the_reason_and_not_rays_traceback():
    with pytest.raises(AdapterError) as error:
        generate(Refuses(), GenerationRequest([7], 5))
    assert str(error.value) == "it has rank 128; this server takes up to 64"


def test_tokens_are_read_from_batches_of_events():
    handle = Handle([event([5]), event([6, 7])], [event([]), "data: [DONE]\n\n"])
    request = GenerationRequest([1], 9, "/store/colours/v0001", adapter_hash="ab")
    assert generate(handle, request) == [Token(5), Token(6), Token(7)]
    assert handle.body == {"model": "colours@v0001#ab", **vllm.completion_fields(request)}
    assert handle.options_of == [{"stream": True, "multiplexed_model_id": "colours@v0001#ab"}] and not handle.cancelled


def test_log_probabilities_are_read_with_token_ids_likeliest_first():
    marks = {
        "tokens": ["token_id:5"], "token_logprobs": [-0.5],
        "top_logprobs": [{"token_id:5": -0.5, "token_id:9": -0.1, "token_id:8": -3.0}],
    }
    handle = Handle(event([5], logprobs=marks))
    assert generate(handle, GenerationRequest([1], 9, logprobs=2)) == [Token(5, -0.5, ((9, -0.1), (5, -0.5)))]


@pytest.mark.parametrize(("status", "kind"), [(400, RefusedError), (422, RefusedError), (500, RuntimeError),
                                               (None, RuntimeError)])
def test_what_is_wrong_with_a_request_is_a_refusal_and_anything_else_the_servers_fault(status, kind):
    error = {"message": "the grammar is too large", "code": status}
    for event in (f"data: {json.dumps({'error': error})}\n\n", SimpleNamespace(error=SimpleNamespace(**error))):
        with pytest.raises(kind, match="the grammar is too large") as found:
            generate(Handle([event]), GenerationRequest([1], 9))
        assert getattr(found.value, "status", 400) == 400


def test_closing_the_iterator_cancels_the_request_and_an_error_event_is_raised():
    handle = Handle([event([5]), event([6])])
    assert generate(handle, GenerationRequest([1], 9), stop_after=1) == [Token(5)]
    assert handle.cancelled
    with pytest.raises(RuntimeError, match="too long"):
        generate(Handle(['data: {"error": {"message": "too long"}}\n\n']), GenerationRequest([1], 9))


def test_a_grammar_goes_to_the_library_that_it_was_checked_with(store, tiny_model):
    grammar = 'start: %json {"type": "object"}\n'
    assert vllm.completion_fields(GenerationRequest([1], 9, grammar=grammar))["structured_outputs"] == {
        "grammar": grammar,
    }
    assert "structured_outputs" not in vllm.completion_fields(GenerationRequest([1], 9))
    engine = vllm.llm_config_arguments(config(store, tiny_model))["engine_kwargs"]
    assert engine["structured_outputs_config"] == {"backend": "guidance"}
