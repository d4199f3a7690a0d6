"""The quality floor: which phase a run ends at, by the dev scores of all, and what it says of them."""

import json

import pytest
from pydantic import ValidationError

from pi_ray.protocols import Row
from pi_ray.run.artifact import write_atomic
from pi_ray.run.directory import RunDir
from pi_ray.train.floor import decide_floor, main_dev_metric
from pi_ray.train.phase_scores import DEV_SCORES, MOST_ROWS, scored_rows
from tests.prepared import tiny_config

LIST = [{"rate": 1.0, "shots": 2}, {"rate": 0.5, "shots": 0}, {"rate": 0.0, "shots": 1}, {"rate": 0.0, "shots": 0}]


@pytest.fixture
def decided(tmp_path):
    """The verdict of a floor of 95% where phases have so many right answers of `rows`, each the first ones."""
    def decide(right, schedule=None, rows=100, **scores):
        config = tiny_config("base", tmp_path, schedule={"floor": 0.95, "shots": 0, **(schedule or {})})
        for phase, count in enumerate(right):
            metrics = {"exact_match": [1.0] * count + [0.0] * (rows - count), **scores}
            write_atomic(RunDir(tmp_path).adapter(phase) / DEV_SCORES, json.dumps(metrics))
        return decide_floor(config)

    return decide


@pytest.mark.parametrize(
    "right, chosen, says",
    [
        ([100, 97, 81], 1, "The run ends at template rate 0.5 without examples: 97% of the full prompt's dev score; "
         "rate 0 held 81%, below the floor of 95% (exact match 97% against 100% on 100 dev rows; "
         "95% interval of the share "),
        ([80, 78, 76], 2, "The run ends at template rate 0 without examples: 95% of the full prompt's dev score "
         "(exact match 76% against 80% on 100 dev rows; "),
        ([80, 20, 90], 2, "The run ends at template rate 0 without examples: 112.5% of the full prompt's dev score ("),
        ([80, 64, 60], 0, "Keep the whole prompt: of its dev score rate 0.5 held 80% and rate 0 held 75%, below the "
         "floor of 95% (exact match 80% on 100 dev rows)."),
    ],
)  # fmt: skip
def test_a_run_ends_at_the_smallest_rate_that_holds_and_says_what_the_others_held(decided, right, chosen, says):
    verdict = decided(right)
    assert verdict.chosen == chosen and str(verdict).startswith(says)
    assert [p.holds for p in verdict.phases] == [count >= 0.95 * right[0] for count in right]


@pytest.mark.parametrize("right, chosen", [([90, 90, 90, 90], 3), ([90, 90, 90, 50], 2), ([90, 90, 40, 50], 1)])
def test_of_equal_rates_the_fewest_shots_that_hold_are_taken(decided, right, chosen):
    assert decided(right, {"name": "list", "list": LIST, "shots": 2}).chosen == chosen


def test_of_equal_prompts_the_better_adapter_is_taken_and_of_equal_ones_the_later(decided):
    twice = {"name": "list", "list": [LIST[0], LIST[3], LIST[3]], "shots": 2}
    assert decided([90, 92, 88], twice).chosen == 1 and decided([90, 88, 88], twice).chosen == 2


def test_the_sentence_names_examples_where_prompts_differ_by_them(decided):
    text = str(decided([90, 90, 90, 50], {"name": "list", "list": LIST, "shots": 2}))
    assert "ends at template rate 0 with 1 fixed example: 100% of" in text
    assert "; rate 0 without examples held 55.5%, below" in text


def test_without_a_full_prompt_the_first_phase_is_what_others_are_compared_with_and_the_sentence_says_so(decided):
    start = {"rate_start": 0.8, "rate_end": 0.2}
    assert "98% of the first phase's (template rate 0.8) dev score" in str(decided([50, 50, 49], start))
    assert str(decided([50, 20, 20], start)).startswith("Keep the prompt of the first phase (template rate 0.8): ")


def test_a_share_just_below_the_floor_is_not_rounded_up_to_it(decided):
    verdict = decided([1000, 949, 949], rows=1000)
    assert verdict.chosen == 0 and "held 94.9%" in str(verdict)


def test_few_rows_and_a_weak_first_phase_are_said(decided):
    assert "20 rows are few, so another choice of them could decide otherwise" in str(decided([20, 20, 20], rows=20))
    weak = decided([2, 2, 2], sentence_bleu=[0.05] * 100)
    assert weak.metric == "sentence_bleu" and "so low a score says little" in str(weak)
    assert "few" not in str(decided([50, 50, 50], rows=50)) and "little" not in str(decided([50, 50, 50], rows=50))


def test_where_nothing_is_right_every_phase_holds_and_the_sentence_warns(decided):
    verdict = decided([0, 0, 0])
    assert verdict.chosen == 2 and "so low a score says little" in str(verdict)


def test_the_interval_is_of_the_paired_share(decided):
    """Equal rows right: every resample has the share 1. Others: about 0.9 +- 0.06."""
    low, high = decided([50, 50, 50]).phases[2].interval
    assert (low, high) == (1.0, 1.0)
    low, high = decided([100, 90, 90]).phases[2].interval
    assert 0.82 < low < 0.88 and 0.92 < high < 0.98


def test_exact_match_decides_unless_it_is_near_zero():
    def scores(**means):
        return {name: [mean] * 4 for name, mean in means.items()}

    assert main_dev_metric(scores(exact_match=0.5, execution=0.9, sentence_bleu=0.9)) == "exact_match"
    assert main_dev_metric(scores(exact_match=0.05, execution=0.4, sentence_bleu=0.9)) == "execution"
    assert main_dev_metric(scores(exact_match=0.05, execution=0.0, sentence_bleu=0.3)) == "sentence_bleu"
    assert main_dev_metric(scores(token_accuracy=0.01)) == "token_accuracy"


def test_of_many_dev_rows_a_part_is_scored_from_all_over_the_file():
    rows = [Row(str(i), "q", "a") for i in range(4 * MOST_ROWS - 1)]
    chosen = scored_rows(rows)
    assert len(chosen) <= MOST_ROWS and chosen[0].id == "0" and int(chosen[-1].id) >= len(rows) - 4
    assert scored_rows(rows[:MOST_ROWS]) == rows[:MOST_ROWS]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"schedule.name": "constant"}, "nothing to choose"),
        ({"schedule.name": "list", "schedule.list": LIST[1:]}, "must be the longest"),
        ({"train.backend.name": "openai"}, "adapter of each phase here"),
        ({"train.gist": 2, "schedule.rate_end": 0.5}, "gist tokens cannot be served"),
        ({"schedule.floor": 1.5}, "less than or equal to 1"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(tmp_path, changes, message):
    plain = {"schedule.floor": 0.95}
    if "schedule.list" in changes:
        plain["schedule.phases"], plain["schedule.shots"] = 3, 2
    with pytest.raises(ValidationError, match=message):
        tiny_config("base", tmp_path).replace(**{**plain, **changes})
