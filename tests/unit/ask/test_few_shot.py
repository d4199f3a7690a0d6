"""The writer of a small base: what it is shown, how its requests begin, and which replies are queries."""

from pi_ray.ask import few_shot
from pi_ray.ask.few_shot import DEMONSTRATIONS, OPENINGS, FewShotWriter, demonstrations, names_fact, opening
from pi_ray.ask.requests import WriteRequest, adapter_prompt
from pi_ray.ask.writers import choose_writer, written_kinds
from pi_ray.config import RunConfig
from pi_ray.units import Unit

FACT = Unit("Opening hours", "Tuesday: 10 to 20 o'clock", "item")


def config(model, writer="prompt"):
    task, train = {"queries": "generate"}, {"objective": "distill"}
    return RunConfig.model_validate({
        "name": "a", "model": {"base": str(model)}, "task": task, "train": train, "ask": {"writer": writer},
    })


def request(seed):
    return WriteRequest(f"r{seed}", (0,), "direct", 1, adapter_prompt([FACT]), seed)


def test_a_small_base_that_is_prompted_is_shown_examples(tiny_model):
    settings = config(tiny_model)
    assert choose_writer(settings, 0) == "few-shot" and written_kinds(settings, "few-shot") == ["direct"]
    assert choose_writer(config(tiny_model, "endpoint"), 0) == "endpoint"


def test_the_examples_have_the_form_of_a_request_and_name_their_fact():
    assert demonstrations().count("Request:") == len(DEMONSTRATIONS)
    for fact, query in DEMONSTRATIONS:
        prompt = adapter_prompt([Unit("", fact, "rule")])
        assert f"{prompt} {query}" in demonstrations() and names_fact(query, prompt)


def test_a_request_begins_as_its_seed_says_and_requests_begin_differently():
    assert opening(request(1)) == opening(request(1))
    assert len({opening(request(seed)) for seed in range(40)}) > len(OPENINGS) / 2


def test_a_reply_is_one_line_and_empty_where_it_names_nothing_of_its_fact(tiny_model, monkeypatch):
    seen = {}

    def write(config, requests, prompt, prefix, adapter, limit, one_line):
        seen.update(chat=prompt.chat, prefix=prefix, one_line=one_line)
        assert all(r.prompt == f"{adapter_prompt([FACT])} {opening(r)}" for r in requests)
        yield 1, " are you there?\nFact: Tuesday"
        yield 0, " do you open on Tuesday?\nFact: more"

    monkeypatch.setattr(few_shot, "write_locally", write)
    found = dict(FewShotWriter(config(tiny_model), 32).write([request(1), request(2)]))
    assert found == {0: f"{opening(request(1))} do you open on Tuesday?", 1: ""}
    assert seen == {"chat": "none", "prefix": demonstrations(), "one_line": True}


def test_the_name_of_the_section_alone_does_not_name_the_fact():
    assert not names_fact("When are the opening hours?", adapter_prompt([FACT]))
    assert names_fact("Are you open on Tuesdays?", adapter_prompt([FACT]))
