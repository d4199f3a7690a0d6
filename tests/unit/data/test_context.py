"""Conversations that are longer than the context lose their oldest turns, and are counted."""

from types import SimpleNamespace

import pytest

from pi_ray.config import RunConfig
from pi_ray.conversation import dump_messages, load_messages
from pi_ray.data import context as module
from pi_ray.data.context import ConversationContext
from pi_ray.errors import DataError, ModelError
from pi_ray.prompt import Template
from pi_ray.protocols import Reject, Row

WORDS = 10  # tokens of the template


@pytest.fixture
def make(monkeypatch):
    """Tokens of the context -> a ConversationContext whose tokens are words."""
    monkeypatch.setattr(module, "context_length", lambda model: make.tokens)
    encoder = SimpleNamespace(
        prefix=lambda text: text.split(), answer=lambda text: text.split(),
        row=lambda query: [word for m in load_messages(query) for word in m["content"].split()],
    )

    def make(tokens, limit=0):
        make.tokens = 10 * limit or tokens
        config = RunConfig(name="a", prompt={"chat": "chatml", "context": limit})
        return ConversationContext(config, encoder, Template(" ".join(["word"] * WORDS)))

    return make


def talk(*texts):
    """A row whose last text is the answer."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts[:-1])]
    return Row("a", dump_messages(messages), texts[-1])


def texts(row):
    return [m["content"] for m in load_messages(row.query)]


def test_the_oldest_turns_after_the_first_users_go_first(make):
    context = make(WORDS + 9)
    row = context.fit(talk("u1 u1 u1", "a1 a1 a1", "u2", "a2 a2", "u3", "a3 a3"))  # 12 tokens
    assert texts(row) == ["u1 u1 u1", "a2 a2", "u3"] and row.answer == "a3 a3"
    assert [m["role"] for m in load_messages(row.query)] == ["user", "assistant", "user"]
    assert [m.get("weight") for m in load_messages(row.query)] == [None, 0, None]  # it answers what was cut
    assert context.notes() == [
        "1 of 1 rows cut to the 9 tokens that the template leaves of the model's context: 2 messages left "
        "out, the oldest after the first one"
    ]


def test_what_fits_stays_as_it_is_and_is_not_mentioned(make):
    context, row = make(WORDS + 12), talk("u1 u1 u1", "a1 a1 a1", "u2", "a2 a2", "u3", "a3 a3")
    assert context.fit(row) is row and context.notes() == []


def test_a_turn_that_cannot_fit_is_left_out_and_counted(make):
    context = make(WORDS + 5)
    assert context.fit(talk("u1 u1 u1", "a1"))
    assert context.fit(talk("u1", "a1", "u2 u2 u2 u2 u2", "a2")) is context.fit(talk("u1 u1 u1 u1 u1", "a1")) is None
    [note] = context.notes()
    assert note.startswith("2 of 3 rows left out") and "exchange alone are longer than the 5 tokens" in note
    given = Reject("f", 3, "bad")
    assert context.fit(given) is given


def test_what_the_chat_template_does_not_take_is_a_reject_and_the_rest_goes_on(make):
    def all_turns(query, answer):
        if answer == "two calls":
            raise ModelError("the chat template does not take this conversation")

    context = make(WORDS + 9)
    context.is_own_template, context.encoder.all_turns = True, all_turns
    good, bad = talk("u1", "a1"), talk("u1", "two calls")
    assert context.fit(good) is good
    assert context.fit(bad) == Reject("a", 0, "the chat template does not take this conversation")


def called(number, *texts):
    """A conversation with a tool call whose id is a number."""
    function = {"name": "find", "arguments": '{"id": 7}'}
    call = {"id": f"c{number}", "type": "function", "function": function}
    return Row("a", dump_messages([
        {"role": "user", "content": "Where?"}, {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": f"c{number}", "content": "here"},
        *({"role": ("assistant", "user")[i % 2], "content": text} for i, text in enumerate(texts)),
    ]), "Bye.")


@pytest.mark.parametrize(("all_turns", "repeated"), [(True, 3), (False, 1)])
def test_turns_that_are_trained_and_evaluated_are_counted_whatever_their_ids(make, all_turns, repeated):
    context = make(WORDS + 99)
    context.all_turns = all_turns
    context.remember(called(1, "It is here.", "Thanks."), "train")
    repeats = (talk("where?", "a"), called(2), called(3, "It is here.", "Thanks."))
    for row in (*repeats, called(4, "No.", "Oh."), talk("b", "a")):
        context.remember(row, "test")
    context.remember(Reject("f", 3, "bad"), "test")
    [note] = context.notes()
    assert note.startswith(f"{repeated} of 5 turns of dev and test follow the same messages as one of train")


def test_a_template_that_fills_the_context_is_refused(make):
    with pytest.raises(DataError, match="have 10 tokens, and the model's context is 10"):
        make(WORDS)


def test_a_limit_of_ones_own_is_named_and_not_the_models(make):
    with pytest.raises(DataError, match=r"have 10 tokens, and prompt\.context is 8; raise it, or shorten"):
        make(WORDS, limit=8)
