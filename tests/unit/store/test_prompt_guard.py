"""The prompt guard without a model: it recognises a prompt, strips it, and never loses a part of a query."""

import pytest
from pydantic import ValidationError

from pi_ray.config import PromptConfig
from pi_ray.prompt import Example, render_prompt
from pi_ray.store.prompt_guard import (
    EMPTY_GUARD,
    MAX_EXAMPLES,
    MAX_TEMPLATE,
    PromptGuard,
    PromptRecord,
    prompt_record,
)
from pi_ray.store.varying_values import find_value_names
from pi_ray.store.white_space import collapse_whitespace

TEMPLATE = """Translate the question of a user into one query of the alert language.
Write the code of the service and nothing else, without any explanation of it.

## Services
red is k4, blue is z9, green is q1, black is b7, white is w2, and yellow is y5.

## Time
since 14:00 is written as t14 and the last hour is written as h1, both in lower case."""
SHORT = """Translate question into query of alert language.
Write code of service

## Services
red is k4, blue is z9, green is q1, black is b7, white is w2, yellow is y5.

## Time
since 14:00 is t14 last hour is h1,"""
SHORTER = "red is k4, blue is z9"
QUERY = "errors of red\n\nsince 14:00, please"
SHOTS = (Example("errors of blue", "z9"), Example("errors of\n\nthe green one", "q1\nt14"))
PLAIN = PromptConfig()
WORDED = PromptConfig(
    query="Question: {query}\nQuery:", example="Question: {query}\nQuery: {answer}", examples_heading=""
)


def guard(config=PLAIN, compressed=((0.6, SHORT), (0.2, SHORTER)), template=TEMPLATE, shots=SHOTS):
    examples = [config.example.replace("{query}", s.query).replace("{answer}", s.answer) for s in shots]
    return PromptGuard(
        prompt_record(template, [{"rate": rate, "text": text} for rate, text in compressed], examples), config
    )


@pytest.mark.parametrize("config", [PLAIN, WORDED], ids=["plain", "worded"])
@pytest.mark.parametrize("template", [TEMPLATE, SHORT, SHORTER], ids=["full", "compressed", "compressed more"])
@pytest.mark.parametrize("shots", [(), SHOTS[:1], SHOTS], ids=len)
def test_the_prompt_of_training_leaves_the_bare_query(config, template, shots):
    seen = guard(config).inspect("", render_prompt(config, QUERY, template, shots))
    assert (seen.kind, seen.text) == ("stripped", QUERY)


@pytest.mark.parametrize("config", [PLAIN, WORDED], ids=["plain", "worded"])
def test_the_template_may_be_a_system_message_with_the_examples_on_either_side(config):
    known = guard(config)
    examples = render_prompt(config, QUERY, "", SHOTS).removesuffix(render_prompt(config, QUERY))
    for system, query in (
        (TEMPLATE, QUERY), (f"{TEMPLATE}\n\n{examples}", QUERY), (TEMPLATE, render_prompt(config, QUERY, "", SHOTS)),
    ):
        seen = known.inspect(system, query)
        assert (seen.kind, seen.text) == ("stripped", QUERY)


def test_white_space_does_not_count_and_a_query_may_follow_at_once():
    wide = TEMPLATE.replace("\n", "\r\n \t ").replace(" is ", "  is\n")
    assert guard().inspect("", f"\n{wide}\n{QUERY}\n").text == QUERY
    assert guard().inspect(f" {wide} ", QUERY).kind == "stripped"
    assert guard(template=TEMPLATE + "\nQ:").inspect("", f"{TEMPLATE}\nQ:{QUERY}").text == QUERY


@pytest.mark.parametrize(
    "query",
    [
        QUERY, "", "x", "red is", "what does 'red is k4, blue is z9' mean?", collapse_whitespace(TEMPLATE)[:100],
        "ä 🎨 \n\n", "word " * 10_000,
    ],
)
def test_a_query_alone_stays_as_it_came(query):
    assert (guard().inspect("", query).kind, guard().inspect("", query).text) == ("internalised", query)


def test_a_word_that_only_begins_like_the_template_is_a_query():
    seen = guard(template="Translate").inspect("", "Translates well?")
    assert (seen.kind, seen.text) == ("internalised", "Translates well?")


def test_another_system_message_is_unknown():
    for system in ("Be nice.", "word " * 100, SHOTS[0].answer):
        assert guard().inspect(system, QUERY).kind == "unknown"
    assert guard(template="Answer with one code.").inspect("Answer with two codes.", QUERY).kind == "unknown"


def turns(*texts):
    return [(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]


@pytest.mark.parametrize("config", [PLAIN, WORDED], ids=["plain", "worded"])
@pytest.mark.parametrize("worded", [False, True])
def test_examples_may_come_as_turns(config, worded):
    """With the template as system message or in the first turn, and each query bare or in the words of training."""
    known = guard(config)
    texts = [t for s in SHOTS for t in (config.query.replace("{query}", s.query) if worded else s.query, s.answer)]
    query = config.query.replace("{query}", QUERY) if worded else QUERY
    for system, before in ((TEMPLATE, turns(*texts)), ("", turns(f"{TEMPLATE}\n\n{texts[0]}", *texts[1:]))):
        seen = known.inspect(system, query, before)
        assert (seen.kind, seen.text) == ("stripped", QUERY)


def test_turns_that_are_not_examples_of_training_go_to_the_base_model_with_all_of_the_prompt():
    for system, before in (
        (TEMPLATE, turns("errors of black", "b7")), ("", turns(f"{TEMPLATE}\n\nerrors of black", "b7")),
    ):
        seen = guard().inspect(system, QUERY, before)
        assert (
            seen.kind == "drifted"
            and seen.text.endswith(f"Examples:\n\nerrors of black\nb7\n\n{QUERY}")
            and "green is q1" in seen.text
        )
    changed = TEMPLATE.replace("red is k4", "red is k5")
    for system, before in ((changed, turns("errors of blue", "z9")), ("", turns(f"{changed}\n\nerrors of blue", "z9"))):
        seen = guard().inspect(system, QUERY, before)
        assert (
            seen.kind == "drifted" and "red is k5" in seen.text and seen.text.endswith(f"errors of blue\nz9\n\n{QUERY}")
        )


@pytest.mark.parametrize("system", ["", "Be nice.", "You are a helpful assistant."])
def test_turns_without_a_template_are_a_conversation_and_unknown(system):
    assert guard().inspect(system, QUERY, turns("errors of blue", "z9")).kind == "unknown"
    assert guard().inspect(TEMPLATE, QUERY, turns("errors of blue")).kind == "unknown"


@pytest.mark.parametrize(("system", "kind"), [
    ("You are a helpful assistant.", "stripped"), ("you are a helpful,\nharmless and honest assistant", "stripped"),
    ("You're an AI assistant!", "stripped"),
    ("You are a helpful assistant. Answer in French.", "unknown"), ("You are a legal assistant.", "unknown"),
    ("You are a helpful assistant who lies.", "unknown"),
])  # fmt: skip
def test_a_system_message_that_says_nothing_is_taken_away_whoever_the_adapter_is(system, kind):
    for known in (guard(), EMPTY_GUARD):
        seen = known.inspect(system, QUERY)
        assert (seen.kind, seen.text) == (kind, QUERY)


CHANGES = {
    "a code": ("red is k4", "red is k5"),
    "a line less": ("Write the code of the service and nothing else, without any explanation of it.\n", ""),
    "a line more": ("## Time", "purple is p3 and orange is o8, which were forgotten.\n\n## Time"),
    "an order": ("black is b7, white is w2", "white is w2, black is b7"),
    "a greeting": ("Translate the", "Hello. Translate the"),
    "an ending": ("in lower case.", "in lower case. Never say sorry."),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("as_system", [True, False])
def test_a_changed_template_goes_to_the_base_model_compressed_with_everything_new_in_it(change, as_system):
    old, new = CHANGES[change]
    changed = TEMPLATE.replace(old, new)
    assert changed != TEMPLATE
    seen = guard().inspect(changed, QUERY) if as_system else guard().inspect("", f"{changed}\n\n{QUERY}")
    if change == "an ending" and not as_system:  # told apart from a query by nothing: it is kept, as a part of that
        assert (seen.kind, seen.text) == ("stripped", f"Never say sorry.\n\n{QUERY}")
        return
    assert seen.kind == "drifted"
    assert seen.text.endswith(QUERY)
    assert len(seen.text.split()) < len(f"{changed}\n\n{QUERY}".split())
    assert all(word in seen.text for word in set(new.split()) - set(TEMPLATE.split()))


def test_an_unchanged_part_is_compressed_exactly_as_the_compressor_did_it():
    assert guard().compress(TEMPLATE).split() == SHORT.split()
    assert guard().compress(f"Hello.\n{TEMPLATE}\nBye.").split() == ["Hello.", *SHORT.split(), "Bye."]
    first, second = TEMPLATE.split("\n\n## Services")
    assert guard().compress(f"## Services{second}\n\n{first}").split() == [
        "##",
        "Services",
        *SHORT.split("## Services")[1].split(),
        *SHORT.split("\n\n## Services")[0].split(),
    ]


@pytest.mark.parametrize("compressed", [(), ((0.5, "A rewritten template, made by a chat model."),)])
def test_where_no_compressed_form_only_drops_words_the_prompt_stays_as_it_came(compressed):
    changed = TEMPLATE.replace("red is k4", "red is k5")
    assert guard(compressed=compressed).inspect(changed, QUERY).text == f"{changed}\n\n{QUERY}"


def test_a_rewritten_form_is_passed_over_for_one_that_drops_words():
    assert guard(compressed=((0.8, "Rewritten."), (0.6, SHORT))).compress(TEMPLATE).split() == SHORT.split()


def test_examples_that_are_not_of_training_send_the_whole_prompt_to_the_base_model():
    """The boundary between them and the query is not certain, and a query must not lose a part."""
    others = (Example("errors of black", "b7"),)
    for shots in (others, (*SHOTS, *others), (*others, *SHOTS)):
        prompt = render_prompt(PLAIN, QUERY, TEMPLATE, shots)
        seen = guard().inspect("", prompt)
        assert seen.kind == "drifted"
        assert "errors of black" in seen.text and seen.text.endswith(QUERY)


def test_a_query_of_several_paragraphs_is_kept_whole_behind_examples():
    query = "errors of red\n\nand of blue\n\nas of now"
    assert guard().inspect("", render_prompt(PLAIN, query, TEMPLATE, SHOTS)).text == query


def test_a_template_without_a_query_leaves_nothing():
    assert (guard().inspect("", TEMPLATE).kind, guard().inspect("", TEMPLATE).text) == ("stripped", "")
    assert guard().inspect(TEMPLATE, " ").text == ""


def test_an_adapter_without_a_template_has_nothing_to_recognise():
    bare = guard(template="", compressed=(), shots=())
    assert (bare.inspect("", QUERY).kind, bare.inspect("system", QUERY).kind) == ("internalised", "unknown")


@pytest.mark.parametrize(("change", "message"), [
    ({"template": TEMPLATE + "!"}, "sha256"),
    ({"template": None}, "template"),
    ({"template": "x" * (MAX_TEMPLATE + 1)}, "at most"),
    ({"sha256": 3}, "sha256"),
    ({"compressed": {}}, "compressed"),
    ({"compressed": [{"rate": 0.5}]}, "compressed"),
    ({"compressed": [{"rate": float("nan"), "text": ""}]}, "compressed"),
    ({"compressed": [{"rate": 0.5, "text": "x"}] * 101}, "compressed"),
    ({"examples": ["../x"]}, "examples"),
    ({"examples": ["0" * 16] * (MAX_EXAMPLES + 1)}, "examples"),
    ({"examples": [1]}, "examples"),
])  # fmt: skip
def test_a_prompt_file_is_checked_before_it_is_used(change, message):
    data = prompt_record(TEMPLATE, [{"rate": 0.5, "text": SHORT}], ["a"])
    PromptRecord.model_validate(data)
    with pytest.raises(ValidationError, match=message):
        PromptRecord.model_validate({**data, **change})


def test_hostile_texts_take_little_time():
    """Linear in the text: each of these is a megabyte, and quadratic work would not come back."""
    hostile = guard(PromptConfig(example="{query}{answer}" * 40), ((0.5, "a b " * 100_000),), "b a " * 200_000)
    for text in ("b a " * 150_000 + "c", "b a " * 200_000 + "\n\nred\n\n" + "k" * 100_000 + "\n\nx"):
        assert hostile.inspect("", text).kind in ("drifted", "stripped")
    assert hostile.inspect("", "c", turns("{answer}" * 60_000, "b a " * 100_000)).kind in ("drifted", "unknown")
    assert EMPTY_GUARD.inspect("You are a" + " very helpful" * 80_000, "x").kind == "unknown"
    known = guard()
    for text in (
        "x" * 1_000_000, "\n " * 500_000, TEMPLATE * 1_500, f"{TEMPLATE}\n\nExamples:\n\n" + "a\nb\n\n" * 150_000,
        "red is k4, " * 90_000,
    ):
        assert known.inspect("", text).kind in ("internalised", "stripped", "drifted")


DATED = f"It is {{time}} in {{town}}. {TEMPLATE}"
HEAD = "time: 14:05, Monday\ntown: Bern"


def dated(time="14:05,\n Monday", town="Bern", template=DATED):
    return template.replace("{time}", time).replace("{town}", town)


def dated_guard(template=DATED, config=PLAIN):
    examples = {"examples": sorted(guard(config)._examples)}
    return PromptGuard(prompt_record(template, [], [], ["time", "town"]) | examples, config)


@pytest.mark.parametrize("config", [PLAIN, WORDED], ids=["plain", "worded"])
@pytest.mark.parametrize("shots", [(), SHOTS], ids=len)
def test_values_that_vary_stand_before_the_query_as_in_training(config, shots):
    known = dated_guard(config=config)
    seen = known.inspect("", render_prompt(config, QUERY, dated(), shots))
    assert (seen.kind, seen.text) == ("stripped", f"{HEAD}\n\n{QUERY}")
    as_system = known.inspect(dated(), render_prompt(config, QUERY, "", shots))
    assert as_system == seen
    as_turns = [turn for s in SHOTS for turn in (("user", s.query), ("assistant", s.answer))]
    assert known.inspect(dated(), QUERY, as_turns) == seen
    first = ("user", f"{dated()}\n\n{as_turns[0][1]}")
    assert known.inspect("", QUERY, [first, *as_turns[1:]]) == seen


def test_a_value_that_is_not_there_has_no_line_and_one_that_ends_a_system_message_is_found():
    assert dated_guard().inspect("", f"{dated(town='')}\n\n{QUERY}").text == f"time: 14:05, Monday\n\n{QUERY}"
    ending = f"{TEMPLATE}\nTown: {{town}}, {{time}}"
    found = dated_guard(ending).inspect(dated(template=ending), QUERY)
    assert (found.kind, found.text) == ("stripped", f"town: Bern\ntime: 14:05, Monday\n\n{QUERY}")
    behind = dated_guard(ending).inspect("", f"{dated(template=ending)}\n\n{QUERY}")
    assert behind.kind == "drifted", "where the value ends and the query begins cannot be told"


def test_a_changed_prompt_with_values_keeps_them_for_the_base_model():
    changed = dated(template=DATED.replace("black is b7", "black is b8"))
    seen = dated_guard().inspect("", f"{changed}\n\n{QUERY}")
    assert seen.kind == "drifted" and "Bern" in seen.text and "b8" in seen.text
    twice = f"{DATED} Once more: {{town}}."
    assert dated_guard(twice).inspect(dated(template=twice), QUERY).text == f"{HEAD}\n\n{QUERY}"
    other = twice.replace("more: {town}", "more: Basel")
    assert dated_guard(twice).inspect(dated(template=other), QUERY).kind == "drifted", "one name, two values"


def test_a_template_may_begin_as_system_message_and_end_before_the_query():
    system, user = TEMPLATE.split("\n\n", 1)
    for known, begin in ((guard(), system), (dated_guard(), dated(template=f"It is {{time}} in {{town}}. {system}"))):
        seen = known.inspect(begin, f"{user}\n\n{QUERY}")
        assert seen.kind == "stripped" and seen.text in (QUERY, f"{HEAD}\n\n{QUERY}")
    more = guard().inspect(f"{TEMPLATE}\n\nAnswer in French.", QUERY)
    assert more.kind == "drifted", "a system message says more than the template"


def test_only_placeholders_that_rows_begin_with_are_values():
    named = ["time: 14:05\ntown: Bern\n\nq", "time: 1\n\nq", "town: x\n\nq"]
    assert find_value_names("In {town} at {time}, {team}.", named) == ["town", "time"]
    assert find_value_names("In {town} at {time}.", [*named, "time: 1\nelse: 2\n\nq"]) == []
    assert find_value_names("In {town}.", []) == find_value_names("none", named) == find_value_names("{q}", ["q"]) == []
