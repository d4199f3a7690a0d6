"""On-policy distillation: what the student writes, what the teacher puts in its place, and that a resumed run reads the
same answers.
"""

import math

import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel

from pi_ray.config import TrainConfig
from pi_ray.config.run_file import parse_run_file
from pi_ray.errors import ConfigError, TrainingError
from pi_ray.models import load_model, load_tokenizer
from pi_ray.run.artifact import verify_artifact
from pi_ray.run.directory import RunDir
from pi_ray.schedule import Phase
from pi_ray.train import answer_scores, distill
from pi_ray.train.batches import PhaseDataset, plain_batch
from pi_ray.train.distilled_rows import ROUND_FILE, DistilledRows
from pi_ray.train.generation import generate_greedy
from pi_ray.train.on_policy import RESTARTS, jensen_shannon
from pi_ray.train.trainer import Trainer, train_worker
from pi_ray.train.updates import Round, plan_rounds, plan_updates
from tests.prepared import prepare_by_hand, tiny_config
from tests.unit.train.test_taught_from_start import prepared as taught_from_start
from tests.unit.train.test_train import adapter_hash, dies_and_goes_on, log_of, settings

ON_POLICY = {
    "schedule.epochs": 2, "schedule.shots": 0, "train.objective": "distill", "train.distill.top_k": 4,
    "train.distill.agreement": "off", "train.distill.held_out": 0, "train.distill.on_policy": 1.0,
    "train.distill.on_policy_every": 4,
}


def train(model, root, **changes):
    config = tiny_config(model, root, **{**ON_POLICY, **changes})
    prepare_by_hand(config)
    train_worker(settings(config))
    return config


@pytest.fixture(scope="module")
def untouched(tiny_model, tmp_path_factory):
    """The teacher replaces nothing: it judges the student's answers as they are."""
    return train(tiny_model, tmp_path_factory.mktemp("untouched"), **{"train.distill.on_policy_divergence": 1})


@pytest.fixture(scope="module")
def mended(tiny_model, tmp_path_factory):
    """The teacher replaces every token that is not its own likeliest."""
    return train(tiny_model, tmp_path_factory.mktemp("mended"), **{"train.distill.on_policy_divergence": 0})


def written(config, number=0):
    return pq.read_table(RunDir(config.root).student_answers / f"round-{number:04d}" / ROUND_FILE).to_pylist()


def events(config):
    return [e for e in log_of(config) if e.get("event") == "student_answers"]


def adapted(config, phase):
    return PeftModel.from_pretrained(load_model(config.model, "cpu"), RunDir(config.root).adapter(phase)).eval()


def rows_of_phase(config):
    run = RunDir(config.root)
    return DistilledRows(
        run.teacher_answers, PhaseDataset(run.phase(2)), PhaseDataset(run.phase("unlabelled-2")), config.train
    )


def test_rounds_are_the_last_updates_of_the_last_phase():
    config = TrainConfig(workers=1, batch_size=4, objective="distill", distill={"on_policy": 0.5, "on_policy_every": 3})
    updates = plan_updates([16, 16], [Phase(1, 0, 2), Phase(0, 0, 5)], config)
    assert plan_rounds(updates, config) == [Round(0, 18, 21), Round(1, 21, 24), Round(2, 24, 27), Round(3, 27, 28)]
    assert plan_rounds(updates, config.model_copy(update={"objective": "sft"})) == []


def test_the_student_writes_greedily_with_its_own_prompt(untouched):
    """The student of the first round is the adapter that the phase before it left."""
    data, made = rows_of_phase(untouched), written(untouched)
    prompts = [prompt for prompt, _ in data.take([row["number"] for row in made])]
    limit, end = distill.longest_answer_tokens(untouched), load_tokenizer(untouched.model).eos_token_id
    again = generate_greedy(adapted(untouched, 1), data.prefix, prompts, limit, end)
    assert made and [row["label_ids"] for row in made] == [
        [*ids, *([end] if len(ids) < limit else [])] for ids in again
    ]
    assert all(data.kinds.is_answered(row["number"]) and not row["replaced"] for row in made)


def test_the_teacher_judges_each_token_with_the_whole_prompt(untouched):
    data, made = rows_of_phase(untouched), written(untouched)
    queries = PhaseDataset(RunDir(untouched.root).phase("unlabelled-0"))
    answers = {data.number_in_phase(row["number"]): row["label_ids"] for row in made}
    again = answer_scores.score_answers(adapted(untouched, 0), plain_batch, [queries.prefix], queries, answers, 4, 5)
    for row, expected in zip(made, again, strict=True):
        assert row["top_logprobs"] == pytest.approx(expected["top_logprobs"], abs=1e-3)


def test_where_both_differ_the_teachers_token_stands_and_the_student_writes_on(mended):
    made, end = written(mended), load_tokenizer(mended.model).eos_token_id
    assert sum(row["replaced"] for row in made) and all(row["replaced"] <= RESTARTS + 1 for row in made)
    for row in made:
        assert row["label_ids"] == row["top_ids"][::4], "every token is the teacher's likeliest"
        assert len(row["top_ids"]) == 4 * len(row["label_ids"]) and end not in row["label_ids"][:-1]


def test_the_log_says_how_much_was_written_replaced_and_how_far_both_are_apart(mended, untouched):
    assert [e["step"] for e in events(mended)] == [12, 16] and [e["round"] for e in events(mended)] == [0, 1]
    for config in (mended, untouched):
        made, said = written(config), events(config)[0]
        tokens = sum(len(row["label_ids"]) for row in made)
        assert (said["answers"], said["tokens"]) == (len(made), tokens)
        assert said["replaced"] == sum(row["replaced"] for row in made)
        assert said["divergence"] == pytest.approx(sum(row["divergence"] for row in made) / tokens, abs=1e-5)
        assert 0 < said["divergence"] < 1
    assert "the last 100% of the last phase's updates" in str(log_of(mended))


def test_updates_of_a_round_learn_from_its_answers_and_labelled_rows_keep_their_labels(mended):
    data, table = rows_of_phase(mended), pq.read_table(
        RunDir(mended.root).student_answers / "round-0000" / ROUND_FILE
    )
    own, number = data.with_answers(table), table["number"][0].as_py()
    assert own.take([number])[0] == (data.take([number])[0][0], table["label_ids"][0].as_py())
    assert own.take([0]) == data.take([0]) and len(own) == len(data)
    targets = own.targets([0, number])
    labels = own.label_lengths[0]
    assert len(targets.ids) == labels + own.label_lengths[number]
    assert (targets.tail[:labels] == 0).all() and (targets.tail[labels:] > 0).all(), "a bucket for other tokens"
    assert torch.allclose(targets.probs.sum(1) + targets.tail, torch.ones(len(targets.ids)), atol=1e-6)


def test_of_the_students_own_answers_the_teachers_distribution_alone_is_learned(mended):
    distill_keys = {**mended.train.distill.model_dump(), "agreement": "weight", "share": 0.25}
    keys = {"objective": "mixed", "distill": distill_keys}
    run, train = RunDir(mended.root), TrainConfig(**{**mended.train.model_dump(), **keys})
    table = pq.read_table(run.student_answers / "round-0000" / ROUND_FILE)
    data = DistilledRows(
        run.teacher_answers, PhaseDataset(run.phase(2)), PhaseDataset(run.phase("unlabelled-2")), train
    )
    number = table["number"][0].as_py()
    before, after = data.targets([number]), data.with_answers(table).targets([number])
    assert (before.shares == 0.25).all() and (after.shares == 1).all() and (after.weights == 1).all()
    assert (data.targets([number]).shares == 0.25).all(), "the rows as they were stay so"


def check_resumed(quiet, root, monkeypatch, stop_at, **changes):
    """A run like `quiet` dies before an update, goes on, and ends with the same adapter, answers and log."""
    dies = quiet.replace(run_dir=str(root), **changes)
    prepare_by_hand(dies)
    dies_and_goes_on(dies, stop_at, monkeypatch)
    assert adapter_hash(dies) == adapter_hash(quiet)
    said = [[{**e, "seconds_writing": 0} for e in events(c)] for c in (dies, quiet)]
    assert said[0] == said[1]
    for name in ("round-0000", "round-0001"):
        files = [verify_artifact(RunDir(c.root).student_answers / name)["files"] for c in (dies, quiet)]
        assert files[0] == files[1]


@pytest.mark.parametrize(("stop_at", "every"), [(12, 4), (15, 2)])
def test_a_run_that_dies_in_its_on_policy_part_goes_on_to_the_same_adapter(
    mended, tmp_path, monkeypatch, stop_at, every
):
    check_resumed(mended, tmp_path, monkeypatch, stop_at, **{"train.checkpoint_every": every})


def test_sampled_answers_differ_from_greedy_ones_and_are_the_same_again(untouched, tmp_path, monkeypatch):
    quiet = train_again(untouched, tmp_path / "quiet", **{"train.distill.on_policy_temperature": 1.0})
    answers = [[row["label_ids"] for row in written(c)] for c in (quiet, untouched)]
    assert len(answers[0]) == len(answers[1]) and answers[0] != answers[1]
    check_resumed(quiet, tmp_path / "dies", monkeypatch, 17)


def train_again(config, root, **changes):
    config = config.replace(run_dir=str(root), **changes)
    prepare_by_hand(config)
    train_worker(settings(config))
    return config


def test_a_student_that_was_trained_on_does_not_write_again(mended, tmp_path, monkeypatch):
    config = mended.replace(run_dir=str(tmp_path))
    prepare_by_hand(config)
    monkeypatch.setattr(Trainer, "finish", lambda self: None)  # as if killed before the end
    train_worker(settings(config))
    (RunDir(tmp_path).student_answers / "round-0000" / "manifest.json").unlink()
    for name in ("step-00000016", "step-00000018"):
        RunDir(tmp_path).checkpoints.joinpath(name).rename(tmp_path / name)
    with pytest.raises(TrainingError, match=r"round-0000: the student's answers are missing .* trained on since"):
        train_worker(settings(config))


def test_a_base_that_teaches_from_the_start_judges_with_the_whole_prompt(tiny_model, tmp_path, monkeypatch):
    """Its student's only phase has no template, and the teacher reads all of it. The random base ends no answer."""
    def generate_answers(model, prefix, cache, data, numbers, limit, end, *_):
        size = model.get_base_model().config.vocab_size
        even = answer_scores.Likeliest(torch.arange(8).expand(3, -1), torch.full((3, 8), -math.log(size)), size)
        return {n: ([5, 9, end], even) for n in numbers}

    monkeypatch.setattr(distill, "generate_answers", generate_answers)
    keys = {"agreement": "off", "known_confidence": None, "held_out": 0, "on_policy": 0.5, "on_policy_divergence": 1}
    config = taught_from_start(tiny_model, tmp_path, **{f"train.distill.{key}": value for key, value in keys.items()})
    train_worker(settings(config))
    run, bare, made = RunDir(config.root), load_model(config.model, "cpu").eval(), written(config)
    queries = PhaseDataset(run.phase("unlabelled-0"))
    rows = DistilledRows(run.teacher_answers, PhaseDataset(run.phase(0)), queries, config.train)
    answers = {rows.number_in_phase(row["number"]): row["label_ids"] for row in made}
    views = distill.view_prefixes(config)[:1]
    again = list(answer_scores.score_answers(bare, plain_batch, views, queries, answers, 4, 5))
    assert made and len(made) == len(again)
    for row, expected in zip(made, again, strict=True):
        assert row["top_logprobs"] == pytest.approx(expected["top_logprobs"], abs=1e-3)


def test_the_divergence_is_a_share_of_one_bit():
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.softmax(2 * torch.randn(6, 9, generator=generator), -1) for _ in range(2))
    mean = (p + q) / 2
    entropy = lambda x: -(x * x.log2()).sum(-1)  # noqa: E731
    expected = entropy(mean) - (entropy(p) + entropy(q)) / 2
    assert torch.allclose(jensen_shannon(p.log(), q.log()), expected, atol=1e-5)
    assert jensen_shannon(p.log(), p.log()).max() < 1e-6
    apart = torch.log_softmax(torch.tensor([[90.0, 0, 0], [0, 90.0, 0]]), -1)
    assert jensen_shannon(apart[:1], apart[1:]).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("text", "says"), [
    ("{on_policy_divergence: 0.5}", "on_policy is 0"),
    ("{on_policy: 0.25}, lora: {method: pissa}", "does not allow; take lora, rslora or dora"),
    ("{on_policy: 0.25, teacher: endpoint}", "an endpoint's answers are learned as labels are"),
])  # fmt: skip
def test_on_policy_settings_that_make_no_sense_are_refused(text, says):
    with pytest.raises(ConfigError, match=says):
        parse_run_file(f"name: a\ntrain: {{objective: distill, distill: {text}}}", "run.yaml")
