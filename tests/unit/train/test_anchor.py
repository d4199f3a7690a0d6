"""The anchor against forgetting: which rows it has, who judges them, and what they weigh in an update."""

import json

import pyarrow.parquet as pq
import pytest
import torch

from pi_ray.config.run_file import parse_run_file
from pi_ray.errors import ConfigError
from pi_ray.evaluate.forgetting import off_task_texts
from pi_ray.models import load_model, load_tokenizer
from pi_ray.prompt import PromptEncoder
from pi_ray.run.directory import RunDir
from pi_ray.schedule import plan_phases
from pi_ray.train import anchor, answer_scores
from pi_ray.train.anchor import AnchorRows
from pi_ray.train.batches import PhaseDataset, packed_batch, plain_batch
from pi_ray.train.dataloader import TrainDataLoader
from pi_ray.train.distilled_rows import ANCHOR_FILE, DistilledRows
from pi_ray.train.launch import fingerprint_of
from pi_ray.train.trainer import train_worker
from pi_ray.train.updates import mixed_batch_rows, plan_updates
from tests import workers
from tests.prepared import prepare_by_hand, tiny_config
from tests.unit.train.test_train import adapter_hash, dies_and_goes_on, log_of, settings

PAIRS = [
    {"query": "Who are you?", "answer": "A model."}, {"query": "Name three fruits.", "answer": "Pears, plums, figs."},
]
ALL = {
    "schedule.epochs": 2, "schedule.shots": 0, "train.objective": "distill", "train.distill": {
        "top_k": 4, "views": 1, "agreement": "off", "held_out": 0, "labelled": 0.5, "anchor": 0.25, "on_policy": 0.5,
        "on_policy_every": 2,
    },
}


def use_pairs(folder, monkeypatch):
    """Two short rows in place of the bundled ones."""
    file = folder / "anchor.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    monkeypatch.setattr(anchor, "ANCHOR", file)


@pytest.fixture(autouse=True)
def short(tmp_path, monkeypatch):
    use_pairs(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def anchored(tiny_model, tmp_path_factory):
    """A run with labelled rows, anchor rows and an on-policy part."""
    config = tiny_config(tiny_model, tmp_path_factory.mktemp("anchored"), **ALL)
    prepare_by_hand(config)
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_pairs(tmp_path_factory.mktemp("pairs"), monkeypatch)
        train_worker(settings(config))
    return config


def rows_of_phase(config, phase):
    run = RunDir(config.root)
    data = PhaseDataset(run.phase(phase)), PhaseDataset(run.phase(f"unlabelled-{phase}"))
    return DistilledRows(run.teacher_answers, *data, config.train, AnchorRows(config))


def test_the_bundled_rows_share_no_run_of_five_words_with_the_texts_that_measure_forgetting(monkeypatch):
    monkeypatch.undo()
    pairs = [json.loads(line) for line in anchor.ANCHOR.read_text(encoding="utf-8").splitlines()]
    runs = lambda text: {tuple(text.lower().split()[i : i + 5]) for i in range(len(text.split()) - 4)}  # noqa: E731
    measured = set().union(*map(runs, off_task_texts()))
    assert len(pairs) >= 30 and len({pair["query"] for pair in pairs}) == len(pairs)
    assert not set().union(*(runs(f"{pair['query']} {pair['answer']}") for pair in pairs)) & measured


def test_rows_stand_in_the_runs_chat_frame_without_its_template_and_wording(anchored):
    config = anchored.replace(**{"prompt.query": "Translate: {query}"})
    rows, encoder = AnchorRows(config), PromptEncoder(load_tokenizer(config.model), anchored.prompt)
    assert rows.prefix == encoder.prefix("") and len(rows) == 2
    assert rows.take([1]) == [(encoder.row("Name three fruits."), encoder.answer("Pears, plums, figs."))]


def test_the_base_model_judges_them(anchored):
    made = pq.read_table(RunDir(anchored.root).teacher_answers / ANCHOR_FILE).to_pylist()
    rows, bare = AnchorRows(anchored), load_model(anchored.model, "cpu").eval()
    labels = {n: label for n, (_, label) in enumerate(rows.take(range(2)))}
    again = answer_scores.score_answers(bare, plain_batch, [rows.prefix], rows, labels, 4, 2)
    for row, expected in zip(made, again, strict=True):
        assert row["label_ids"] == expected["label_ids"]
        assert row["top_logprobs"] == pytest.approx(expected["top_logprobs"], abs=1e-4)


def test_an_anchor_row_counts_as_much_as_a_row_with_an_answer_of_mean_length(anchored):
    data = rows_of_phase(anchored, 2)
    own = data.kinds.labelled + data.kinds.answered
    mean = data.label_lengths[:own].mean()
    assert data.kinds.anchor == 2 and len(data) == own + 2
    targets = data.targets([own + 1])
    assert targets.weights.sum().item() == pytest.approx(mean, rel=1e-5) and (targets.tail > 0).all()
    assert data.token_counts[[0, own]].tolist() == [data.label_lengths[0], mean]


def test_anchor_rows_never_stand_behind_a_template(anchored):
    data, last = rows_of_phase(anchored, 1), rows_of_phase(anchored, 2)
    own = data.kinds.labelled + data.kinds.answered
    assert data.by_prefix([3, own, 0]) == [(data.prefix, [3, 0]), (data.anchor_prefix, [own])]
    assert data.prefix != data.anchor_prefix == last.prefix
    assert last.by_prefix([3, own, 0]) == [(last.prefix, [3, own, 0])]


@pytest.mark.parametrize("pack", [packed_batch, plain_batch])
def test_a_part_of_an_update_has_one_batch_for_each_prefix(anchored, pack):
    updates = plan_updates([12] * 3, plan_phases(anchored.schedule), anchored.train)
    loader = TrainDataLoader(anchored, fingerprint_of(anchored), updates, pack)
    for update, batches in ((updates[7], 2), (updates[13], 1)):
        made, data = loader[update], rows_of_phase(anchored, update.phase)
        (part,) = made.parts
        rows = mixed_batch_rows(update, data.kinds, anchored.train)
        assert len(part) == batches and made.answer_tokens == pytest.approx(data.token_counts[rows].sum())
        assert sum(len(targets.ids) for _, targets in part) == data.label_lengths[rows].sum()
        for batch, targets in part:
            assert (batch.labels != -100).sum() == len(targets.ids)
    loader.close()


def test_workers_of_sharded_weights_make_as_many_passes_as_each_other(anchored):
    """Also where one of them has no anchor row: it would not come to the collective operations of the others' pass."""
    sharded = anchored.replace(**{
        "train.backend": {"name": "deepspeed", "zero_stage": 3}, "train.distill": {"anchor": 0.25},
    })
    updates = plan_updates([12] * 3, plan_phases(sharded.schedule), sharded.train)
    loaders = [TrainDataLoader(sharded, "by-hand", updates, packed_batch, rank, 3) for rank in range(3)]
    for loader in loaders:
        loader.has_answers, loader.fingerprint = True, fingerprint_of(anchored)
    uneven = 0
    for update in (u for u in updates if u.phase == 1):
        parts = [loader[update].parts for loader in loaders]
        assert len({tuple(map(len, some)) for some in parts}) == 1
        uneven += len({tuple(sum(t is None for _, t in part) for part in some) for some in parts}) > 1
        data = rows_of_phase(anchored, 1)
        rows = mixed_batch_rows(update, data.kinds, sharded.train)
        learned = sum(int((batch.labels != -100).sum()) for some in parts for part in some for batch, _ in part)
        assert learned == data.label_lengths[rows].sum()
    assert uneven, "some worker had no anchor row"
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("stop_at", [9, 16])
def test_a_run_with_all_options_that_dies_goes_on_to_the_same_adapter(anchored, tmp_path, monkeypatch, stop_at):
    config = anchored.replace(run_dir=str(tmp_path / "run"))
    prepare_by_hand(config)
    dies_and_goes_on(config, stop_at, monkeypatch)
    assert adapter_hash(config) == adapter_hash(anchored)
    (said,) = [e for e in log_of(config) if e.get("event") == "teacher_answers"]
    assert "25% of the rows hold the base model's answers to everyday questions, against forgetting" in said["options"]


def train_one(config, folder):
    """One of several workers."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_pairs(folder, monkeypatch)
        train_worker(settings(config))


def test_two_workers_of_deepspeed_learn_the_same_up_to_rounding(anchored, tmp_path):
    zero = {"name": "deepspeed", "zero_stage": 2}
    config = anchored.replace(**{"run_dir": str(tmp_path / "run"), "train.workers": 2, "train.backend": zero})
    prepare_by_hand(config)
    workers.run(2, train_one, config, tmp_path)
    one, two = ([e["loss"] for e in log_of(c) if "loss" in e] for c in (anchored, config))
    assert two == pytest.approx(one, abs=1e-4)
    written = [[(e["answers"], e["tokens"]) for e in log_of(c) if "replaced" in e] for c in (anchored, config)]
    assert written[0] == written[1] and written[0]


@pytest.mark.parametrize(("text", "says"), [
    ("train: {objective: distill, distill: {labelled: 0.75, anchor: 0.5}}", "more than all of it"),
    ("train: {objective: distill, distill: {anchor: 0.1}, lora: {method: pissa}}", "as teacher or anchor"),
])  # fmt: skip
def test_anchor_settings_that_make_no_sense_are_refused(text, says):
    with pytest.raises(ConfigError, match=says):
        parse_run_file(f"name: a\n{text}", "run.yaml")
