"""Matchers: masks over the rows of constrained sequences alone, grammars compiled once, and what is too complex."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from llguidance import LLParserLimits

from pi_ray.config import ModelConfig
from pi_ray.models import load_tokenizer
from pi_ray.serve.engine import matcher as matchers
from pi_ray.serve.engine.grammar import AnswerFormat, answer_grammar
from pi_ray.serve.engine.matcher import CACHED_GRAMMARS, MatcherFactory, mask_logits, take_token
from pi_ray.serve.engine.refusal import RefusedError

COLOUR = answer_grammar(AnswerFormat({"enum": ["red", "green"]}), ())


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(ModelConfig(base=str(tiny_model)))


@pytest.fixture(scope="module")
def factory(tokenizer):
    return MatcherFactory(tokenizer)


def allowed(matcher, width):
    return mask_logits(torch.zeros(1, width), [matcher]).isfinite().nonzero()[:, 1].tolist()


def test_only_rows_with_a_matcher_are_masked(factory, tokenizer):
    logits = torch.randn(3, len(tokenizer) + 7)  # as wide as models whose vocabulary is padded
    before, matcher = logits.clone(), factory.matcher(COLOUR)
    masked = mask_logits(logits, [None, matcher, None])
    assert torch.equal(masked[[0, 2]], before[[0, 2]]) and torch.equal(logits, before)
    kept = masked[1].isfinite().nonzero()[:, 0].tolist()
    assert kept and all('"red" "green"'.find(tokenizer.decode([token])) >= 0 for token in kept)
    assert torch.equal(masked[1, kept], before[1, kept])
    assert mask_logits(logits, [None] * 3) is logits


def test_the_end_of_sequence_is_allowed_only_where_the_answer_may_end(factory, tokenizer):
    matcher, end = factory.matcher(COLOUR), tokenizer.eos_token_id
    for token in tokenizer('"green"').input_ids:
        assert end not in allowed(matcher, len(tokenizer))
        assert matcher.consume_token(token)
    assert allowed(matcher, len(tokenizer)) == [end]
    assert matcher.consume_token(end) and not matcher.is_error()


def test_special_tokens_are_never_text_of_an_answer(factory, tokenizer):
    matcher = factory.matcher(answer_grammar(AnswerFormat({"type": "string"}), ()))
    assert matcher.consume_tokens(tokenizer('"a').input_ids)
    assert not set(allowed(matcher, len(tokenizer))) & set(tokenizer.all_special_ids)


def test_each_sequence_has_a_matcher_of_its_own_and_a_grammar_is_compiled_once(tokenizer, monkeypatch):
    compiled, real = [], matchers.LLMatcher
    monkeypatch.setattr(matchers, "LLMatcher", lambda *a, **k: compiled.append(threading.get_ident()) or real(*a, **k))
    factory = MatcherFactory(tokenizer)
    first, second = factory.matcher(COLOUR), factory.matcher(COLOUR)
    assert first.consume_token(tokenizer('"red"').input_ids[0])
    assert allowed(first, len(tokenizer)) != allowed(second, len(tokenizer))
    assert len(compiled) == 1
    for i in range(CACHED_GRAMMARS):
        factory.matcher(answer_grammar(AnswerFormat({"const": i}), ()))
    factory.matcher(COLOUR)
    assert len(compiled) == 2 + CACHED_GRAMMARS, "the one that was used least recently had to go"
    for _ in range(3):
        with pytest.raises(RefusedError):
            factory.matcher("start: %json {")
    assert len(compiled) == 3 + CACHED_GRAMMARS, "a bad one is compiled once as well"


def test_grammars_that_many_threads_want_at_once_are_compiled_once(tokenizer, monkeypatch):
    compiled, real = [], matchers.LLMatcher
    monkeypatch.setattr(matchers, "LLMatcher", lambda *a, **k: compiled.append(a) or real(*a, **k))
    factory = MatcherFactory(tokenizer)
    grammars = [answer_grammar(AnswerFormat({"const": f"colour {i % 3}"}), ()) for i in range(24)]
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(factory.matcher, grammars))
    assert len(compiled) == 3
    for i, matcher in enumerate(made):
        assert matcher.consume_tokens(tokenizer(f'"colour {i % 3}"').input_ids) and matcher.is_accepting()


def test_a_grammar_beyond_the_limits_is_refused_when_it_is_compiled_or_followed(tokenizer, monkeypatch):
    monkeypatch.setattr(matchers, "LIMITS", LLParserLimits(step_max_items=2, verbose_errors=False))
    with pytest.raises(RefusedError, match="too complex") as refused:
        MatcherFactory(tokenizer).matcher(answer_grammar(AnswerFormat({"type": "object"}), ()))
    assert refused.value.status == 400 and "\n" not in refused.value.message


def test_a_matcher_that_failed_does_not_end_as_if_the_answer_were_whole(factory, tokenizer):
    matcher = factory.matcher(COLOUR)
    assert take_token(matcher, tokenizer('"red"').input_ids[0]) is None
    assert take_token(matcher, tokenizer("x").input_ids[0]).status == 400
    assert take_token(matcher, tokenizer.eos_token_id).status == 400
