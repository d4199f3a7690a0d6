"""What the report says where a teacher, and no person, wrote the answers that columns are compared with."""

from pi_ray.config import CostConfig
from pi_ray.report import cost
from pi_ray.report import summary as numbers
from pi_ray.report.page import write_report
from pi_ray.schedule import Phase
from tests.unit.fake_run import config, summary, write_run

BASE = {
    "by": "base", "teacher": "smollm2-135m", "views": 2, "queries": 90, "near_copies": 0, "labelled": 0, "answered": 80,
    "limit": 64, "asked": {"train": 60, "dev": 10, "test": 20}, "kept": {"train": 50, "dev": 8, "test": 15},
}
ENDPOINT = {**BASE, "by": "endpoint", "teacher": "big", "views": 1}
BAKED = {"plain": None, "train.plain": None}


def baked(facts, **changes):
    return summary(**{**BAKED, "split": "test", "answered": facts, **changes})


def test_the_headline_says_agreement_with_the_base_and_compares_the_base_with_nothing():
    text = numbers.headline(baked(BASE), Phase(0.0, 0, 1))
    assert "its exact match with the answers of the base model that reads the full prompt is 70%" in text
    assert "against" not in text and "level" not in text
    assert "with the answers of its teacher big is 70%" in numbers.headline(baked(ENDPOINT), Phase(0.0, 0, 1))


def test_the_page_says_that_agreement_is_no_truth_and_what_is_not_measured(tmp_path):
    run = write_run(tmp_path, baked(BASE))
    page = write_report(run, config(tmp_path)).read_text()
    assert "Agreement with the teacher is measured, not truth" in page
    assert "5 of 20 held-out queries have no reference and are not measured" in page
    assert "its own agreement is no result" in page and "Plain fine-tuning was not evaluated" not in page
    assert "The rows come from 90 queries without answers: smollm2-135m with the whole prompt was asked 90" in page
    assert "its own agreement is no result" not in " ".join(numbers.caveats(baked(ENDPOINT)))


def test_rows_that_people_labelled_are_truth_also_beside_a_teachers():
    facts = {**BASE, "kept": {"train": 50, "dev": 8}}
    assert not any("not truth" in sentence for sentence in numbers.caveats(baked(facts)))
    assert "for the base model with the full prompt" in numbers.headline(baked(facts), Phase(0.0, 0, 1))


def test_the_verdict_does_not_hold_the_adapter_against_its_own_teacher():
    worse = {"base_full_prompt.exact_match": 1.0, "base_full_prompt.intervals.exact_match": [1.0, 1.0]}
    text = cost.verdict(baked(BASE, **worse), CostConfig())
    assert text.startswith("The adapter answers as your prompt does with exact match 70%") and "pa" in text
    assert cost.verdict(baked(ENDPOINT, **worse), CostConfig()).startswith("Keep your prompt")
    assert cost.verdict(summary(**worse), CostConfig()).startswith("Keep your prompt")


def test_an_adapter_that_agrees_no_more_than_the_base_without_a_prompt_shows_no_gain():
    level = {"base.exact_match": 0.68, "base.intervals.exact_match": [0.6, 0.75]}
    text = cost.verdict(baked(BASE, **level), CostConfig())
    assert text.startswith("Keep your prompt") and "without any prompt has 68%, which shows no gain" in text


def test_an_adapter_that_has_nothing_in_common_with_its_teacher_pays_nothing():
    columns = list(numbers.summary_columns(baked(ENDPOINT)))
    nothing = {f"{name}.{metric}": 0.0 for name in columns for metric in ("exact_match", "bleu", "execution")}
    text = cost.verdict(baked(ENDPOINT, **nothing), CostConfig())
    assert text.startswith("Keep looking: with BLEU 0.0")
