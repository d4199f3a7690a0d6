"""Distillation: which answers a teacher with the full prompt gives, which are kept, and how students learn from
them.
"""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pi_ray.config import DistillConfig, TrainConfig
from pi_ray.config.run_file import parse_run_file
from pi_ray.errors import ConfigError, TrainingError
from pi_ray.models import load_model, load_tokenizer
from pi_ray.prompt import PromptEncoder
from pi_ray.run.artifact import verify_artifact
from pi_ray.run.directory import RunDir
from pi_ray.run.fingerprint import train_fingerprint
from pi_ray.run.phases import plain_finetuning_config
from pi_ray.train import answer_scores, distill, shared_prefix
from pi_ray.train.batches import PhaseDataset, packed_batch, plain_batch
from pi_ray.train.distilled_rows import FILE, SCHEMA, DistilledRows, Targets, choose_kept
from pi_ray.train.facts import FactGroup
from pi_ray.train.generation import compute_prefix_cache
from pi_ray.train.objectives import distill_loss, sft_loss
from pi_ray.train.teacher_rows import open_teacher_rows
from pi_ray.train.trainer import Trainer, train_worker
from tests.prepared import prepare_by_hand, tiny_config
from tests.unit.train.test_train import adapter_hash, dies_and_goes_on, log_of, settings


@pytest.fixture(scope="module")
def distilled(tiny_model, tmp_path_factory):
    changes = {
        "schedule.epochs": 2, "train.objective": "distill", "train.distill.top_k": 4, "train.distill.held_out": 0,
        "train.distill.label_weight": 0.0,  # so that the teacher judges labels too
    }
    config = tiny_config(tiny_model, tmp_path_factory.mktemp("distilled"), **changes)
    prepare_by_hand(config)
    train_worker(settings(config))
    return config


def rows_of(config):
    return pq.read_table(RunDir(config.root).teacher_answers / FILE).to_pylist()


def labels_of(data):
    return dict(enumerate(label for _, label in data.take(range(len(data)))))


def event(config):
    return next(e for e in log_of(config) if e.get("event") == "teacher_answers")


def test_the_teacher_judges_every_labelled_row_and_what_it_answered_itself(distilled):
    made = rows_of(distilled)
    assert [r["number"] for r in made if r["labelled"]] == list(range(12))
    assert len(made) == 12 + event(distilled)["answered"] and event(distilled)["queries"] == 12
    for row in made:
        assert len(row["top_ids"]) == len(row["top_logprobs"]) == 4 * len(row["label_ids"])
        assert row["confidence"] <= 0


def test_the_teacher_is_the_adapter_as_the_first_phase_leaves_it(distilled):
    """Its confidence in the labels, computed again from the published adapter of phase 0 with ordinary batches."""
    from peft import PeftModel

    run = RunDir(distilled.root)
    model = PeftModel.from_pretrained(load_model(distilled.model, "cpu"), run.adapter(0)).eval()
    data = PhaseDataset(run.phase(0))
    again = answer_scores.score_answers(model, plain_batch, [data.prefix], data, labels_of(data), 4, 5)
    assert [e["confidence"] for e in again] == pytest.approx(
        [r["confidence"] for r in rows_of(distilled) if r["labelled"]], abs=1e-3
    )


@pytest.mark.parametrize("views", [1, 2])
def test_the_first_view_judges_while_it_writes(distilled, views):
    """The rows are those of one more forward pass of the first view over its answers."""
    from peft import PeftModel

    run, end = RunDir(distilled.root), load_tokenizer(distilled.model).eos_token_id
    model = PeftModel.from_pretrained(load_model(distilled.model, "cpu"), run.adapter(0)).eval()
    data = open_teacher_rows(distilled, "unlabelled")
    prefixes, told = [data.prefix, data.prefix[::-1]][:views], []
    cache = compute_prefix_cache(model, data.prefix)
    written = answer_scores.generate_answers(model, data.prefix, cache, data, range(12), 40, end, 4, told.append)
    answers = {n: label for n, (label, _) in written.items()}
    noted = {n: likeliest for n, (_, likeliest) in written.items()}
    assert len(answers) == event(distilled)["answered"] > 0 and told == [12]
    found = list(answer_scores.score_answers(model, plain_batch, prefixes, data, answers, 4, 5, noted))
    again = list(answer_scores.score_answers(model, plain_batch, prefixes, data, answers, 4, 5))
    assert len(found) == len(again) == len(answers)
    for row, expected in zip(found, again, strict=True):
        assert row["top_logprobs"] == pytest.approx(expected["top_logprobs"], abs=1e-3)
        assert row["confidence"] == pytest.approx(expected["confidence"], abs=1e-3)
        assert row["agreement"] == expected["agreement"] and row["top_ids"] == expected["top_ids"]


def test_what_is_not_noted_of_a_distribution_is_spread_evenly():
    few = answer_scores.Likeliest(torch.tensor([[3, 1]]), torch.tensor([[0.5, 0.2]]).log(), vocabulary=5)
    assert few.spread("cpu").exp().tolist() == [pytest.approx([0.1, 0.2, 0.1, 0.5, 0.1])]
    whole = answer_scores.Likeliest(torch.tensor([[1, 0]]), torch.tensor([[0.75, 0.25]]).log(), vocabulary=2)
    assert whole.spread("cpu").exp().tolist() == [pytest.approx([0.25, 0.75])]


def test_many_queries_are_answered_and_judged_a_part_at_a_time(distilled, tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "BATCH_ROWS", 5)
    config = trained_with(distilled, tmp_path)
    exact = ("number", "labelled", "label_ids", "agreement")
    for row, expected in zip(rows_of(config), rows_of(distilled), strict=True):
        assert [row[name] for name in exact] == [expected[name] for name in exact]
        assert row["top_logprobs"] == pytest.approx(expected["top_logprobs"], abs=1e-3)


def test_every_objective_has_the_same_number_of_updates(distilled):
    assert len([e for e in log_of(distilled) if "loss" in e]) == 18


def test_an_answer_that_is_not_sure_enough_is_not_learned_from(distilled):
    run = RunDir(distilled.root)
    sure = sorted(r["confidence"] for r in rows_of(distilled) if not r["labelled"])
    if not sure:
        pytest.fail("the tiny model ended no answer; the test needs some")
    data = [
        DistilledRows(
            run.teacher_answers, PhaseDataset(run.phase(2)), PhaseDataset(run.phase("unlabelled-2")),
            TrainConfig(objective="distill", distill={"confidence": confidence}),
        )
        for confidence in (None, sure[-1], 0.0)
    ]
    assert [len(d) for d in data] == [12 + len(sure), 12 + sure.count(sure[-1]), 12]


def test_an_answer_whose_facts_labels_have_too_must_be_surer_than_one_that_tells_something_new(distilled):
    rows = [
        {"labelled": own, "confidence": sure, "agreement": 1.0, "held_out": False, "novel": novel}
        for own, sure, novel in [(True, -9.0, False), (False, -0.05, False), (False, -0.5, False), (False, -0.5, True)]
    ]
    table = pa.Table.from_pylist([{name: row.get(name) for name in SCHEMA.names} for row in rows], SCHEMA)
    for known, kept in ((None, [True] * 4), (-0.1, [True, True, False, True]), (0.0, [True, False, False, True])):
        config = DistillConfig(known_confidence=known)
        assert choose_kept(table, config).to_pylist() == kept
    assert choose_kept(table, DistillConfig(known_confidence=-0.1, confidence=-0.2)).to_pylist()[3] is False


def test_an_answer_tells_something_new_where_it_has_a_fact_that_no_label_has(distilled, monkeypatch):
    encoder = PromptEncoder(load_tokenizer(distilled.model), distilled.prompt)
    answers = ["k4", "b7", "k4 b7", "none"]
    rows = [{"label_ids": encoder.answer(text), "novel": None} for text in answers]
    table = pa.Table.from_pylist([{name: row.get(name) for name in SCHEMA.names} for row in rows], SCHEMA)
    facts = [FactGroup("", "a0", ("k4", "z9", "q1", "b7"), ("k4", "z9", "q1"))]
    monkeypatch.setattr(distill, "find_run_facts", lambda config: facts)
    assert distill._mark_novel(table, distilled)["novel"].to_pylist() == [False, True, True, False]
    monkeypatch.setattr(distill, "find_run_facts", lambda config: [])
    assert distill._mark_novel(table, distilled)["novel"].to_pylist() == [True] * 4, "nothing tells the two apart"


def test_a_held_out_query_is_answered_and_never_learned_from(distilled, tmp_path):
    config = trained_with(distilled, tmp_path, **{"train.distill.held_out": 0.3})
    held, said = [row for row in rows_of(config) if row["held_out"]], event(config)
    assert len(held) == said["held_out"] > 0 and not any(row["labelled"] for row in held)
    assert said["kept"] == event(distilled)["kept"] - said["held_out"]
    run = RunDir(config.root)
    queries = PhaseDataset(run.phase("unlabelled-2"))
    data = DistilledRows(run.teacher_answers, PhaseDataset(run.phase(2)), queries, config.train)
    learned = [row for row in rows_of(config) if not row["held_out"]]
    assert [label for _, label in data.take(range(len(data)))] == [row["label_ids"] for row in learned]


def test_a_student_gets_the_prompt_of_its_phase_and_the_answer_of_the_teacher(distilled):
    run = RunDir(distilled.root)
    own, queries = PhaseDataset(run.phase(2)), PhaseDataset(run.phase("unlabelled-2"))
    data, made = DistilledRows(run.teacher_answers, own, queries, TrainConfig(objective="distill")), rows_of(distilled)
    assert data.take([0]) == own.take([0])
    place = len(made) - 1
    assert data.take([place]) == [(queries.take([made[place]["number"]])[0][0], made[place]["label_ids"])]
    assert [data.prompt_lengths[p] for p in (0, place)] == [len(prompt) for prompt, _ in data.take([0, place])]
    targets = data.targets([0, place])
    assert targets.ids.shape == (len(made[0]["label_ids"]) + len(made[place]["label_ids"]), 4)
    assert torch.allclose(targets.probs.sum(1), torch.ones(len(targets.probs)))
    assert targets.ids[0].tolist() == made[0]["top_ids"][:4]


@pytest.mark.parametrize("pack", [packed_batch, plain_batch])
def test_a_teacher_who_is_certain_of_the_label_teaches_like_the_label(distilled, pack):
    data, model = PhaseDataset(RunDir(distilled.root).phase(0)), load_model(distilled.model, "cpu").eval()
    if pack is packed_batch:
        shared_prefix.enable_shared_prefix(model)
    rows = data.take([0, 1, 2])
    batch = pack(data.prefix, rows)
    labels = torch.tensor([token for _, label in rows for token in label])[:, None]
    for share in (1.0, 0.3):
        ones = torch.ones(len(labels))
        certain = Targets(labels, ones[:, None], None, ones, share * ones)
        assert distill_loss(model, batch, certain).item() == pytest.approx(sft_loss(model, batch).item(), rel=1e-5)


def test_the_loss_is_the_cross_entropy_to_the_teacher(distilled):
    data, model = PhaseDataset(RunDir(distilled.root).phase(0)), load_model(distilled.model, "cpu").eval()
    rows = data.take([3])
    batch, count = plain_batch(data.prefix, rows), len(rows[0][1])
    probs, ones = torch.tensor([[0.75, 0.25]] * count), torch.ones(count)
    targets = Targets(torch.tensor([[5, 9]] * count), probs, None, ones, ones)
    with torch.no_grad():
        logprobs = torch.log_softmax(model(**batch.inputs).logits[0].float(), -1)
        expected = -(0.75 * logprobs[:, 5] + 0.25 * logprobs[:, 9]).sum().item()
        assert distill_loss(model, batch, targets).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("stop_at, every", [(6, 2), (8, 2), (14, 2), (7, 4)])
def test_a_run_that_dies_at_the_phase_transition_or_after_it_goes_on_to_the_same_adapter(
    distilled, tmp_path, monkeypatch, stop_at, every
):
    """Also where the newest checkpoint is older than the phase transition: the teacher answers are used again, and the
    log says so again.
    """
    config = distilled.replace(**{"run_dir": str(tmp_path), "train.checkpoint_every": every})
    prepare_by_hand(config)
    dies_and_goes_on(config, stop_at, monkeypatch)
    assert adapter_hash(config) == adapter_hash(distilled)
    said = [e for e in log_of(config) if e.get("event") == "teacher_answers"]
    assert [{**e, "seconds_teaching": 0} for e in said] == [{**event(distilled), "seconds_teaching": 0}]
    assert (
        verify_artifact(RunDir(config.root).teacher_answers)["files"]
        == verify_artifact(RunDir(distilled.root).teacher_answers)["files"]
    )


def test_the_log_says_how_far_the_teacher_is(distilled):
    told = [(e["step"], e["verb"], e["done"], e["total"]) for e in log_of(distilled) if e.get("event") == "teacher"]
    manifest = event(distilled)
    labels = sum(row["labelled"] for row in rows_of(distilled))
    whole = [("judged", labels), ("answered", manifest["queries"]), ("judged", manifest["queries"])]
    assert told == [(manifest["step"], verb, total, total) for verb, total in whole]


def test_a_teacher_that_was_trained_on_is_not_asked_again(distilled, tmp_path, monkeypatch):
    config = distilled.replace(run_dir=str(tmp_path))
    prepare_by_hand(config)
    # as if killed before the end: the checkpoints are still there
    monkeypatch.setattr(Trainer, "finish", lambda self: None)
    train_worker(settings(config))
    (RunDir(tmp_path).teacher_answers / "manifest.json").unlink()
    RunDir(tmp_path).checkpoints.joinpath("step-00000018").rename(tmp_path / "gone")
    with pytest.raises(TrainingError, match="trained on since; delete"):
        train_worker(settings(config))


def trained_with(distilled, root, **changes):
    config = distilled.replace(run_dir=str(root), **changes)
    prepare_by_hand(config)
    train_worker(settings(config))
    return config


def test_in_plain_batches_the_teacher_says_the_same(distilled, tmp_path):
    config = trained_with(distilled, tmp_path, **{"train.share_prefix": False})
    assert [r["confidence"] for r in rows_of(config)[:12]] == pytest.approx(
        [r["confidence"] for r in rows_of(distilled)[:12]], abs=1e-2
    )


def test_the_base_as_teacher_is_the_base_without_its_adapter(distilled, tmp_path):
    config = trained_with(distilled, tmp_path, **{"train.distill.teacher": "base"})
    data, bare = PhaseDataset(RunDir(config.root).phase(0)), load_model(config.model, "cpu").eval()
    again = answer_scores.score_answers(bare, plain_batch, [data.prefix], data, labels_of(data), 4, 5)
    found = [r["confidence"] for r in rows_of(config) if r["labelled"]]
    assert found == pytest.approx([e["confidence"] for e in again], abs=1e-3)
    assert found != pytest.approx([r["confidence"] for r in rows_of(distilled) if r["labelled"]], abs=1e-1)


def test_mixed_learns_from_the_teacher_by_its_share_and_from_the_labels_by_the_rest(distilled, tmp_path):
    first = []
    for share in (1.0, 0.25, 0.0):
        config = trained_with(
            distilled, tmp_path / str(share),
            **{"train.objective": "mixed", "train.distill.share": share, "train.distill.label_weight": 1.0},
        )
        assert (adapter_hash(config) == adapter_hash(distilled)) == (share == 1)
        first.append(next(e["loss"] for e in log_of(config) if e.get("phase") == 1 and "loss" in e))
    assert first[1] == pytest.approx(0.25 * first[0] + 0.75 * first[2], abs=1e-4) and abs(first[0] - first[2]) > 1e-2


def test_a_shown_label_is_the_last_example_of_its_own_row(distilled, tmp_path):
    config = distilled.replace(**{"run_dir": str(tmp_path), "schedule.shots": 0, "train.distill.show_labels": True})
    prepare_by_hand(config)
    data = PhaseDataset(RunDir(tmp_path).phase(0))
    shown, encoder = open_teacher_rows(config, "train"), PromptEncoder(load_tokenizer(config.model), config.prompt)
    (prompt, label), (own, _) = shown.take([2])[0], data.take([2])[0]
    text = encoder.tokenizer.decode(prompt)
    assert label == data.take([2])[0][1] and text.endswith(encoder.tokenizer.decode(own))
    assert text.startswith("Examples:\n\ncase 2: what is green?\nq1 .\n\ncase 2: what is green?")


def test_a_teacher_that_sees_the_labels_judges_them_otherwise_and_its_own_answers_the_same(distilled, tmp_path):
    changes = {"schedule.shots": 0, "train.distill.views": 1}
    blind, seeing = (
        trained_with(distilled, tmp_path / str(shown), **changes, **{"train.distill.show_labels": shown})
        for shown in (False, True)
    )
    told, untold = ([{**row, "labelled": None} for row in rows_of(c)] for c in (seeing, blind))
    assert told[12:] == untold[12:] and len(told) > 12
    assert all(a["top_logprobs"] != b["top_logprobs"] for a, b in zip(told[:12], untold[:12], strict=True))
    weighs = "in labelled rows the label itself weighs 0"
    assert event(seeing)["options"] == [weighs, "the teacher sees the answer of a labelled row that it judges"]
    assert event(blind)["options"] == [weighs]


def test_labels_that_weigh_all_are_not_judged_and_are_learned_as_they_are(distilled, tmp_path):
    config = trained_with(distilled, tmp_path, **{"train.distill.label_weight": 1.0})
    made, judged = rows_of(config), [e for e in log_of(config) if e.get("verb") == "judged"]
    labelled, answered = made[:12], made[12:]
    assert judged[-1]["total"] == len(answered) > 0 and "options" not in event(config)
    labels = labels_of(PhaseDataset(RunDir(config.root).phase(0)))
    assert [row["label_ids"] for row in labelled] == list(labels.values())
    assert all(row["labelled"] and row["agreement"] == 1 and row["confidence"] == 0 for row in labelled)
    assert answered == rows_of(distilled)[12:]  # which the teacher answers and judges as ever
    run = RunDir(config.root)
    phases = PhaseDataset(run.phase(2)), PhaseDataset(run.phase("unlabelled-2"))
    for tail in (False, True):
        train = TrainConfig(objective="distill", distill={"tail": tail})
        targets, own = DistilledRows(run.teacher_answers, *phases, train).targets([0]), labelled[0]["label_ids"]
        assert targets.ids.tolist() == [[token] * 4 for token in own] and targets.shares.tolist() == [0.0] * len(own)
        assert torch.allclose(targets.probs.sum(1), torch.ones(len(own)))
        assert not tail or torch.allclose(targets.tail, torch.zeros(len(own)), atol=1e-6)


def test_the_tail_is_what_the_teacher_leaves_to_other_tokens(distilled):
    run, train = RunDir(distilled.root), TrainConfig(objective="distill", distill={"tail": True, "label_weight": 0.25})
    phases = PhaseDataset(run.phase(2)), PhaseDataset(run.phase("unlabelled-2"))
    data, made = DistilledRows(run.teacher_answers, *phases, train), rows_of(distilled)
    targets, own = data.targets([0, len(data) - 1]), len(made[0]["label_ids"])
    assert torch.allclose(targets.probs[0], torch.tensor(made[0]["top_logprobs"][:4]).exp())
    assert torch.allclose(targets.tail, 1 - targets.probs.sum(1)) and (targets.tail > 0).all()
    assert targets.shares.tolist() == [0.75] * own + [1.0] * (len(targets.shares) - own)


def test_options_that_are_not_used_leave_the_fingerprint_as_it_is(distilled):
    used = {"tail": True, "labelled": 0.5, "show_labels": True}
    distill_block = distilled.train.distill.model_dump(mode="json")
    assert not set(used) & set(distill_block)
    made = [train_fingerprint(distilled.replace(**{f"train.distill.{key}": value}), "p") for key, value in used.items()]
    assert len({train_fingerprint(distilled, "p"), *made}) == 4


@pytest.mark.parametrize("changes", [{"train.distill.labelled": 0.75, "train.distill.tail": True}])
def test_a_run_with_options_that_dies_goes_on_to_the_same_adapter(distilled, tmp_path, monkeypatch, changes):
    quiet = trained_with(distilled, tmp_path / "quiet", **changes)
    config = quiet.replace(run_dir=str(tmp_path / "dies"))
    prepare_by_hand(config)
    dies_and_goes_on(config, 13, monkeypatch)
    assert adapter_hash(config) == adapter_hash(quiet) != adapter_hash(distilled)
    assert event(quiet)["options"] == [
        "all tokens but the teacher's 4 likeliest count as one", "in labelled rows the label itself weighs 0",
        "labelled rows have at least 75% of each batch",
    ]


def test_plain_fine_tuning_has_no_teacher(distilled):
    assert plain_finetuning_config(distilled).train.objective == "sft"


def test_what_a_teacher_would_do_does_not_retrain_a_run_without_one(distilled):
    sft = distilled.replace(**{"train.objective": "sft"})
    assert train_fingerprint(sft, "p") == train_fingerprint(sft.replace(**{"train.distill.top_k": 7}), "p")
    assert train_fingerprint(distilled, "p") != train_fingerprint(distilled.replace(**{"train.distill.top_k": 7}), "p")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: a\ntrain: {objective: distill, distill: {on_policy: 0.1}, backend: {zero_stage: 3}}", "2 or less"),
        ("name: a\ntrain: {objective: mixed}\nschedule: {phases: 1}", "needs a phase after the first"),
        ("name: a\ntrain: {objective: mixed, distill: {label_weight: 0.5}}", "in mixed, share says"),
        ("name: a\ntrain: {objective: distill, distill: {show_labels: true}}", "set label_weight below 1"),
        ("name: a\ntrain: {objective: distill, distill: {labelled: 0}}", "labelled"),
        (
            "name: a\ntrain: {objective: distill}\nschedule: {name: list, list: [{rate: 1, shots: 0}]}",
            "needs a phase after the first",
        ),
        (
            "name: a\ntrain: {objective: distill}\nschedule: {rate_start: 0.5}",
            "the whole template, which the teacher reads: its rate is 0.5",
        ),
    ],
)
def test_what_cannot_be_taught_is_refused_at_once(text, says):
    with pytest.raises(ConfigError, match=says):
        parse_run_file(text, "run.yaml")


