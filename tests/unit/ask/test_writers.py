"""Who writes: which writer a run has, what its adapter learns from, and that a reply follows its seed alone."""

import pytest

from pi_ray.ask import train_writer as training
from pi_ray.ask import writers
from pi_ray.ask.ask import queries_fingerprint
from pi_ray.ask.needs import needed_units, touched_units
from pi_ray.ask.requests import adapter_prompt
from pi_ray.ask.sources import Sources
from pi_ray.ask.train_writer import train_writer, writer_config, writer_pairs
from pi_ray.ask.writers import PromptedWriter, choose_writer, query_tokens
from pi_ray.ask.writing_workers import WritingWorker
from pi_ray.config import PromptConfig, RunConfig
from pi_ray.models import load_tokenizer
from pi_ray.prompt import PromptEncoder
from pi_ray.protocols import Row
from pi_ray.train.base_size import BaseSize
from pi_ray.train.batches import PhaseDataset
from pi_ray.units import UnitIndex, find_units
from tests.lora import write_adapter

TEMPLATE = "Answer with a code.\n\n## Colours\n\nred: k4\nblue: z9\ngreen: q1\n\n## Sizes\n\nsmall: s1\nlarge: s7\n"
SHARP = 0.02  # temperature: the tokens of a random model are about equally likely, and rounding would choose among them
INDEX = UnitIndex(find_units(TEMPLATE))
ROWS = [Row(f"{c}-{s}", f"a {s} {c} one", f"{k} {n}")
        for c, k in (("red", "k4"), ("blue", "z9")) for s, n in (("small", "s1"), ("large", "s7")) for _ in range(6)]


@pytest.fixture
def config(tmp_path, tiny_model):
    return RunConfig.model_validate({
        "name": "tiny", "run_dir": str(tmp_path), "model": {"base": str(tiny_model)}, "prompt": {"chat": "chatml"},
        "task": {"queries": "generate"}, "ask": {"updates": 3},
        "train": {"objective": "distill", "workers": 3, "batch_size": 6, "backend": {"name": "ddp"}},
    })


def test_a_row_teaches_to_write_from_each_of_its_two_most_telling_units_and_from_both():
    needed = needed_units(ROWS[:6], touched_units(ROWS[:6], INDEX), INDEX)
    pairs = writer_pairs(ROWS[:1], needed[:1], INDEX.units)
    one, other, both = (prompt for prompt, _ in pairs)
    assert both == one.removesuffix("Request:") + other and one != other
    assert {query for _, query in pairs} == {"a small red one"}


def test_training_is_a_run_of_one_phase_without_template_on_those_pairs(config, monkeypatch):
    trained = []
    monkeypatch.setattr(training.launch, "train", lambda config, watch: trained.append(config))
    pairs = writer_pairs(ROWS, needed_units(ROWS, touched_units(ROWS, INDEX), INDEX), INDEX.units)
    folder = train_writer(config, pairs)
    assert folder == config.root / "writer" / "adapters" / "phase-0"
    run = trained[0]
    assert run == writer_config(config)
    assert (run.train.objective, run.train.batch_size, run.schedule.list[0].steps) == ("sft", 18, 3)
    encoder = PromptEncoder(load_tokenizer(config.model), run.prompt)
    learned, held = (PhaseDataset(config.root / "writer" / "phases" / name) for name in ("0", "dev"))
    assert len(learned) + len(held) == len(pairs) and len(held) == 8
    prompt, label = held.take([0])[0]
    assert (prompt, label) == (encoder.row(pairs[0][0]), encoder.answer(pairs[0][1]))
    assert learned.prefix == encoder.prefix("")
    left = config.root / "writer" / "checkpoints"
    left.mkdir()
    train_writer(config, pairs)
    assert left.exists(), "a stopped training goes on"
    train_writer(config.replace(**{"ask.updates": 4}), pairs)
    assert not left.exists(), "another one begins anew, instead of stumbling over these checkpoints"


@pytest.mark.parametrize("adapted", [False, True])
def test_a_reply_depends_on_its_seed_and_not_on_its_batch(tiny_model, tmp_path, adapted):
    adapter = str(write_adapter(tmp_path / "adapter", tiny_model)) if adapted else ""
    worker = WritingWorker(_model(tiny_model), PromptConfig(chat="chatml"), "", adapter, SHARP, 0.95)
    prompts = [adapter_prompt([unit]) for unit in INDEX.units]
    together = worker({"prompts": prompts, "seeds": [*range(len(prompts))], "limit": 8})
    alone = [worker({"prompts": [p], "seeds": [i], "limit": 8})[0] for i, p in enumerate(prompts)]
    assert together == alone
    assert worker({"prompts": prompts, "seeds": [7] * len(prompts), "limit": 8}) != together


def test_a_prefix_is_computed_once_and_stands_before_each_prompt(tiny_model):
    worker = WritingWorker(_model(tiny_model), PromptConfig(chat="none"), "Read this.", "", SHARP, 0.9)
    plain = WritingWorker(_model(tiny_model), PromptConfig(chat="none"), "", "", SHARP, 0.9)
    assert worker.cache.get_seq_length() == len(worker.encoder.prefix("Read this.")) > len(plain.prefix)
    asked = {"prompts": ["one", "two"], "seeds": [3, 4], "limit": 6}
    assert worker(asked) == worker(asked) != plain(asked)


def test_auto_is_an_adapter_on_small_bases_and_prompts_on_large_ones(config, monkeypatch):
    assert choose_writer(config, 2) == "adapter"
    monkeypatch.setattr(writers, "base_size", lambda model: BaseSize(3_000_000_000, 0, 0))
    assert choose_writer(config, 0) == "prompt"
    assert choose_writer(config.replace(**{"ask.writer": "adapter"}), 2) == "adapter"


@pytest.mark.parametrize(("writer", "key", "value", "counts"), [
    ("prompt", "train.seed", 7, False), ("prompt", "train.lora.rank", 4, False), ("endpoint", "train.seed", 7, False),
    ("adapter", "train.seed", 7, True), ("adapter", "train.lora.rank", 4, True), ("adapter", "train.warmup", 0.5, True),
    ("adapter", "train.weight_decay", 0.5, True), ("adapter", "train.lr", 0.5, False),
    ("adapter", "train.distill.views", 3, False),
])
def test_settings_of_training_count_for_generated_queries_where_an_adapter_is_trained_by_them(
    config, writer, key, value, counts
):
    asks, sources = config.replace(**{"ask.writer": writer}), Sources(TEMPLATE, ROWS)
    changed = queries_fingerprint(asks, sources) != queries_fingerprint(asks.replace(**{key: value}), sources)
    assert changed == counts


def test_a_query_may_be_a_quarter_longer_than_any_known_one(config, monkeypatch):
    tokenizer = load_tokenizer(config.model)
    longest = max(len(tokenizer(row.query).input_ids) for row in ROWS)
    assert query_tokens(config, Sources(TEMPLATE, ROWS)) == round(1.25 * longest) + 1
    monkeypatch.setattr(writers, "TOKENISED", 7)
    sizes: list[int] = []

    def counted(texts):
        sizes.append(len(texts))
        return tokenizer(texts)

    monkeypatch.setattr(writers, "load_tokenizer", lambda model: counted)
    assert query_tokens(config, Sources(TEMPLATE, ROWS)) == round(1.25 * longest) + 1
    assert max(sizes) == 7 and sum(sizes) == len(ROWS), "a log of millions is not tokenised at once"
    assert query_tokens(config, Sources(TEMPLATE)) == writers.QUERY_TOKENS


def test_a_prompted_writer_takes_the_chat_template_of_its_base_where_there_is_one(config):
    has_one = bool(load_tokenizer(config.model).chat_template)
    assert PromptedWriter(config, TEMPLATE, 9).prompt.chat == ("model+system" if has_one else "none")


def _model(folder):
    return RunConfig(name="tiny", model={"base": str(folder)}).model
