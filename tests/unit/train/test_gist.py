"""Gist tokens: the mask that hides the template, the embeddings that are trained, and answers from the cached gists
alone.
"""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError

from pi_ray.config import LoraConfig, ModelConfig
from pi_ray.errors import AdapterError, TrainingError
from pi_ray.evaluate import generation_workers
from pi_ray.evaluate.columns import AnswerLengths, trained_column
from pi_ray.evaluate.evaluate import evaluate_run
from pi_ray.evaluate.generation_workers import LoadedAdapters
from pi_ray.models import load_model, load_tokenizer
from pi_ray.plan.plan import plan_phases
from pi_ray.prompt import PromptEncoder
from pi_ray.run.artifact import staged, verify_artifact
from pi_ray.run.directory import RunDir
from pi_ray.run.fingerprint import train_fingerprint
from pi_ray.run.phases import plain_finetuning_config
from pi_ray.store.publish import publish_adapter
from pi_ray.store.verify import verify_adapter
from pi_ray.train import gist, lora, shared_prefix
from pi_ray.train.batches import packed_batch
from pi_ray.train.generation import generate, generate_greedy
from pi_ray.train.objectives import sft_loss
from pi_ray.train.trainer import Trainer, train_worker
from tests.prepared import TEMPLATE, prepare_by_hand, tiny_config
from tests.unit.train.test_train import log_of, settings

K = 3
PREFIX = [*range(20, 45), *gist.gist_ids(K)]
ROWS = [([5, 6, 7, 8], [9, 10]), ([11, 12], [13, 14, 15]), ([16] * 7, [17])]
KEPT = {"schedule": {"name": "constant", "phases": 2, "shots": 1, "epochs": 1}, "train.gist": K}


@pytest.fixture(scope="module")
def model(tiny_model):
    model = lora.add_lora(load_model(ModelConfig(base=str(tiny_model))), LoraConfig(rank=4), seed=0)
    gist.add_gist_embeddings(model, K)
    for name, p in lora.trainable_parameters(model).items():
        if "lora_B" in name or name.endswith(".gist"):
            torch.nn.init.normal_(p, std=0.1)
    return model


def masked(model, prefix, tokens, visible=K):
    """Logits after each of a row's tokens: one ordinary forward pass with an explicit mask over the whole prompt."""
    total, p = len(prefix) + len(tokens), len(prefix)
    mask = torch.ones(total, total, dtype=torch.bool).tril()
    mask[p:, : p - visible] = False
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        return model(
            input_ids=torch.tensor([[*prefix, *tokens]]), attention_mask=mask[None, None], use_cache=False
        ).logits[0, p:]


def greedily(model, prefix, row, steps):
    found = []
    for _ in range(steps):
        found.append(masked(model, prefix, [*row, *found])[-1].argmax().item())
    return found


@pytest.fixture(scope="module")
def config(tiny_model, tmp_path_factory):
    """A trained run."""
    config = tiny_config(tiny_model, tmp_path_factory.mktemp("gist"), **KEPT)
    prepare_by_hand(config)
    train_worker(settings(config))
    return config


def files_of(config, phase=1):
    return {
        name: entry["sha256"]
        for name, entry in verify_artifact(RunDir(config.root).adapter(phase))["files"].items()
        if name.endswith(".safetensors")
    }


def test_packed_rows_get_the_logits_of_an_ordinary_pass_with_an_explicit_mask(model):
    expected = torch.cat([masked(model, PREFIX, prompt + label[:-1])[-len(label) :] for prompt, label in ROWS])
    seeing = torch.cat(
        [masked(model, PREFIX, prompt + label[:-1], len(PREFIX))[-len(label) :] for prompt, label in ROWS]
    )
    shared_prefix.enable_shared_prefix(model)
    with torch.no_grad():
        found = model(**packed_batch(PREFIX, ROWS).inputs).logits[0]
    assert torch.allclose(found, expected, atol=1e-5)
    assert (found - seeing).abs().max() > 1e-3, "a row that sees the template too has other logits"


def test_rows_change_with_the_gists_and_not_with_the_template():
    torch.manual_seed(0)
    p, lengths = 10, [4, 6]
    layout = shared_prefix.Layout.build(p, lengths, visible=K)
    query, key, value = (torch.randn(1, heads, p + sum(lengths), 8) for heads in (4, 2, 2))

    def attend(changed):
        other = [x.clone() for x in (key, value)]
        for x in other:
            x[:, :, changed] += 1
        return shared_prefix.shared_prefix_attention(torch.nn.Module(), query, *other, None, layout=layout)[0][0]

    before, template, gists = attend([]), attend([p - K - 1]), attend([p - 1])
    assert torch.equal(before[p:], template[p:])
    assert not torch.allclose(before[p - K : p], template[p - K : p]), "gists do see the template"
    assert not torch.allclose(before[p:], gists[p:])


def test_each_gist_embedding_is_trained_and_the_vocabulary_is_not(model):
    shared_prefix.enable_shared_prefix(model)
    model.zero_grad()
    sft_loss(model, packed_batch(PREFIX, ROWS)).backward()
    grown = {name: p for name, p in lora.trainable_parameters(model).items() if "lora_" not in name}
    assert [tuple(p.shape) for p in grown.values()] == [(K, 32)]
    assert all(row.abs().max() > 0 for p in grown.values() for row in p.grad)
    logits = model(input_ids=torch.tensor([PREFIX]), use_cache=False).logits
    assert logits.shape[-1] == model.config.vocab_size, "no gist token can be answered"


def test_gists_start_as_the_mean_embedding_and_leave_the_others_alone(tiny_model):
    base = load_model(ModelConfig(base=str(tiny_model))).get_input_embeddings()
    found = gist.GistEmbedding(base, K)(torch.tensor([[7, -1, -K, 0]]))
    assert torch.equal(found[0, [0, 3]], base(torch.tensor([7, 0])))
    assert torch.allclose(found[0, 1:3], base.weight.mean(0).expand(2, -1))


def test_every_phase_leaves_an_adapter_with_its_gists(config):
    steps = [e["loss"] for e in log_of(config) if "loss" in e]
    assert len(steps) == 6 and steps[-1] < steps[0]
    first, last = (gist.load_gist(RunDir(config.root).adapter(i)) for i in (0, 1))
    assert first.shape == last.shape == (K, 32) and not torch.equal(first, last)
    card = json.loads((RunDir(config.root).adapter(1) / "pi_ray.json").read_text())
    assert card["gist"] == K and card["template"] == TEMPLATE
    assert card["query_prompt_tokens"] < card["full_prompt_tokens"] - 20


def test_a_run_that_dies_goes_on_to_the_same_adapter_and_gists(config, tmp_path, monkeypatch):
    again = config.replace(run_dir=str(tmp_path))
    prepare_by_hand(again)
    one = Trainer.train_step

    def dies(self, update):
        if update.step == 5:
            raise KeyboardInterrupt
        one(self, update)

    monkeypatch.setattr(Trainer, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train_worker(settings(again))
    monkeypatch.setattr(Trainer, "train_step", one)
    train_worker(settings(again))
    assert files_of(again) == files_of(config)
    assert set(files_of(again)) == {"adapter_model.safetensors", gist.FILE}


def test_a_cache_of_the_gists_alone_answers_as_the_masked_prompt_does(config):
    """The files of a trained run, loaded as evaluation does, answer as the model that was trained."""
    from peft import PeftModel

    column = trained_column(config)
    assert column.gist == K
    encoder = PromptEncoder(load_tokenizer(config.model), config.prompt)
    prefix = encoder.prefix(column.template) + gist.gist_ids(K)
    rows = [encoder.row(query) for query in ("what is red?", "and which of them is black, then?")]
    reference = PeftModel.from_pretrained(load_model(config.model), column.adapter).eval()
    gist.add_gist_embeddings(reference, K)
    reference.get_input_embeddings().gist.data.copy_(gist.load_gist(RunDir(config.root).best))
    expected = [greedily(reference, prefix, row, 6) for row in rows]

    loaded = LoadedAdapters(load_model(config.model), [column.adapter])
    loaded.activate(column.adapter)
    cache = gist.gist_cache(loaded.model, prefix, gist.load_gist(RunDir(config.root).best))
    assert cache.get_seq_length() == K
    assert generate_greedy(loaded.model, prefix, rows, 6, end=None, cache=cache) == expected
    generator = generation_workers.Generator(config.model, config.prompt, [column.adapter], AnswerLengths(6, 2))
    generator.end = None
    work = {"column": "gist", "adapter": column.adapter, "prefix": prefix, "rows": [0, 1], "prompts": rows}
    assert generator(work) == expected
    assert [len(row) for row in generator({**work, "timed": True})] == [3, 3]
    assert generator(work) == expected, "timing changes nothing"


def test_rows_stand_behind_the_whole_prompt_though_the_cache_is_short(model):
    """Logits of two rows of unequal length, which tell a wrong position where answers would not."""
    model.set_attn_implementation("sdpa")
    cache, logits = gist.gist_cache(model, PREFIX, model.get_input_embeddings().gist), []

    def choose(given, rows):
        logits.append(given)
        return given.argmax(-1).tolist()

    prompts = [prompt for prompt, _ in ROWS[1:]]
    found = generate(model, PREFIX, prompts, 3, end=None, cache=cache, choose=choose)
    for row, (prompt, answer) in enumerate(zip(prompts, found, strict=True)):
        expected = masked(model, PREFIX, prompt + answer)
        for step, at in enumerate(logits):
            assert torch.allclose(at[row], expected[len(prompt) - 1 + step], atol=1e-5)


def test_evaluation_counts_the_gists_and_not_the_template(config, tmp_path, monkeypatch):
    """Without Ray: this process does the actor's work."""
    run, encoder = RunDir(config.root), PromptEncoder(load_tokenizer(config.model), config.prompt)
    with staged(run.rows, fingerprint="by-hand", rows={"train": 2, "test": 2}) as tmp:
        for split in ("train", "test"):
            pq.write_table(
                pa.table({"id": ["a", "b"], "query": ["red?", "blue?"], "answer": ["k4", "z9"], "group": ["", ""]}),
                tmp / f"{split}.parquet",
            )
    neighbours = {
        "id": ["a", "b"] * 2, "split": ["train"] * 2 + ["test"] * 2, "neighbours": [["b"], ["a"], ["b"], []],
        "scores": [[1.0], [1.0], [1.0], []],
    }
    pq.write_table(pa.table(neighbours), run.neighbours)

    def answered(config, columns, work, lengths, engine):
        generator = generation_workers.Generator(config.model, config.prompt, [c.adapter for c in columns], lengths)
        for place, item in enumerate(work):
            done = generator(item)
            said.extend([] if "timed" in item else done)
            yield place, done

    said = []
    monkeypatch.setattr(generation_workers, "run_work", answered)
    quick = config.replace(
        **{
            "evaluate.probe": False, "evaluate.knows": False, "evaluate.bootstrap": 10, "evaluate.latency_rows": 1,
            "evaluate.max_new_tokens": 3,
        }
    )
    found = evaluate_run(quick, columns=[trained_column(config)])["promptintern"]
    own = [
        len(encoder.row("red?", shots))
        for shots in run.read_shots("test", {r.id: r for r in run.read_rows("train")}, 1).values()
    ]
    assert found["prefix_tokens"] == K and found["latency_merged_s"] > 0
    assert found["input_tokens"] == K + (own[0] + len(encoder.row("blue?"))) / 2
    lengths = [len(ids) for ids in said]
    assert sorted(lengths) == [1, 3] and (found["cut_off"], found["output_tokens"]) == (0.5, 3), (
        "one is stopped after its third token, the other ends"
    )


def test_gist_adapters_are_neither_published_nor_served(config, tmp_path):
    with pytest.raises(AdapterError, match="gist tokens, a baseline that can be evaluated"):
        publish_adapter(RunDir(config.root), config.replace(store=str(tmp_path)))
    assert not (tmp_path / config.name / "v0001").exists() and not (tmp_path / config.name / "latest.json").exists()
    with pytest.raises(AdapterError, match="not published or served"):
        verify_adapter(RunDir(config.root).adapter(1))


@pytest.mark.parametrize("changes, reason", [
    ({"schedule": {"name": "linear", "phases": 3}}, r"phase 2 of the schedule has no template \(rate 0\)"),
    ({"train.share_prefix": False}, "needs train.share_prefix"),
    ({"train.objective": "distill"}, "cannot be combined with train.objective distill"),
    ({"train.backend": {"name": "openai"}}, "needs a model whose weights are here"),
    ({"train.backend": {"name": "deepspeed", "zero_stage": 3}}, "zero_stage 3"),
])
def test_what_cannot_have_gists_is_refused_when_the_config_is_read(tiny_model, tmp_path, changes, reason):
    with pytest.raises(ValidationError, match=reason):
        tiny_config(tiny_model, tmp_path, **{**KEPT, **changes})


def test_a_model_that_does_not_see_the_whole_prompt_is_refused_before_training(config, tmp_path, monkeypatch):
    monkeypatch.setattr(
        shared_prefix, "why_not_all_is_seen",
        lambda model, longest: "attention is limited to a sliding window of 64 tokens",
    )
    other = config.replace(run_dir=str(tmp_path))
    prepare_by_hand(other)
    with pytest.raises(TrainingError, match=r"gist tokens \(train.gist\), which need full attention .* sliding window"):
        train_worker(settings(other))


def test_the_plain_baseline_has_no_gists_and_the_number_of_gists_is_part_of_what_was_trained(config):
    assert plain_finetuning_config(config).train.gist == 0 and not any(
        p.rate for p in plan_phases(plain_finetuning_config(config).schedule)
    )
    assert len({train_fingerprint(config.replace(**{"train.gist": k}), "prepared") for k in (0, K, K + 1)}) == 3
