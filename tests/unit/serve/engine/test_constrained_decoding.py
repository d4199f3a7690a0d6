"""Constrained decoding in the running batch: answers that fit, and neighbours that do not notice."""

import asyncio
import json
import threading

import jsonschema
import pytest

from pi_ray.config import ModelConfig, ServeConfig
from pi_ray.protocols import GenerationRequest
from pi_ray.serve.engine import scheduler
from pi_ray.serve.engine.engine import TransformersEngine
from pi_ray.serve.engine.grammar import AnswerFormat, answer_grammar
from pi_ray.serve.engine.refusal import RefusedError
from tests.lora import put_in_store

SCHEMA = {
    "type": "object", "required": ["colours", "count", "exact"], "additionalProperties": False,
    "properties": {
        "colours": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 3},
        "count": {"type": "integer", "minimum": 0, "maximum": 99}, "exact": {"type": "boolean"},
    },
}
GRAMMAR = answer_grammar(AnswerFormat(SCHEMA), ())
PROMPTS = [list(range(100, 110)), [7, 8, 9], list(range(500, 540))]


@pytest.fixture(scope="module")
def engine(tiny_model):
    engine = TransformersEngine(ModelConfig(base=str(tiny_model)), ServeConfig())
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    return str(put_in_store(tmp_path_factory.mktemp("store"), "a", tiny_model, seed=3))


def request(prompt=PROMPTS[0], grammar=GRAMMAR, max_new_tokens=600, **options):
    return GenerationRequest(prompt, max_new_tokens, grammar=grammar, **options)


async def generate(engine, request):
    return [token.id async for token in engine.generate(request)]


def together(engine, *requests):
    async def all_at_once():
        return await asyncio.gather(*(generate(engine, each) for each in requests), return_exceptions=True)

    return asyncio.run(all_at_once())


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0, "seed": 1}, {"temperature": 2.0, "top_p": 0.9, "seed": 2}], ids=str
)
def test_a_random_model_answers_in_the_schema_and_ends_where_the_answer_does(engine, adapter, options):
    for ids in together(engine, *(request(p, **options) for p in PROMPTS), request(adapter=adapter, **options)):
        assert ids[-1] == engine.tokenizer.eos_token_id
        jsonschema.validate(json.loads(engine.tokenizer.decode(ids[:-1])), SCHEMA)


def test_answers_are_the_same_alone_and_beside_others_constrained_or_not(engine, adapter):
    requests = [
        request(), request(PROMPTS[1], temperature=1.0, seed=5), request(PROMPTS[2], grammar="", max_new_tokens=40),
        request(PROMPTS[1], grammar="", max_new_tokens=40, temperature=1.0, seed=6), request(adapter=adapter),
        request(grammar="", max_new_tokens=40, adapter=adapter),
    ]
    alone = [ids for each in requests for ids in together(engine, each)]
    assert together(engine, *requests) == alone == together(engine, *requests)
    assert len({json.dumps(ids) for ids in alone}) == len(alone)


def test_an_answer_that_is_cut_off_has_no_end(engine):
    [ids] = together(engine, request(max_new_tokens=5))
    assert len(ids) == 5 and engine.tokenizer.eos_token_id not in ids


def test_log_probabilities_are_the_models_own_though_its_choice_was_forced(engine):
    async def first(grammar):
        return await anext(engine.generate(request(grammar=grammar, logprobs=3)))

    forced, free = asyncio.run(first(GRAMMAR)), asyncio.run(first(""))
    assert forced.top == free.top and forced.id != free.id
    assert forced.logprob < free.logprob < 0


def test_grammars_are_compiled_before_a_request_waits_and_a_bad_one_harms_no_other(engine):
    good, bad = together(engine, request(), request(grammar="start: %json {"))
    assert isinstance(bad, RefusedError) and bad.status == 400
    assert isinstance(good, list) and engine.stats()["active"] == engine.stats()["waiting"] == 0


def test_grammars_are_compiled_in_one_thread_of_their_own(engine, monkeypatch):
    threads, real = [], engine._matchers.matcher
    monkeypatch.setattr(engine._matchers, "matcher", lambda g: threads.append(threading.current_thread()) or real(g))
    together(engine, *(request(max_new_tokens=1) for _ in range(8)))
    assert len(threads) == 8 and len(set(threads)) == 1 and threads[0].name.startswith("grammar")


@pytest.mark.fault
def test_a_grammar_that_fails_under_way_ends_its_own_request_alone(engine, monkeypatch):
    real, steps = scheduler.mask_logits, 0

    def break_at_the_fourth_step(logits, matchers):
        nonlocal steps
        for matcher in filter(None, matchers):  # its grammar is compiled first: the other request may be ahead
            steps += 1
            if steps == 4:
                matcher.consume_token(0)  # which its grammar does not allow
        return real(logits, matchers)

    monkeypatch.setattr(scheduler, "mask_logits", break_at_the_fourth_step)
    failed, other = together(engine, request(), request(PROMPTS[1], grammar="", max_new_tokens=20))
    assert isinstance(failed, RefusedError) and "too complex" in failed.message
    assert len(other) == 20
