"""What happens inside the actor that answers test rows: generated, timed, merged and probed, column by column."""

import torch

from pi_ray.config import ModelConfig, PromptConfig
from pi_ray.evaluate.columns import AnswerLengths, Column
from pi_ray.evaluate.generation_workers import KINDS, Generator, LoadedAdapters, median_latencies, work_item
from pi_ray.models import load_model
from tests.lora import TEMPLATE, write_adapter

PROMPT = PromptConfig(chat="none", query="Q: {query}\nA:")


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}


def test_merging_gives_the_same_logits_and_leaves_the_base_weights_as_they_were(tiny_model, tmp_path):
    folders = [str(write_adapter(tmp_path / name, tiny_model, seed)) for name, seed in (("a", 1), ("b", 2))]
    base, ids = load_model(ModelConfig(base=str(tiny_model)), "cpu"), torch.tensor([[5, 6, 7]])
    loaded = LoadedAdapters(base, folders)
    loaded.activate(folders[0])
    before = weights(loaded.model)
    with torch.no_grad():
        apart = loaded.model(input_ids=ids).logits
        with loaded.merged():
            assert torch.allclose(loaded.model(input_ids=ids).logits, apart, atol=1e-4)
        assert torch.equal(loaded.model(input_ids=ids).logits, apart)
    assert all(torch.equal(p, before[name]) for name, p in weights(loaded.model).items())


def test_a_column_is_answered_timed_and_probed_with_its_own_adapter_and_prefix(tiny_model, tmp_path):
    folder = str(write_adapter(tmp_path / "a", tiny_model))
    generator = Generator(ModelConfig(base=str(tiny_model)), PROMPT, [folder], AnswerLengths(4, 2))
    encoder = generator.encoder
    columns = [Column("base", "", TEMPLATE, 0), Column("promptintern", folder, "", 0)]
    prompts = {c.name: (encoder.prefix(c.template), [encoder.row(q) for q in ("red", "blue")]) for c in columns}
    base, mine = (generator(work_item(c, prompts, [0, 1])) for c in columns)
    assert len(base) == len(mine) == 2 and all(len(ids) <= 4 for ids in base + mine)
    assert base != mine
    base_seconds, own_seconds = (generator(work_item(c, prompts, [0, 1], timed=True)) for c in columns)
    assert [len(row) for row in base_seconds + own_seconds] == [2, 2, 3, 3], "an adapter is timed merged too"
    assert all(row[0] == row[1] for row in own_seconds), "without a prefix there is nothing to cache"
    assert generator(work_item(columns[0], prompts, [0, 1])) == base, "timing changes nothing"
    probes = [generator(work_item(c, prompts, [], probe=TEMPLATE)) for c in columns]
    assert probes[0].keys() == {"off_task_perplexity", "recited", "longest_run"}
    assert probes[0]["off_task_perplexity"] != probes[1]["off_task_perplexity"]


def test_medians_are_of_each_kind():
    assert median_latencies([(3.0, 1.0, 2.0), (1.0, 2.0, 2.5), (2.0, 9.0, 0.1)]) == dict(
        zip(KINDS, (2.0, 2.0, 2.0), strict=True)
    )
    assert median_latencies([(3.0, 1.0)]) == {"latency_s": 3.0, "latency_cached_s": 1.0}
