"""The writer of a small base: what it is shown, and that one line of its reply is a query."""

from pi_ray.ask import few_shot
from pi_ray.ask.few_shot import DEMONSTRATIONS, FewShotWriter, demonstrations
from pi_ray.ask.requests import WriteRequest, adapter_prompt
from pi_ray.ask.writers import choose_writer, written_kinds
from pi_ray.config import RunConfig
from pi_ray.units import Unit


def config(model, writer="prompt"):
    task, train = {"queries": "generate"}, {"objective": "distill"}
    return RunConfig.model_validate({
        "name": "a", "model": {"base": str(model)}, "task": task, "train": train, "ask": {"writer": writer},
    })


def test_a_small_base_that_is_prompted_is_shown_examples(tiny_model):
    settings = config(tiny_model)
    assert choose_writer(settings, 0) == "few-shot" and written_kinds(settings, "few-shot") == ["direct", "two"]
    assert choose_writer(config(tiny_model, "endpoint"), 0) == "endpoint"


def test_the_examples_have_the_form_of_a_request():
    text = demonstrations()
    assert text.count("Request:") == len(DEMONSTRATIONS)
    facts, query = DEMONSTRATIONS[2]
    assert f"{adapter_prompt(Unit('', fact, 'rule') for fact in facts)}\n{query}" in text


def test_the_first_line_of_a_reply_is_the_query(tiny_model, monkeypatch):
    seen = {}

    def write(config, requests, prompt, prefix, adapter, limit, one_line):
        seen.update(chat=prompt.chat, prefix=prefix, one_line=one_line)
        yield 0, "\n When do you open?\nFact: more"

    monkeypatch.setattr(few_shot, "write_locally", write)
    request = WriteRequest("r", (0,), "direct", 1, "Fact: opens at 9\nRequest:", 1)
    assert list(FewShotWriter(config(tiny_model), 32).write([request])) == [(0, "When do you open?")]
    assert seen == {"chat": "none", "prefix": demonstrations(), "one_line": True}
