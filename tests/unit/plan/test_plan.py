"""The plan counts with the model's tokenizer, needs no weights, and adds up."""

import io
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from pi_ray.ask.ask import queries_fingerprint
from pi_ray.ask.sources import task_sources
from pi_ray.config import LoraConfig, ModelConfig, RunConfig
from pi_ray.config.run_file import load_run_file
from pi_ray.errors import ConfigError, DataError, ModelError
from pi_ray.models import base_digest, load_tokenizer
from pi_ray.plan import estimate, scale
from pi_ray.plan.plan import plan_run, print_plan
from pi_ray.prompt import PromptEncoder
from pi_ray.registry import tasks
from pi_ray.run.artifact import staged
from pi_ray.run.directory import RunDir
from pi_ray.run.fingerprint import prepare_fingerprint
from pi_ray.run.queries import write_queries
from pi_ray.schedule import plan_phases

TEMPLATE = "# Instruction\n" + "Turn the request into a command of the alert language. " * 12
RUNS = Path(__file__).parents[3] / "jobs" / "runs"
SPEED = estimate.Speed("cpu", "test CPU", 1e9, "assumed")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with the config and tokenizer of a tiny Llama, and no weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.train_from_iterator(
        [TEMPLATE],
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>").save_pretrained(folder)
    LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def config(tmp_path, model, monkeypatch):
    monkeypatch.setattr(estimate, "measure_speed", lambda config: SPEED)
    for split, n in (("train", 50), ("dev", 6), ("test", 8)):
        lines = [json.dumps({"query": f"{split} request number {i}", "answer": f"alert {i}"}) for i in range(n)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "template.md").write_text(TEMPLATE)
    task = {
        "name": "jsonl",
        "template": str(tmp_path / "template.md"),
        **{s: str(tmp_path / f"{s}.jsonl") for s in ("train", "dev", "test")},
    }
    return RunConfig(
        name="tiny",
        run_dir=str(tmp_path / "run"),
        task=task,
        model={"base": model},
        prompt={"chat": "none"},
        train={"batch_size": 8},
    )


def test_phases_shrink_and_updates_follow_rows_epochs_and_batch(config):
    made = plan_run(config.replace(**{"schedule.epochs": 2}))
    assert [p.phase.rate for p in made.phases] == [1.0, 0.5, 0.0]
    assert [p.updates for p in made.phases] == [math.ceil(50 * 2 / 8)] * 3
    tokens = [p.shape.prefix + p.shape.row + p.shape.label for p in made.phases]
    assert tokens[0] > tokens[1] > tokens[2]
    assert made.rows == {"train": 50, "dev": 6, "test": 8}


def test_the_full_prompt_has_the_most_examples_of_any_phase(config):
    phases = [{"rate": 1, "shots": 0}, {"rate": 0.5, "shots": 2}, {"rate": 0, "shots": 0}]
    most = plan_run(config.replace(schedule={"name": "list", "list": phases}))
    asked = plan_run(config.replace(schedule={"name": "list", "list": phases}, **{"evaluate.shots": 2}))
    assert most.full == asked.full and most.full.row > most.phases[0].shape.row


def test_tokens_are_those_of_the_encoder(config):
    encoder = PromptEncoder(load_tokenizer(config.model), config.prompt)
    made = plan_run(config.replace(**{"schedule.shots": 0}))
    template = TEMPLATE.removeprefix("# Instruction\n").strip()
    assert made.full.prefix == len(encoder.prefix(template))
    lengths = [len(encoder.row(f"train request number {i}")) for i in range(50)]
    assert made.query.row == pytest.approx(sum(lengths) / 50)
    assert made.query.row == made.full.row and made.query.prefix < made.full.prefix


def test_a_prepared_template_replaces_the_estimate(config):
    fingerprint = prepare_fingerprint(config, tasks["jsonl"](config.task).fingerprint(), base=base_digest(config.model))
    with staged(RunDir(config.root).templates, fingerprint=fingerprint) as folder:
        (folder / "templates.json").write_text(json.dumps([{"rate": 0.5, "achieved": 0.6}]))
    made = plan_run(config)
    assert made.phases[1].measured
    assert made.phases[1].shape.prefix == pytest.approx(0.6 * made.full.prefix)
    assert not plan_run(config.replace(**{"compress.tolerance": 0.01})).phases[1].measured, (
        "templates of another config are not this one's"
    )


@pytest.fixture
def conversations(config, tmp_path):
    """The same with conversations of two answers, of which one is longer than the model's context."""
    for split, n in (("train", 12), ("dev", 2), ("test", 3)):
        talks = [
            [f"{split} {i}", f"Which {i}?", "late " * (2000 if split == "train" and not i else 1), f"Alert {i}."]
            for i in range(n)
        ]
        messages = [[{"role": "ua"[k % 2].replace("u", "user").replace("a", "assistant"), "content": text}
                     for k, text in enumerate(talk)] for talk in talks]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in messages))
    task = {**config.task.model_dump(mode="json"), "name": "conversations"}
    return RunConfig(name="tiny", run_dir=str(tmp_path / "run"), task=task, model=config.model,
                     prompt={"chat": "chatml"}, train={"batch_size": 4})


def test_a_plan_of_conversations_says_what_is_learned_and_counts_single_turns_at_inference(conversations):
    made = plan_run(conversations)
    assert made.rows == {"train": 11, "dev": 4, "test": 6} and made.rejects == 0  # the longest is left out
    encoder = PromptEncoder(load_tokenizer(conversations.model), conversations.prompt)
    prompt, label = encoder.all_turns(*[(r.query, r.answer) for r in tasks["conversations"](
        conversations.task).rows("train")][1])
    assert made.phases[-1].shape.label == pytest.approx(sum(i >= 0 for i in label), rel=0.1)
    assert made.phases[-1].shape.row == pytest.approx(len(prompt) + sum(i < 0 for i in label), rel=0.1)
    assert made.query.row < made.phases[-1].shape.row + made.phases[-1].shape.label
    shown = io.StringIO()
    print_plan(made, Console(file=shown, width=200))
    assert "Conversations: every assistant turn of a conversation is learned, in one pass" in shown.getvalue()


def test_row_limits_hold(config):
    limited = config.replace(**{"task.rows": {"train": 16, "dev": 0, "test": 3}})
    assert plan_run(limited).rows == {"train": 16, "dev": 6, "test": 3}


def test_the_plain_baseline_has_as_many_updates_as_all_phases_and_can_be_left_out(config):
    made = plan_run(config)
    assert sum(p.updates for p in made.plain) == sum(p.updates for p in made.phases)
    assert plan_run(config.replace(**{"evaluate.baseline": False})).plain == []


def test_what_preparation_would_refuse_the_plan_refuses_too(config, tmp_path):
    rows = (tmp_path / "train.jsonl").read_text().splitlines()
    (tmp_path / "test.jsonl").write_text(rows[0] + "\n")
    with pytest.raises(DataError, match="train queries also stand in dev or test"):
        plan_run(config)
    assert plan_run(config.replace(**{"task.overlap": "drop"})).rows["train"] == len(rows) - 1


def test_no_training_rows_is_the_users_error(config, tmp_path):
    (tmp_path / "train.jsonl").write_text("not json\n")
    with pytest.raises(DataError, match=r"train\.jsonl:1: not valid JSON"):
        plan_run(config)


def test_model_size_counts_without_weights(model):
    size = estimate.model_size(ModelConfig(base=model), LoraConfig(rank=4))
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64 + 2 * 32
    assert size.active == 2 * layer + 32
    assert size.weights == size.active + 2 * 300 * 32
    assert size.lora == 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))


def test_unknown_lora_targets_and_models_are_named(model):
    with pytest.raises(ConfigError, match="targets"):
        estimate.model_size(ModelConfig(base=model), LoraConfig(targets=("no_such_layer",)))
    with pytest.raises(ModelError):
        estimate.model_size(ModelConfig(base="/no/such/folder"), LoraConfig())


def test_a_mixture_of_experts_counts_the_chosen_experts_only(tmp_path):
    from transformers import MixtralConfig

    MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    ).save_pretrained(tmp_path)
    size = estimate.model_size(ModelConfig(base=str(tmp_path)), LoraConfig(rank=2))
    experts = 4 * 3 * 16 * 32
    assert size.weights - size.active == experts / 2 + 2 * 50 * 16


def test_a_shared_prefix_saves_time_and_micro_batches_cost_some(config):
    made = plan_run(config)
    shape, size = made.phases[0].shape, made.size
    shared = estimate.update_operations(size, shape, config)
    assert shared < estimate.update_operations(size, shape, config.replace(**{"train.micro_batch": 1}))
    assert shared < estimate.update_operations(size, shape, config.replace(**{"train.share_prefix": False}))
    assert shared < estimate.update_operations(size, shape, config.replace(**{"train.gradient_checkpointing": True}))


def test_zero_stages_and_checkpointing_lower_memory(config):
    made = plan_run(config)

    def total(**change):
        return sum(estimate.device_memory(made.size, made.full, config.replace(**change)).values())

    stages = [total(**{"train.backend.zero_stage": stage}) for stage in range(4)]
    assert stages == sorted(stages, reverse=True) and len(set(stages)) == 4
    assert total(**{"train.gradient_checkpointing": True}) < total()


def test_a_prefix_that_is_shared_by_its_cache_is_counted_once_too(config, tmp_path):
    from transformers import AutoConfig

    shape = AutoConfig.from_pretrained(config.model.base).to_dict()
    folder = tmp_path / "model"
    shutil.copytree(config.model.base, folder)
    capped, uncapped, made = 50.0, None, {}
    config = config.replace(**{"cluster.gpus_per_node": 1, "train.gradient_checkpointing": True})
    for cap in (capped, uncapped):
        own = {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": cap}
        (folder / "config.json").write_text(json.dumps({**shape, **own}))
        made[cap] = plan_run(config.replace(**{"model.base": str(folder)}))
    plain = plan_run(config.replace(**{"model.base": str(folder), "train.share_prefix": False}))
    assert (
        "soft-capped" in made[capped].size.plain_batch_reason and made[uncapped].size.plain_batch_reason == ""
    )
    assert made[capped].memory == made[uncapped].memory and made[capped].seconds == made[uncapped].seconds
    assert plain.memory["activations"] > 1.5 * made[capped].memory["activations"]
    assert plain.seconds > made[capped].seconds
    tokens = [scale.grid(p, (1,))[0].tokens for p in (made[capped], made[uncapped], plain)]
    assert tokens[0] == tokens[1] < tokens[2]
    for cap, plan in made.items():
        print_plan(plan, console := Console(width=200, file=io.StringIO()))
        said = "Rows share the template by its cache, computed once a batch: its attention sc"
        assert (said in console.file.getvalue()) == (cap == capped)


def test_nested_configs_and_models_without_attention_heads_can_be_measured(tmp_path):
    import transformers

    text = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": 50,
    }
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 8,
        "patch_size": 4,
    }
    shapes = {
        "gemma": transformers.Gemma3Config(
            text_config={**text, "sliding_window": 9}, vision_config=vision, mm_tokens_per_image=4
        ),
        "rwkv": transformers.RwkvConfig(vocab_size=50, hidden_size=16, attention_hidden_size=16, num_hidden_layers=1),
    }
    found = {}
    for name, shape in shapes.items():
        shape.save_pretrained(tmp_path / name)
        found[name] = estimate.model_size(ModelConfig(base=str(tmp_path / name)), LoraConfig(rank=2))
    assert (found["gemma"].hidden, found["gemma"].layers, found["gemma"].key_value) == (
        16,
        1,
        8,
    ) and not found["gemma"].plain_batch_reason, "rows share their prefix behind a sliding window too"
    assert found["rwkv"].hidden == 16 and "attention of its own" in found["rwkv"].plain_batch_reason


def mixtral_8x7b(**changes):
    from transformers import MixtralConfig

    return MixtralConfig(sliding_window=None, **changes)


def llama_2_7b():
    from transformers import LlamaConfig

    return LlamaConfig()


def sized(folder, shape, run_file, **changes):
    """(size, config) of the run file jobs/runs/<run_file>.yaml with a model of this shape, which is read from a
    folder.
    """
    shape.save_pretrained(folder)
    config = load_run_file(RUNS / f"{run_file}.yaml").replace(**{"model.base": str(folder), **changes})
    return estimate.model_size(config.model, config.train.lora), config


def test_mixtral_8x7b_on_16_gpus_agrees_with_a_calculation_by_hand(tmp_path):
    size, config = sized(tmp_path, mixtral_8x7b(), "mixtral-8x7b")
    experts, attention = 3 * 4096 * 14336, 2 * 4096 * 4096 + 2 * 4096 * 1024
    layer = 8 * experts + attention + 8 * 4096 + 2 * 4096
    assert size.weights == 32 * layer + 2 * 32000 * 4096 + 4096 == 46_702_792_704, "all experts are held"
    assert size.active == 32 * (layer - 6 * experts) + 4096 == 12_617_781_248, "two of eight compute"
    assert size.lora == 32 * 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024)) == 27_262_976, "attention's four layers"
    held = estimate.device_memory(size, estimate.Shape(600, 450, 30), config)
    assert held["base weights"] == 46_702_792_704 * 2 / 16
    assert held["gathered weights"] == (10**9 + layer + 128) * 2, (
        "what DeepSpeed keeps, and one layer with all its experts"
    )
    assert held["LoRA weights, gradients, Adam"] == 27_262_976 * (2 + 2 + 12) / 16
    tokens = 600 + 8 * 479
    one = tokens * (8 * 4096 + 2 * 1024 + 4 * 2 * 14336) + 2 * 1024 * 8 * 1079
    assert held["activations"] == 2 * (32 * tokens * 4096 + one)
    assert 12 * 2**30 < sum(held.values()) < 13 * 2**30
    assert estimate.host_memory(size, config) == {
        "checkpoint, which the first worker maps while it is loaded": 46_702_792_704 * 2
    }


def test_what_is_offloaded_moves_to_the_host(tmp_path):
    size, config = sized(tmp_path, mixtral_8x7b(num_hidden_layers=2), "mixtral-8x7b")
    away = config.replace(**{"train.backend.offload_params": True, "train.backend.offload_optimizer": True})
    here, there = (estimate.device_memory(size, estimate.Shape(600, 450, 30), c) for c in (config, away))
    host = estimate.host_memory(size, away)
    assert host["base weights"] == here["base weights"] and there["base weights"] == 0
    assert here["LoRA weights, gradients, Adam"] - there["LoRA weights, gradients, Adam"] == size.lora * 12 / 16
    assert host["LoRA weights, gradients, Adam"] == size.lora * 16 / 16


def test_llama_2_7b_on_8_gpus_agrees_with_a_calculation_by_hand(tmp_path):
    size, config = sized(tmp_path, llama_2_7b(), "llama-2-7b")
    linear = 4 * 4096 * 4096 + 3 * 4096 * 11008
    assert size.weights == 32 * (linear + 2 * 4096) + 4096 + 2 * 32000 * 4096 == 6_738_415_616
    assert size.lora == 32 * 32 * (4 * 8192 + 3 * (4096 + 11008)) == 79_953_920
    held = estimate.device_memory(size, estimate.Shape(600, 450, 30), config)
    assert held["base weights"] == 6_738_415_616 * 2, "ZeRO-2 leaves the base whole on each"
    assert held["LoRA weights, gradients, Adam"] == 79_953_920 * (2 + 2 / 8 + 12 / 8)
    assert sum(held.values()) < 80e9
    assert estimate.host_memory(size, config) == {"base model while it is loaded": 6_738_415_616 * 2}
    sharded = estimate.device_memory(
        size, estimate.Shape(600, 450, 30), config.replace(**{"train.backend.zero_stage": 3})
    )
    assert sharded["base weights"] == 6_738_415_616 * 2 / 8
    assert sharded["gathered weights"] == (10**9 + linear + 2 * 4096 + 128) * 2
    small = estimate.device_memory(size, estimate.Shape(600, 450, 30), config.replace(**{"model.quantize": "4bit"}))
    assert small["base weights"] == pytest.approx(32 * linear * 4.127 / 8 + 2 * (6_738_415_616 - 32 * linear), rel=1e-3)


def test_llama_2_13b_on_8_gpus_agrees_with_a_calculation_by_hand(tmp_path):
    from transformers import LlamaConfig

    shape = LlamaConfig(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, num_key_value_heads=40
    )
    size, config = sized(tmp_path, shape, "llama-2-13b")
    assert size.weights == 40 * (4 * 5120**2 + 3 * 5120 * 13824 + 2 * 5120) + 5120 + 2 * 32000 * 5120 == 13_015_864_320
    assert size.lora == 40 * 32 * (4 * 2 * 5120 + 3 * (5120 + 13824)) == 125_173_760
    held = estimate.device_memory(size, estimate.Shape(600, 450, 30), config)
    assert held["base weights"] == 13_015_864_320 * 2
    assert held["LoRA weights, gradients, Adam"] == 125_173_760 * (2 + 2 / 8 + 12 / 8)
    tokens = 600 + 4 * 479
    assert held["activations"] == 2 * 40 * (tokens * (8 * 5120 + 2 * 5120 + 4 * 13824) + 2 * 5120 * 4 * 1079)
    assert 50e9 < sum(held.values()) < 80e9


@pytest.mark.parametrize("run_file, workers", [("mixtral-8x7b", 16), ("llama-2-7b", 8), ("llama-2-13b", 8)])
def test_run_files_of_the_papers_open_models_have_its_settings(run_file, workers):
    config = load_run_file(RUNS / f"{run_file}.yaml")
    assert (
        config.task.name,
        config.train.workers,
        config.train.batch_size,
        config.train.lora.rank,
        config.train.checkpoint_every,
    ) == ("nl2bash", workers, 128, 32, 200)
    assert [(p.rate, p.shots) for p in plan_phases(config.schedule)] == [(1.0, 10), (0.5, 5), (0.0, 0)]
    assert sum(p.epochs for p in plan_phases(config.schedule)) == 12


def test_the_probe_measures_this_machine():
    assert estimate._matmul_speed("cpu", torch.float32, 64, 0.01) > 0


@pytest.mark.parametrize("width", [80, 140])
def test_render_says_what_matters(config, width):
    console = Console(width=width, record=True, file=io.StringIO())
    print_plan(plan_run(config.replace(**{"train.workers": 4})), console)
    text = " ".join(console.export_text().split())
    for words in (
        "50 train",
        "fewer",
        "Memory per worker",
        "4 training processes",
        "2 to each",
        "a factor of two",
        "test CPU",
    ):
        assert words in text


def test_a_plan_for_gpus_says_what_their_hosts_need(config):
    console = Console(width=140, record=True, file=io.StringIO())
    print_plan(
        plan_run(
            config.replace(
                **{"train.gpu": True, "train.backend": {"name": "deepspeed", "zero_stage": 3, "offload_params": True}}
            )
        ),
        console,
    )
    text = " ".join(console.export_text().split())
    for words in (
        "Memory per worker, on its GPU",
        "gathered weights",
        "Host memory per worker: at most about",
        "checkpoint, which the first worker maps",
    ):
        assert words in text


@pytest.mark.parametrize("changes, asked, shown", [
    ({}, False, False), ({}, True, True), ({"train.gpu": True}, False, False),
    ({"train.gpu": True, "train.workers": 16, "train.batch_size": 16}, False, True),
])  # fmt: skip
def test_many_nodes_are_shown_when_asked_for_and_for_runs_on_several(config, changes, asked, shown, monkeypatch):
    monkeypatch.setattr(
        estimate, "measure_speed", lambda config: estimate.Speed(estimate.device_of(config), "test", 1e9, "assumed")
    )
    console = Console(width=140, record=True, file=io.StringIO())
    print_plan(plan_run(config.replace(**changes)), console, scale=asked)
    assert ("On nodes of 8 A100s" in console.export_text()) == shown


def test_a_plan_with_a_teacher_counts_its_queries_and_time(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "measure_speed", lambda config: SPEED)
    config = RunConfig(
        name="t", run_dir=str(tmp_path), task={"name": "opsql", "rows": {"train": 20, "unlabelled": 40}},
        model={"base": str(tiny_model)}, prompt={"chat": "none"},
    )
    alone, taught = plan_run(config), plan_run(config.replace(**{"train.objective": "distill"}))
    assert taught.rows["unlabelled"] == 40 and "unlabelled" not in alone.rows
    assert alone.teaching == 0 < taught.teaching and taught.seconds == pytest.approx(alone.seconds + taught.teaching)
    console = Console(file=io.StringIO(), width=200)
    print_plan(taught, console)
    assert "the adapter as phase 0 leaves it answers 40 unlabelled queries" in console.file.getvalue()
    assert "Reading drills: none, since the first phase has examples" in console.file.getvalue()
    more = {"train.objective": "distill", "train.distill.on_policy": 0.5, "train.distill.anchor": 0.25}
    mended = plan_run(config.replace(**more))
    assert mended.teaching > taught.teaching and mended.phases[0].seconds == taught.phases[0].seconds
    assert mended.phases[1].seconds > taught.phases[1].seconds, "the anchor's answers are longer than the task's"
    print_plan(mended, console)
    assert "student's own answers, which the teacher mends" in console.file.getvalue()
    read = plan_run(config.replace(**{"train.objective": "distill", "schedule.shots": 0}))
    assert read.drills.startswith("100% of phase 0's updates: 40 codes under '## Services' (r9, r5, f9, x4, ...), ")


def test_a_plan_without_labelled_rows_counts_queries_and_the_time_to_answer_them(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "measure_speed", lambda config: SPEED)
    (tmp_path / "prompt.md").write_text("Answer with the code.\n\nred: k4\nblue: z9\n")
    (tmp_path / "q.jsonl").write_text("".join(f'{{"query": "question {i} about red"}}\n' for i in range(40)))
    config = RunConfig(
        name="t", run_dir=str(tmp_path / "run"), model={"base": str(tiny_model)}, prompt={"chat": "none"},
        task={"train": "", "queries": str(tmp_path / "q.jsonl"), "template": str(tmp_path / "prompt.md")},
        schedule={"phases": 1}, train={"objective": "distill", "distill": {"teacher": "base"}},
    )
    plan = plan_run(config)
    assert sum(plan.rows.values()) <= 40 and plan.rows["test"] and plan.teaching > 0
    assert [p.shape.prefix < plan.full.prefix for p in plan.phases] == [True] and plan.phases[0].shape.label == 32
    console = Console(file=io.StringIO(), width=200)
    print_plan(plan, console)
    assert "the base model answers the queries with the whole prompt before" in console.file.getvalue()
    endpoint = plan_run(config.replace(**{"train.distill.teacher": "endpoint"}))
    assert endpoint.teaching == 0


def test_a_plan_with_a_quality_floor_counts_the_dev_rows_that_are_answered(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "measure_speed", lambda config: SPEED)
    config = RunConfig(
        name="t", run_dir=str(tmp_path), task={"name": "opsql", "rows": {"train": 20, "dev": 10}},
        model={"base": str(tiny_model)}, prompt={"chat": "none"},
    )
    without, floored = plan_run(config), plan_run(config.replace(**{"schedule.floor": 0.95}))
    assert without.answering == 0 < floored.answering and floored.scored == 10
    assert floored.seconds == pytest.approx(without.seconds + floored.answering)
    console = Console(file=io.StringIO(), width=400)
    print_plan(floored, console)
    said = console.file.getvalue()
    assert "after each phase 10 dev rows are answered under its prompt (10 rows are few" in said
    assert "ends at the shortest prompt that keeps 0.95 of the first phase's score; examples are then fixed" in said


def test_a_plan_with_a_metric_counts_the_dev_rows_that_are_answered(config):
    without, made = plan_run(config), plan_run(config.replace(**{"task.metric": ["f1"]}))
    assert made.scored == made.rows["dev"] and made.seconds == pytest.approx(without.seconds + made.answering)
    console = Console(file=io.StringIO(), width=400)
    print_plan(made, console)
    assert f"after each phase {made.scored} dev rows are answered, about" in console.file.getvalue()


def test_a_run_without_labelled_rows_is_planned_before_its_queries_are_generated(config):
    codes = "\n".join(f"request {i}: alert {i}" for i in range(9))
    Path(config.task.template).write_text(f"Alerts.\n\n## Codes\n\n{codes}\n")
    asks = config.replace(**{
        "train.objective": "distill", "train.distill.teacher": "base", "task.train": "", "task.dev": "",
        "task.test": "", "task.queries": "", "task.generate": True, "ask": {"queries": 60, "writer": "prompt"},
        "schedule": {"phases": 1},
    })
    made = plan_run(asks)
    assert made.rows == {"train": 42, "dev": 6, "test": 12} and made.asking.seconds > 0
    with staged(RunDir(asks.root).queries, fingerprint="of another prompt", queries=7) as folder:
        write_queries(folder, [])
    assert plan_run(asks).rows == made.rows, "queries of another prompt are generated again"


def test_an_endpoint_that_has_nothing_to_answer_is_named(config):
    with pytest.raises(ConfigError, match="there are no queries for it to answer"):
        plan_run(config.replace(**{
            "train.objective": "distill", "train.distill.teacher": "endpoint", "task.queries": "",
        }))


def test_asking_is_counted_until_the_queries_are_there(config):
    codes = "\n".join(f"request {i}: alert {i}" for i in range(9))
    Path(config.task.template).write_text(f"Alerts.\n\n## Codes\n\n{codes}\n")
    asks = config.replace(**{"train.objective": "distill", "task.queries": "generate", "ask.queries": 20})
    made, silent = plan_run(asks), plan_run(config.replace(**{"train.objective": "distill"}))
    assert made.rows["unlabelled"] == 20 and silent.asking is None
    assert made.asking.seconds > 0 and made.seconds > made.asking.seconds + sum(p.seconds for p in made.phases)
    out = io.StringIO()
    print_plan(made, Console(file=out, width=400))
    said = out.getvalue()
    assert "Asking: an adapter learns in 60 updates to write queries, then writes about 72 queries" in said
    assert "for 9 of 10 units of the template" in said, "the instruction is in no section that a row shows"
    print_plan(plan_run(asks.replace(**{"ask.writer": "endpoint"})), Console(file=out, width=400))
    assert "What it costs is said, and consent asked for, before" in out.getvalue()
    fingerprint = queries_fingerprint(asks, task_sources(asks))
    with staged(RunDir(asks.root).queries, fingerprint=fingerprint, queries=7) as made:
        write_queries(made, [])
    there = plan_run(asks)
    assert (there.rows["unlabelled"], there.asking.seconds) == (7, 0.0)
    with pytest.raises(DataError, match="says nothing that a query could be about"):
        Path(config.task.template).write_text("...")
        plan_run(asks)
