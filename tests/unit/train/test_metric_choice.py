"""With task.metric, phases are compared, and stop early, by its first number of generated answers to dev rows."""

import json
import math
from itertools import chain, repeat
from statistics import fmean

import pytest

from pi_ray.models import load_tokenizer
from pi_ray.prompt import PromptEncoder
from pi_ray.run.artifact import write_atomic
from pi_ray.run.directory import RunDir
from pi_ray.run.fingerprint import train_fingerprint
from pi_ray.train import launch
from pi_ray.train.batches import PhaseDataset, plain_batch
from pi_ray.train.dev_scores import DevScorer, DevScores
from pi_ray.train.distributed import WorkerGroup
from pi_ray.train.floor import decide_floor
from pi_ray.train.generation import generate_greedy
from pi_ray.train.phase_scores import DEV_ANSWERS, read_phase_scores
from pi_ray.train.trainer import train_worker
from tests.prepared import prepare_by_hand, tiny_config
from tests.unit.train.test_dev_scores import ShareOf, adapted
from tests.unit.train.test_train import adapter_hash, dies_and_goes_on, log_of, settings

METRIC = {"task.metric": ["contains", "f1"]}


@pytest.fixture(scope="module")
def by_metric(tiny_model, tmp_path_factory):
    """A trained run; each phase's scores are what they are."""
    config = tiny_config(tiny_model, tmp_path_factory.mktemp("metric"), **METRIC, **{"schedule.epochs": 4})
    prepare_by_hand(config)
    train_worker(settings(config))
    return config


def test_each_phase_has_its_scores_and_the_highest_first_one_is_the_best(by_metric):
    log, found = log_of(by_metric), read_phase_scores(by_metric)
    ends = [e["scores"] for e in log if e.get("event") == "phase_end"]
    assert ends == [{name: round(fmean(v), 6) for name, v in scores.items()} for scores in found]
    assert [[*scores] for scores in found] == [["contains", "f1"]] * 3 and {len(s["f1"]) for s in found} == {12}
    best = max(range(3), key=lambda i: (fmean(found[i]["contains"]), i))
    assert RunDir(by_metric.root).best.name == f"phase-{best}"
    assert (log[-1]["phase"], log[-1]["metric"], log[-1]["score"]) == (best, "contains", ends[best]["contains"])
    assert launch.is_trained(by_metric)


def test_the_answers_are_generated_under_the_prepared_prompts(by_metric):
    """The answers again, one row at a time; the card's prompt stays the last phase's."""
    run, encoder = RunDir(by_metric.root), PromptEncoder(load_tokenizer(by_metric.model), by_metric.prompt)
    dev, model, end = PhaseDataset(run.phase("dev")), adapted(by_metric, 1), encoder.tokenizer.eos_token_id
    limit, task = math.ceil(1.25 * dev.tokens["label_max"]), DevScorer(by_metric).task
    for i, (row, (prompt, _)) in enumerate(zip(run.read_rows("dev", end=4), dev.take(range(4)), strict=True)):
        answer = encoder.decode(generate_greedy(model, [], [dev.prefix + prompt], limit, end)[0])
        assert {name: values[i] for name, values in read_phase_scores(by_metric)[1].items()} == task.score(row, answer)
    cards = [json.loads((run.adapter(i) / "pi_ray.json").read_text()) for i in range(3)]
    assert {(card["rate"], card["template"], card["shots"]) for card in cards} == {(0.0, "", 0)}


def test_it_changes_no_weights_and_no_run_without_it(by_metric, tmp_path):
    without = by_metric.replace(**{"run_dir": str(tmp_path), "task.metric": []})
    assert train_fingerprint(without, "p") != train_fingerprint(by_metric, "p")
    prepare_by_hand(without)
    train_worker(settings(without))
    assert [adapter_hash(without, i) for i in range(3)] == [adapter_hash(by_metric, i) for i in range(3)]
    assert not [*RunDir(without.root).adapters.glob("**/dev_*")] and "metric" not in log_of(without)[-1]


def test_two_workers_share_the_rows_and_have_the_scores_of_one(by_metric):
    scorer, model, shares = DevScorer(by_metric), adapted(by_metric, 1), []
    dev = PhaseDataset(RunDir(by_metric.root).phase("dev"))

    class Share(ShareOf):
        def broadcast_from_rank0(self, value):
            return value

    assert scorer.score_answers(model, plain_batch, Share(1, shares), dev).answers == ()
    both = scorer.score_answers(model, plain_batch, Share(0, shares), dev)
    assert both == scorer.score_answers(model, plain_batch, WorkerGroup("cpu"), dev)
    assert [len(share) for share in shares] == [6, 6]


def answers_of(run, right):
    """Answers to the 12 dev rows of which so many are right; or right ones with a text behind each."""
    rows = run.read_rows("dev")
    if isinstance(right, str):
        return tuple(f"{row.answer} {right}" for row in rows)
    return tuple(row.answer if i < right else "?" for i, row in enumerate(rows))


@pytest.fixture
def scored_as(tiny_model, tmp_path, monkeypatch):
    """A run whose phases have so many of 12 right answers, in the order in which they are asked for, and then 1."""
    def train(*right, **changes):
        asked = chain(right, repeat(1))

        def score(self, *_):
            now = next(asked)
            mean = 1.0 if isinstance(now, str) else now / 12
            return DevScores({"contains": [mean]}, {}, answers_of(self.run, now))

        monkeypatch.setattr(DevScorer, "score_answers", score)
        config = tiny_config(tiny_model, tmp_path / "run", **METRIC, **changes)
        prepare_by_hand(config)
        train_worker(settings(config))
        return config

    return train


@pytest.mark.parametrize("right, best", [((2, 9, 5), 1), ((5, 4, 5), 2), ((0, 0, 0), 2)])
def test_the_first_metric_chooses_whatever_the_dev_accuracy_says_and_of_equals_the_later(scored_as, right, best):
    config = scored_as(*right)
    assert RunDir(config.root).best.name == f"phase-{best}" and launch.is_trained(config)


def test_a_phase_ends_early_when_the_metric_gains_no_more(scored_as):
    """Nine updates a phase, scored after every second, and at its end under the last phase's prompt."""
    changes = {"schedule.epochs": 3, "train.dev_every": 2, "train.early_stop": 2, "train.checkpoint_every": 3}
    log = log_of(scored_as(1, 5, 4, 4, 12, **changes))
    ends = [e for e in log if e.get("event") == "phase_end"]
    assert (ends[0]["step"], ends[0]["early"], ends[0]["best_step"]) == (7, True, 3)
    assert [e["scores"]["contains"] for e in log if e.get("event") == "dev"][:4] == [
        round(n / 12, 6) for n in (1, 5, 4, 4)
    ]


def test_another_metric_chooses_again_among_the_same_adapters_without_training(scored_as):
    config, seen = scored_as("and more", 9, 5), []
    other, run = config.replace(**{"task.metric": ["exact_match"]}), RunDir(config.root)
    assert run.best.name == "phase-0" and launch.is_trained(config) and not launch.is_trained(other)
    launch.train(other, seen.append)
    assert run.best.name == "phase-1" and launch.is_trained(other) and not launch.is_trained(config)
    assert [(e["event"], e["phase"], e["metric"], e["score"]) for e in seen] == [("best", 1, "exact_match", 0.75)]
    launch.train(config, seen.append)
    assert run.best.name == "phase-0" and launch.is_trained(config)


def test_a_run_that_dies_and_goes_on_ends_with_the_same_adapters_and_choice(by_metric, tmp_path, monkeypatch):
    config = by_metric.replace(**{"run_dir": str(tmp_path), "train.checkpoint_every": 7})
    prepare_by_hand(config)
    dies_and_goes_on(config, 22, monkeypatch)
    assert [adapter_hash(config, i) for i in range(3)] == [adapter_hash(by_metric, i) for i in range(3)]
    assert log_of(config)[-1] == log_of(by_metric)[-1]


def test_a_floor_is_about_the_first_metric(tiny_model, tmp_path):
    config = tiny_config(tiny_model, tmp_path, **METRIC, **{"schedule.floor": 0.75})
    prepare_by_hand(config)
    run = RunDir(config.root)
    for phase, right in enumerate((12, 9, 8)):
        write_atomic(run.adapter(phase) / DEV_ANSWERS, json.dumps(answers_of(run, right)))
    verdict = decide_floor(config)
    assert (verdict.metric, verdict.chosen) == ("contains", 1) and "contains 75% against 100%" in str(verdict)


def test_a_floor_of_a_run_keeps_answers_under_the_prompt_that_is_served(tiny_model, tmp_path):
    config = tiny_config(tiny_model, tmp_path, **METRIC, **{"schedule.floor": 0.5})
    prepare_by_hand(config)
    train_worker(settings(config))
    assert [len(scores["contains"]) for scores in read_phase_scores(config)] == [12] * 3
    assert log_of(config)[-1]["floor"]["metric"] == "contains" and launch.is_trained(config)
