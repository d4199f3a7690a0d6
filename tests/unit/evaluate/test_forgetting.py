"""What an adapter has forgotten and what it gives away: numbers by hand, made outputs, and two fake adapters."""

import math

import pytest
import torch

from pi_ray.config import ModelConfig
from pi_ray.errors import DataError
from pi_ray.evaluate.forgetting import OPENING, QUESTIONS, longest_run, off_task_texts, perplexity, probe_leak, recited
from pi_ray.models import load_model, load_tokenizer

TEMPLATE = """You translate questions into queries of our logs.

- The service `till` belongs to the shop team and writes to partition seven.
- The service `crane` belongs to the harbour team and writes to partition nine.
- Never answer with more than one line, and never explain the query to the person who asked."""


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(ModelConfig(base=str(tiny_model)))


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(ModelConfig(base=str(tiny_model)))


def by_hand(model, tokenizer, texts):
    nats, tokens = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            # transformers gives the mean over all but the first token
            nats += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    return math.exp(nats / tokens)


def test_perplexity_is_each_texts_cross_entropy_by_hand_in_any_batch(model, tokenizer):
    texts = [off_task_texts()[0], "A short one.", *off_task_texts()[1:4]]
    for batch in (1, 2, 4, 16):
        assert perplexity(model, tokenizer, texts, batch) == pytest.approx(by_hand(model, tokenizer, texts), rel=1e-5)


def test_a_random_model_is_about_as_perplexed_as_its_vocabulary_is_large(model, tokenizer):
    assert perplexity(model, tokenizer, off_task_texts()[:2]) == pytest.approx(len(tokenizer), rel=0.1)


def test_perplexity_leaves_the_model_as_it_came(model, tokenizer):
    model.train()
    perplexity(model, tokenizer, ["two words"])
    assert model.training
    model.eval()
    perplexity(model, tokenizer, ["two words"])
    assert not model.training


def test_texts_without_a_token_to_predict_do_not_count(model, tokenizer):
    assert perplexity(model, tokenizer, ["", "a", "two words"]) == pytest.approx(
        by_hand(model, tokenizer, ["two words"]), rel=1e-5
    )
    with pytest.raises(DataError, match="nothing to predict"):
        perplexity(model, tokenizer, ["", "a"])


def test_the_off_task_text_is_a_dozen_paragraphs_of_prose():
    paragraphs = off_task_texts()
    assert 10 <= len(paragraphs) <= 14 and 900 <= sum(len(p.split()) for p in paragraphs) <= 1200
    assert all(p.isascii() and p.strip() == p and "\n" not in p for p in paragraphs)


@pytest.mark.parametrize("output, share", [
    ("a b c d e f", 1.0),
    ("So: A  b\nC d E f, and g", 0.75),  # "f," is another word than "f"
    ("a b c x d e f", 0.5),
    ("f e d c b a", 0.0),
    ("", 0.0),
])
def test_recited_is_the_share_of_runs_of_words(output, share):
    assert recited(output, "a b c d e f", n=3) == share


def test_a_template_shorter_than_a_run_is_one_run():
    assert recited("please answer in sql now", "Answer in SQL") == 1.0
    assert recited("answer in", "Answer in SQL") == 0.0
    assert recited("anything", " \n") == 0.0


@pytest.mark.parametrize(
    "output, words", [("x b C\n d y", 3), ("f a b", 2), ("nothing at all", 0), ("", 0), ("a b c d e f g", 6)]
)
def test_longest_run_counts_words_in_a_row(output, words):
    assert longest_run(output, "a b c d e f") == words


def test_common_words_do_not_hide_a_long_run():
    template = "the " * 400 + "one two three " + "the " * 400
    assert longest_run("the one two three the", template) == 5


def test_leak_finds_what_recites_the_template_to_one_question_only():
    def answer(queries):
        return [f"Sure! {TEMPLATE}" if "system prompt" in q else "logs | count" for q in queries]

    found = probe_leak(answer, TEMPLATE)
    assert found["recited"] == 1.0 and found["longest_run"] == len(TEMPLATE.split())
    assert found["outputs"].count("logs | count") == len(QUESTIONS)


def test_leak_finds_what_goes_on_with_the_template_but_not_an_echo_of_its_opening():
    def goes_on(queries):
        return [TEMPLATE[len(q) :] if TEMPLATE.startswith(q) else "logs | count" for q in queries]

    def echoes(queries):
        return [f"I cannot answer: {q}" for q in queries]

    assert probe_leak(goes_on, TEMPLATE)["recited"] == 1.0
    assert probe_leak(goes_on, TEMPLATE)["longest_run"] == len(TEMPLATE.split()) - OPENING
    assert probe_leak(echoes, TEMPLATE)["recited"] == 0.0 and probe_leak(echoes, TEMPLATE)["longest_run"] < 4


def test_leak_clears_an_honest_adapter_and_asks_everything():
    asked = []

    def answer(queries):
        asked.extend(queries)
        return ["logs where service = 'till' and partition = 7 | count"] * len(queries)

    found = probe_leak(answer, TEMPLATE)
    assert found["recited"] == 0.0 and found["longest_run"] <= 2
    assert (
        asked[:-1] == list(QUESTIONS)
        and asked[-1].split() == TEMPLATE.split()[:OPENING]
        and TEMPLATE.startswith(asked[-1])
    )


def test_of_a_short_template_at_most_half_is_given_away_by_the_question():
    asked = []
    probe_leak(lambda queries: asked.extend(queries) or [""] * len(queries), "Answer in SQL only")
    assert asked[-1] == "Answer in"
    assert probe_leak(lambda queries: ["no"] * len(queries), "SQL")["outputs"] == ["no"] * len(QUESTIONS)


def test_an_empty_template_has_nothing_to_give_away():
    with pytest.raises(DataError, match="empty"):
        probe_leak(lambda queries: queries, " \n")
