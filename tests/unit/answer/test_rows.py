"""Answered rows: which answers become rows of which split, whose rows are measured, and what is said of bad input."""

import json
from pathlib import Path

import pytest

from pi_ray.answer import rows as step
from pi_ray.answer.endpoint import require_endpoint
from pi_ray.answer.rows import (
    answer_limit,
    describe_answers,
    is_answered,
    make_answered_rows,
    planned_splits,
    read_queries_to_answer,
)
from pi_ray.answer.teacher_answer import TeacherAnswer
from pi_ray.ask.sources import task_sources
from pi_ray.config import RunConfig
from pi_ray.config.run_file import parse_run_file
from pi_ray.errors import ConfigError, DataError, TrainingError
from pi_ray.registry import tasks
from pi_ray.run.answered import answered_config, answered_facts
from pi_ray.run.artifact import verify_artifact
from pi_ray.run.directory import RunDir
from tests.answering import QUERIES, TEMPLATE
from tests.unit.fake_openai import FakeOpenAI


@pytest.fixture
def config(tiny_model, tmp_path) -> RunConfig:
    (tmp_path / "prompt.md").write_text(TEMPLATE)
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"query": query}) + "\n" for query in QUERIES))
    text = (
        "name: baked\ntask: {train: '', dev: '', test: '', queries: q.jsonl, template: prompt.md}\n"
        f"model: {{base: {tiny_model}}}\nprompt: {{chat: chatml}}\nschedule: {{phases: 1}}\n"
        f"train: {{objective: distill, distill: {{teacher: base, max_tokens: 8}}}}\nrun_dir: {tmp_path}/run"
    )
    return parse_run_file(text, "run.yaml", folder=tmp_path)


def answers(config, monkeypatch, answer=lambda row: TeacherAnswer(row.query.upper()), **options):
    monkeypatch.setattr(step, "answer_by_base", lambda c, rows, *_: ([answer(row) for row in rows], 2))
    return make_answered_rows(config, lambda sentence: False, lambda text: None, lambda done, total: None)


def read(config, split):
    return [json.loads(line) for line in Path(getattr(answered_config(config).task, split)).read_text().splitlines()]


def test_every_query_becomes_a_row_of_one_split_with_the_teachers_answer(config, monkeypatch):
    facts = answers(config, monkeypatch)
    made = {split: read(config, split) for split in ("train", "dev", "test")}
    assert sorted(r["query"] for rows in made.values() for r in rows) == sorted(QUERIES)
    assert all(r["answer"] == r["query"].upper() for rows in made.values() for r in rows)
    assert facts["kept"] == {split: len(rows) for split, rows in made.items()} == {"train": 28, "dev": 4, "test": 8}
    assert answered_facts(config) == facts == answered_facts(answered_config(config))
    verify_artifact(RunDir(config.root).answered)


def test_only_answers_that_ended_and_on_which_the_views_agree_become_rows(config, monkeypatch):
    def answer(row):
        if "blue" in row.query:
            return TeacherAnswer("z9", agreement=0.5)
        return TeacherAnswer("" if row.query == "code of red" else "k4", ended=row.query != "green again")

    facts = answers(config, monkeypatch, answer)
    assert {r["answer"] for split in ("train", "dev", "test") for r in read(config, split)} == {"k4"}
    assert facts["answered"] == 38 and sum(facts["kept"].values()) == 28
    unfiltered = config.replace(**{"train.distill.agreement": "off"})
    assert sum(answers(unfiltered, monkeypatch, answer)["kept"].values()) == 38


def test_the_lowest_confidence_holds_for_the_base_too(config, monkeypatch):
    sure = config.replace(**{"train.distill.confidence": -1.0})
    facts = answers(sure, monkeypatch, lambda row: TeacherAnswer("k", confidence=-2.0 if "red" in row.query else -0.5))
    assert sum(facts["kept"].values()) == 30


def test_answers_are_made_once_and_again_when_the_prompt_changes(config, monkeypatch):
    task = tasks["jsonl"](config.task)
    assert not is_answered(config, task)
    answers(config, monkeypatch)
    assert is_answered(config, task)
    answers(config, monkeypatch, lambda row: pytest.fail("answered twice"))
    Path(config.task.template).write_text(TEMPLATE + "white: w3\n")
    assert not is_answered(config, task)


def test_rows_that_people_labelled_are_what_is_measured(config, monkeypatch, tmp_path):
    (tmp_path / "test.jsonl").write_text('{"query": "code of red", "answer": "k4"}\n{"query": "new", "answer": "x"}\n')
    own = config.replace(**{"task.test": str(tmp_path / "test.jsonl")})
    facts = answers(own, monkeypatch)
    assert answered_config(own).task.test == own.task.test and set(facts["kept"]) == {"train", "dev"}
    assert "code of red" not in {r["query"] for split in ("train", "dev") for r in read(own, split)}
    plan = planned_splits(own, tasks["jsonl"](own.task))
    assert {split: len(rows) for split, rows in plan.items()} == {"train": 36, "dev": 3, "test": 2}


def test_answers_are_made_again_where_a_labelled_query_is_another(config, monkeypatch, tmp_path):
    file, own = tmp_path / "test.jsonl", config.replace(**{"task.test": str(tmp_path / "test.jsonl")})
    file.write_text('{"query": "new", "answer": "x"}\n{"query": "other", "answer": "x"}\n')
    answers(own, monkeypatch)
    task = tasks["jsonl"](own.task)
    assert is_answered(own, task) and "code of red" in {row["query"] for row in read(own, "train") + read(own, "dev")}
    file.write_text('{"query": "the code of red", "answer": "x"}\n{"query": "other", "answer": "x"}\n')
    assert not is_answered(own, task)


def test_a_held_out_answer_that_the_metric_cannot_score_is_left_out_and_counted(config, monkeypatch):
    def answer(row):
        return TeacherAnswer("I do not know" if "red" in row.query else "7")

    plain = answers(config, monkeypatch, answer)
    scored = config.replace(**{"task.metric": ["number"]})
    assert not is_answered(scored, tasks["jsonl"](scored.task)), "the metric decides which answers are rows"
    facts = answers(scored, monkeypatch, answer)
    lost = sum(plain["kept"].values()) - sum(facts["kept"].values())
    assert facts["unscored"] == lost > 0 and "unscored" not in plain
    assert facts["kept"]["train"] == plain["kept"]["train"]
    assert f"; {lost} dev and test answers left out, which task.metric cannot score" in describe_answers(facts)
    assert {row["answer"] for split in ("dev", "test") for row in read(scored, split)} == {"7"}
    with pytest.raises(DataError, match=r"too few answered .*; 12 dev and test answers left out, which task\.metric"):
        answers(scored.replace(**{"train.distill.max_tokens": 7}), monkeypatch, lambda row: TeacherAnswer("none"))


def test_too_few_answers_are_an_error_that_says_what_to_do(config, monkeypatch):
    with pytest.raises(DataError, match=r"0 of 40 queries have an answer that ends within 8 tokens.*larger model.base"):
        answers(config, monkeypatch, lambda row: TeacherAnswer("on and on", ended=False))
    assert not RunDir(config.root).answered.exists()


def test_bad_input_is_named(config, monkeypatch, tmp_path):
    (tmp_path / "none.jsonl").write_text("# nothing yet\n")
    with pytest.raises(DataError, match="no query for the teacher to answer"):
        answers(config.replace(**{"task.queries": str(tmp_path / "none.jsonl")}), monkeypatch)
    (tmp_path / "broken.jsonl").write_text('{"query": "red"}\n{"query"\n')
    with pytest.raises(DataError, match=r"1 bad rows, and task\.max_bad_rows is 0:\n  .*broken\.jsonl:2"):
        answers(config.replace(**{"task.queries": str(tmp_path / "broken.jsonl")}), monkeypatch)
    (tmp_path / "long.md").write_text("red is k4. " * 2000)
    with pytest.raises(DataError, match=r"the prompt has \d+,\d+ tokens .* reads 2,048 in all"):
        answers(config.replace(**{"task.template": str(tmp_path / "long.md")}), monkeypatch)
    (tmp_path / "empty.md").write_text("<!-- todo -->\n")
    with pytest.raises(DataError, match="the template is empty"):
        answers(config.replace(**{"task.template": str(tmp_path / "empty.md")}), monkeypatch)


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_a_named_file_of_labelled_rows_that_is_missing_is_an_error_and_a_default_one_is_not(config, tmp_path, split):
    task = tasks["jsonl"](config.task)
    missing = config.replace(**{f"task.{split}": str(tmp_path / "tset.jsonl"), "train.distill.teacher": "endpoint"})
    with pytest.raises(DataError, match=rf"tset\.jsonl: no such file; put the {split} rows there"):
        read_queries_to_answer(missing, task)
    generating = missing.replace(**{"task.queries": "", "task.generate": True})
    with pytest.raises(DataError, match=rf"name another file with task\.{split}"):
        task_sources(generating)
    folder = missing.replace(**{f"task.{split}": str(tmp_path / "no folder" / f"{split}.jsonl")})
    with pytest.raises(DataError, match="no such file"):
        read_queries_to_answer(folder, task)
    default = missing.replace(**{f"task.{split}": str(tmp_path / f"{split}.jsonl")})
    assert len(read_queries_to_answer(default, task)[1]) == len(QUERIES)


def test_ids_and_overlaps_are_checked_before_anything_is_asked(config, monkeypatch, tmp_path):
    def write(name, *rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    def ask(**changes):
        changed = config.replace(**{"train.distill.teacher": "endpoint", **changes})
        make_answered_rows(changed, lambda _: pytest.fail("asked for money"), lambda _: None, lambda *_: None)

    twice = write("twice.jsonl", *({"query": f"{query} now", "id": "train-1"} for query in QUERIES[:1]))
    own = write("own.jsonl", {"query": "pink", "answer": "p1"})
    with pytest.raises(DataError, match=r"1 ids stand more than once over train, dev, test and queries.*'train-1'"):
        ask(**{"task.train": own, "task.queries": twice})
    same = write("same.jsonl", {"query": "Pink", "answer": "p1", "id": "other"})
    with pytest.raises(DataError, match="1 train queries also stand in dev or test"):
        ask(**{"task.train": own, "task.test": same})


@pytest.fixture
def service(monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "sk-secret")
    with FakeOpenAI(answer=lambda model, prompt: prompt.splitlines()[-1].upper()) as fake:
        yield fake


def endpoint(config, service, **changes):
    closed = {"base_url": service.url, "model": "big", "api_key_env": "TEACHER_KEY", "confirmed": True}
    return config.replace(closed=closed, **{"train.distill.teacher": "endpoint", **changes})


def test_an_endpoint_answers_with_the_whole_prompt_and_is_never_paid_twice(config, service):
    settings, told = endpoint(config, service), []
    service.faults["POST /chat"] = [None] * 11 + [401]
    with pytest.raises(ConfigError, match="refuses the key"):
        make_answered_rows(settings, lambda _: False, told.append, lambda *_: None)
    paid = len(service.chats)
    assert 0 < paid < len(QUERIES) and "Asking big for 40 answers takes about" in told[0]
    facts = make_answered_rows(settings, lambda _: False, told.append, lambda *_: None)
    assert len(service.chats) == len(QUERIES), "what was on its way when the key was refused is kept too"
    assert facts["by"] == "endpoint" and facts["teacher"] == "big" and facts["views"] == 1
    assert all(chat["messages"][0]["content"].startswith(TEMPLATE.strip()) for chat in service.chats)
    assert {r["answer"] for r in read(settings, "test")} <= {query.upper() for query in QUERIES}


def test_an_endpoint_teaches_beside_labelled_rows(config, service, tmp_path):
    labelled = [{"query": "code of red", "answer": "k4"}, {"query": "pink", "answer": "-"}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, labelled)))
    settings = endpoint(config, service, **{"task.train": str(tmp_path / "train.jsonl")})
    facts = make_answered_rows(settings, lambda _: False, lambda _: None, lambda *_: None)
    rows = {r["query"]: r["answer"] for r in read(settings, "train")}
    assert facts["labelled"] == 2 and rows["code of red"] == "k4" and rows["pink"] == "-" and len(rows) > 20


def test_a_longer_query_is_asked_and_priced_alone_though_it_leaves_less_room_for_answers(
    config, service, monkeypatch, tmp_path
):
    settings, told = endpoint(config, service, **{"train.distill.max_tokens": 64}), []
    rows = read_queries_to_answer(settings, tasks["jsonl"](settings.task))[1]
    monkeypatch.setattr(step, "context_length", lambda model: 2048)
    room = 2048 - answer_limit(settings.replace(**{"train.distill.max_tokens": 2048}), TEMPLATE.strip(), rows)
    monkeypatch.setattr(step, "context_length", lambda model: room + 40)
    make_answered_rows(settings, lambda _: False, told.append, lambda *_: None)
    with open(config.task.queries, "a") as file:
        file.write(json.dumps({"query": "please tell me what code yellow has"}) + "\n")
    make_answered_rows(settings, lambda _: False, told.append, lambda *_: None)
    assert len(service.chats) == len(QUERIES) + 1 and {chat["max_tokens"] for chat in service.chats[:-1]} == {40}
    assert service.chats[-1]["max_tokens"] < 40, "what the longest query leaves is what is sent"
    assert "Asking big for 1 answers (40 others are there)" in [line for line in told if "Asking" in line][1]


@pytest.mark.parametrize(("finish", "counted"), [("length", True), ("length", False), (None, False), ("stop", True)])
def test_an_answer_that_the_limit_cut_off_is_no_row_also_where_a_service_counts_no_tokens(
    config, service, finish, counted
):
    chat = service.chat

    def reply(wanted):
        status, answer = chat(wanted)
        long = answer["choices"][0]["message"]["content"] != "k"
        answer["choices"][0]["finish_reason"] = finish if long else "stop"
        return status, answer if counted else {**answer, "usage": None}

    service.chat = reply
    service.answer = lambda model, prompt: "on and on and on and on and on" if "red" in prompt.splitlines()[-1] else "k"
    facts = make_answered_rows(endpoint(config, service), lambda _: False, lambda _: None, lambda *_: None)
    assert facts["answered"] == (40 if finish == "stop" else 30)


def test_no_money_is_spent_without_a_key_or_a_yes(config, service, monkeypatch):
    settings = endpoint(config, service, **{"closed.confirmed": False})
    with pytest.raises(TrainingError, match="nothing was asked and nothing spent"):
        make_answered_rows(settings, lambda _: False, lambda _: None, lambda *_: None)
    monkeypatch.setenv("TEACHER_KEY", "")
    with pytest.raises(ConfigError, match="TEACHER_KEY is empty"):
        require_endpoint(settings)
    assert not service.chats
