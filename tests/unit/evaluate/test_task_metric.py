"""An evaluation by task.metric: which numbers there are, which decides, and judges that are paid for once."""

import json

import pytest

from pi_ray.errors import ConfigError, TrainingError
from pi_ray.evaluate import judge
from pi_ray.evaluate.columns import Answers, Column
from pi_ray.evaluate.evaluate import evaluate_run
from pi_ray.evaluate.statistics import corpus_bleu
from pi_ray.protocols import Row
from pi_ray.run.artifact import digest, staged
from pi_ray.run.directory import RunDir
from pi_ray.run.fingerprint import metric_fingerprints
from pi_ray.run.row_store import write_rows
from tests.prepared import tiny_config
from tests.unit.fake_openai import FakeOpenAI

KEY = "sk-secret-0123456789"
ROWS = [Row(f"r{i}", f"question {i}?", f"the answer is {i}", group="even" if i % 2 == 0 else "odd") for i in range(8)]
ANSWERS = {
    "base": ["no idea"] * 8, "base_full_prompt": [f"it is {i}" for i in range(8)],
    "promptintern": [f"The answer is {i}." if i < 6 else "" for i in range(8)],
}
COLUMNS = [Column(name, "", "", 0) for name in ANSWERS]


class Answerer:
    """Answers from a table, as an answerer gives them."""

    model = "tiny"

    def __init__(self, config):
        self.config, self.asked = config, 0

    def fingerprint(self, columns):
        return digest(metric_fingerprints(self.config))

    def answer(self, columns, lengths, watch):
        self.asked += 1
        measured = {"input_tokens": 9.0, "output_tokens": 4.0, "prefix_tokens": 0, "latency_s": 0.1}
        return {c.name: Answers(ANSWERS[c.name], measured) for c in columns}

    def environment(self):
        return {}

    def training_facts(self, config):
        return {}


@pytest.fixture
def config(tiny_model, tmp_path):
    config = tiny_config(tiny_model, tmp_path / "run", **{"evaluate.bootstrap": 50})
    with staged(RunDir(config.root).rows, fingerprint="f") as tmp:
        for split in ("train", "test"):
            write_rows(tmp / f"{split}.parquet", ROWS)
    return config


def evaluate(config, metric, confirm=lambda sentence: pytest.fail("nothing costs money"), **changes):
    config = config.replace(**{"task.metric": metric, **changes})
    return evaluate_run(config, columns=COLUMNS, answerer=Answerer(config), confirm=confirm)


def test_the_metrics_of_the_run_file_are_all_that_there_is_and_the_first_leads(config):
    summary = evaluate(config, ["number", "normalized"])
    assert summary["metrics"] == ["number", "normalized"]
    assert [summary[name]["number"] for name in ANSWERS] == [0, 1, 0.75]
    assert [summary[name]["normalized"] for name in ANSWERS] == [0, 0, 0.75]
    assert "bleu" not in summary["base"] and "exact_match" not in summary["base"]["intervals"]
    assert set(summary["paired"]["base"]) == {"number", "normalized"}
    assert summary["paired"]["base_full_prompt"]["number"][0] == -0.25
    assert summary["promptintern"]["groups"]["odd"]["number"] == 0.75
    line = json.loads((RunDir(config.root).evaluation / "outputs.jsonl").read_text().splitlines()[7])
    assert line["scores"]["promptintern"] == {"number": 0.0, "normalized": 0.0}


def test_without_a_metric_it_is_exact_match_and_bleu_as_ever(config):
    summary = evaluate(config, [])
    assert "metrics" not in summary and set(summary["base"]["intervals"]) == {"exact_match", "bleu"}


def test_bleu_is_that_of_all_rows_and_not_the_mean_of_sentences(config):
    summary = evaluate(config, ["bleu", "f1"])
    assert summary["metrics"] == ["bleu", "f1"]
    expected = corpus_bleu(ANSWERS["promptintern"], [row.answer for row in ROWS], 50, config.train.seed)
    found = summary["promptintern"]
    assert (found["bleu"], *found["intervals"]["bleu"]) == expected and found["bleu"] > 1
    assert "bleu" in summary["paired"]["base"]


@pytest.fixture
def service(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(judge, "SECOND_PASS", 4)

    def grade(model, prompt):
        if '"no idea"' in prompt:
            return "I would rather not say."
        swapped = prompt.index("answer to judge") < prompt.index("reference answer")
        return json.dumps({"grade": 10 if '"The answer is' in prompt else 5 - 3 * swapped})

    with FakeOpenAI(KEY, grade) as running:
        yield running


JUDGE = {"name": "judge", "rubric": "As the reference has it."}


def test_a_judge_grades_after_its_cost_is_confirmed_and_says_how_steady_it_is(config, service):
    said = []
    changes = {"closed.base_url": service.url, "closed.model": "judge-1"}
    summary = evaluate(config, [JUDGE, "number"], lambda sentence: said.append(sentence) or True, **changes)
    assert summary["metrics"] == ["judge", "number"] and len(said) == 1
    assert said[0].startswith("Having judge-1 judge 8 rows in each of 3 columns, up to 4 of them twice, takes at most")
    assert [summary[name]["judge"] for name in ANSWERS] == [0, 0.5, pytest.approx((6 * 10 + 2 * 5) / 80)]
    facts = {name: [summary[c][f"judge_{name}"] for c in ANSWERS] for name in ("agreement", "second_pass", "unread")}
    assert facts == {"agreement": [0, 0, 0.75], "second_pass": [4, 4, 4], "unread": [12, 0, 0]}
    assert len(service.chats) == 3 * (8 + 4)
    again = evaluate(config, [JUDGE], lambda sentence: True, **changes)
    assert len(service.chats) == 36, "grades that are paid for are not asked for again"
    assert again["metrics"] == ["judge", "exact_match"]


def test_nothing_is_answered_or_judged_where_the_cost_is_declined(config, service):
    config = config.replace(**{"task.metric": [JUDGE], "closed.base_url": service.url})
    answerer = Answerer(config)
    with pytest.raises(TrainingError, match="nothing was judged"):
        evaluate_run(config, columns=COLUMNS, answerer=answerer, confirm=lambda sentence: False)
    assert service.requests == [] and answerer.asked == 0


def test_a_judge_without_a_key_is_an_error_before_the_run_starts(config, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="OPENAI_API_KEY is empty"):
        judge.judges_of(config.replace(**{"task.metric": [JUDGE]}))
    assert judge.judges_of(config) == []
