"""The step as a whole: what is asked, kept, resumed, and how it becomes a run's unlabelled rows."""

import json
import re
from random import Random

import pytest

from pi_ray.ask import writers
from pi_ray.ask.ask import ask_queries
from pi_ray.ask.sources import Sources, task_sources
from pi_ray.config import RunConfig
from pi_ray.data.ingest import ingest
from pi_ray.errors import DataError, TrainingError
from pi_ray.protocols import Row
from pi_ray.registry import tasks
from pi_ray.retrieve.neighbours import normalised
from pi_ray.run.directory import RunDir
from pi_ray.run.fingerprint import prepare_fingerprint
from pi_ray.run.queries import queries_digest, read_queries
from tests.unit.fake_openai import FakeOpenAI

COLOURS = {"red": "k4", "blue": "z9", "green": "q1", "black": "b7", "white": "w2", "brown": "n6"}
HIDDEN = ("white", "brown")  # in no labelled row
TEMPLATE = "Translate a colour into its code.\n\n## Colours\n\n" + "\n".join(f"{c}: {k}" for c, k in COLOURS.items())
FORMS = ("what is {} in our system?", "which code has {} today?", "tell me the code of {} now", "what about {} then?")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A task of four labelled colours of six, and an adapter that writes sentences of the facts that it is given."""
    rows = [(c, FORMS[i].format(c)) for c in COLOURS if c not in HIDDEN for i in range(2)]
    for split, some in {"train": rows[:-2], "dev": rows[-2:-1], "test": rows[-1:]}.items():
        lines = [json.dumps({"query": query, "answer": COLOURS[c]}) + "\n" for c, query in some]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    (tmp_path / "template.md").write_text(TEMPLATE)
    monkeypatch.setattr(writers, "train_writer", lambda config, pairs, watch: "adapter")
    monkeypatch.setattr(writers, "write_locally", write)
    written.clear()
    return tmp_path


written: list[str] = []  # ids of requests


def write(config, requests, *_):
    """Replies in another order than that of the requests, as several actors give, now and then about a wrong colour."""
    for place in sorted(range(len(requests)), key=lambda i: (-i // 16, i)):
        request, random = requests[place], Random(requests[place].seed)
        written.append(request.id)
        colours = [line.split(": ")[2] for line in request.prompt.splitlines() if line.startswith("Fact: Colours")]
        colours = [random.choice(list(COLOURS))] if random.random() < 0.2 else colours
        yield place, random.choice(FORMS).format(" and ".join(colours)) if colours else "hello there, my friend"


def run_config(folder, tiny_model, **changes):
    task = {name: str(folder / f"{name}.jsonl") for name in ("train", "dev", "test")}
    return RunConfig.model_validate({
        "name": "tiny", "run_dir": str(folder / "run"), "model": {"base": str(tiny_model)}, "prompt": {"chat": "none"},
        "task": {**task, "template": str(folder / "template.md"), "queries": "generate"}, "ask": {"queries": 40},
        "train": {"objective": "distill", "workers": 1, "backend": {"name": "ddp"}},
    }).replace(**changes)


def ask(config, confirm=lambda sentence: False, said=None):
    return ask_queries(config, task_sources(config), confirm, said.append if said is not None else lambda line: None)


def test_every_unit_is_asked_about_and_what_is_evaluated_never(folder, tiny_model):
    config = run_config(folder, tiny_model)
    manifest, queries = ask(config), read_queries(RunDir(config.root))
    sources = task_sources(config)
    known = {normalised(q) for q in [*sources.held_out, *(row.query for row in sources.labelled)]}
    assert not known & {normalised(asked.query) for asked in queries}
    assert len({normalised(asked.query) for asked in queries}) == len(queries) == manifest["queries"]
    units = manifest["units"]
    for asked in queries:
        colours = [units[unit].split(": ")[1] for unit in asked.units if units[unit].startswith("Colours")]
        assert all(colour in asked.query for colour in colours), "what it came from"
    direct = {units[a.units[0]] for a in queries if a.kind == "direct"}
    assert {f"Colours: {c}: {COLOURS[c]}" for c in HIDDEN} <= direct
    before = dict(zip(units, manifest["touched_before"], strict=True))
    assert [before[f"Colours: {c}: {COLOURS[c]}"] for c in COLOURS] == [2, 2, 2, 0, 0, 0]
    assert manifest["written"] == sum(manifest["filters"].values()) and manifest["filters"]["about another unit"]
    assert manifest["coverage"]["kinds"] == ["direct", "two"], "an adapter writes no others, and the matrix says so"


def test_the_same_seed_asks_the_same_and_another_does_not(folder, tiny_model):
    def queries(**changes):
        config = run_config(folder, tiny_model, **changes)
        ask(config)
        return [tuple(asked) for asked in read_queries(RunDir(config.root))]

    first = queries(run_dir=str(folder / "one"))
    assert first == queries(run_dir=str(folder / "two"))
    assert first != queries(run_dir=str(folder / "three"), **{"ask.seed": 1})


def test_a_killed_step_goes_on_and_ends_with_the_same_queries(folder, tiny_model, monkeypatch):
    whole = run_config(folder, tiny_model, run_dir=str(folder / "whole"))
    ask(whole)
    total, killed = len(written), run_config(folder, tiny_model)

    def dying(config, requests, *rest):
        for n, reply in enumerate(write(config, requests, *rest)):
            if n == 30:
                raise KeyboardInterrupt
            yield reply

    monkeypatch.setattr("pi_ray.ask.ask.PIECE_REQUESTS", 8)
    written.clear()
    with monkeypatch.context() as patch:
        patch.setattr(writers, "write_locally", dying)
        with pytest.raises(KeyboardInterrupt):
            ask(killed)
    assert not RunDir(killed.root).queries.exists()
    before, said = len(written), []
    ask(killed, said=said)
    assert "pieces were already there" in said[0]
    assert before < len(written) < before + total, "what was written whole is not written again"
    assert read_queries(RunDir(killed.root)) == read_queries(RunDir(whole.root))
    assert not list(killed.root.glob(".queries*")), "no piece is left behind"
    written.clear()
    ask(killed, said=said)
    assert said[-1] == "ask: nothing to do, the queries are there" and not written


@pytest.mark.parametrize("logged", [False, True])
def test_the_queries_become_the_unlabelled_rows(folder, tiny_model, logged):
    config = run_config(folder, tiny_model)
    (folder / "log.jsonl").write_text('{"query": "what is white like?"}\n{"query": "what is red in our system?"}\n')
    if logged:
        data = config.model_dump(mode="json")
        config = RunConfig.model_validate({**data, "task": {**data["task"], "queries": f"{folder}/log.jsonl+generate"}})
    run, task, said = RunDir(config.root), tasks["jsonl"](config.task), []
    unasked = prepare_fingerprint(config, task.fingerprint(), queries_digest(run))
    with pytest.raises(DataError, match="no queries are generated yet; run 'pi-ray ask'"):
        ingest(task, config.task, run, unasked, said.append, ("train", "dev", "test", "unlabelled"))
    ask(config)
    fingerprint = prepare_fingerprint(config, task.fingerprint(), queries_digest(run))
    assert fingerprint != unasked
    ingest(task, config.task, run, fingerprint, said.append, ("train", "dev", "test", "unlabelled"))
    rows = run.read_rows("unlabelled")
    generated = [(f"unlabelled-{asked.id}", asked.query) for asked in read_queries(run)]
    own = [("unlabelled-1", "what is white like?")] if logged else []
    assert [(row.id, row.query) for row in rows] == own + generated and not any(row.answer for row in rows)


def test_an_endpoint_is_asked_after_consent_and_what_is_paid_is_kept(folder, tiny_model, monkeypatch):
    def answer(model, prompt):
        colour = next((c for c in COLOURS if f"- Colours: {c}:" in prompt.split("-----")[2]), "")
        lines = [f"{i}. {form.format(colour)}" for i, form in enumerate(FORMS, 1)]
        return "\n".join(lines) if colour else "- hi there all"

    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setattr("pi_ray.hosted.client.time.sleep", lambda seconds: None)
    with FakeOpenAI(answer=answer) as service:
        changes = {"ask.writer": "endpoint", "closed.base_url": service.url, "closed.model": "big", "ask.rounds": 1}
        config, sentences = run_config(folder, tiny_model, **changes), []
        with pytest.raises(TrainingError, match="not confirmed, so nothing was asked and nothing spent"):
            ask(config, lambda sentence: bool(sentences.append(sentence)))
        assert "requests in 1 rounds" in sentences[0] and not service.chats
        service.faults["POST /chat"] = [None] * 9 + [429, "drop"] + [402]
        with pytest.raises(TrainingError, match="insufficient_quota"):
            ask(config, lambda sentence: True)
        paid = (config.root / "closed" / "answers.jsonl").read_text().count('"key"')
        assert paid >= 1
        manifest = ask(config, lambda sentence: bool(sentences.append(sentence)) or True)
        asked, again = (int(re.search(r"at most (\d+) requests", said)[1]) for said in (sentences[0], sentences[-1]))
        assert again == asked - paid and f"({paid} others are paid for)" in sentences[-1]
        once = [json.dumps(chat, sort_keys=True) for chat in service.chats]
        assert len(once) - len(set(once)) <= len(once) - paid, "no paid reply is asked for again"
    assert all(chat["temperature"] == 1.0 and chat["top_p"] == 0.95 and "seed" in chat for chat in service.chats)
    assert manifest["writer"] == "endpoint" and manifest["coverage"]["kinds"] == ["direct", "reworded", "two", "edge"]
    queries = read_queries(RunDir(config.root))
    assert any("brown" in asked.query for asked in queries)
    texts = "".join(chat["messages"][0]["content"] for chat in service.chats)
    assert not any(query in texts for query in task_sources(config).held_out)


def test_without_labelled_rows_a_prompted_writer_works_and_an_adapter_is_refused(folder, tiny_model, monkeypatch):
    config = run_config(folder, tiny_model, **{"ask.rounds": 1})
    with pytest.raises(DataError, match="learns to write queries from labelled rows, of which there are 0; set"):
        ask_queries(config, Sources(TEMPLATE), lambda sentence: False, lambda line: None)

    def prompted(config, requests, prompt, prefix, adapter, limit):
        assert TEMPLATE in prefix and not adapter
        for place, request in enumerate(requests):
            colour = next(c for c in (*COLOURS, "code") if f"- Colours: {c}:" in request.prompt or c == "code")
            yield place, "\n".join(form.format(colour) for form in FORMS)

    monkeypatch.setattr(writers, "write_locally", prompted)
    monkeypatch.setattr(writers, "LARGE", 0)  # a smaller base is shown examples instead
    config = run_config(folder, tiny_model, **{"ask.writer": "prompt", "ask.kinds": ["direct"], "ask.rounds": 1})
    manifest = ask_queries(config, Sources(TEMPLATE), lambda sentence: False, lambda line: None)
    assert manifest["queries"] >= len(COLOURS) and set(manifest["touched_before"]) == {0}


def test_what_cannot_be_asked_about_is_said(folder, tiny_model):
    config = run_config(folder, tiny_model)
    rows = [Row(str(i), "hm hm", "oh") for i in range(4)]
    with pytest.raises(DataError, match="the template says nothing that a query could be about"):
        ask_queries(config, Sources("...", rows), lambda sentence: False)
    with pytest.raises(DataError, match="no labelled row shares a telling word with the template"):
        ask_queries(config, Sources(TEMPLATE, rows), lambda sentence: False)
    with pytest.raises(ValueError, match="needs a teacher to answer the queries"):
        run_config(folder, tiny_model, **{"train.objective": "sft"})
    with pytest.raises(ValueError, match="ask would have no effect"):
        run_config(folder, tiny_model, **{"task.generate": False})
    with pytest.raises(ValueError, match="an adapter writes the kinds direct and two alone"):
        run_config(folder, tiny_model, **{"ask.writer": "adapter", "ask.kinds": ["edge"]})
