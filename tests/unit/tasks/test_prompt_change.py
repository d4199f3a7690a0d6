"""Two prompts are compared unit by unit, and labels of the old one follow the new one or are dropped."""

import pytest

from pi_ray.protocols import Row
from pi_ray.tasks.prompt_change import LabelCorrection, compare_prompts

OLD = """Answer with queue and priority.

## Queues

billing: Q7
logins: Q2
gift cards: Q5
parking: Q1

## Priorities

urgent: someone cannot work
calm: everything else

## Hours

When no hour is named, write 15m. Nobody works on Sunday."""
NEW = OLD.replace("Q7", "Q9").replace("parking: Q1\n", "").replace("logins: Q2\n", "logins: Q2\nreturns: Q4\n")


def corrected(query, answer, new, old=OLD):
    row = LabelCorrection(old, compare_prompts(old, new)).correct(Row("a", query, answer))
    return row and row.answer


def test_units_are_changed_added_and_removed():
    change = compare_prompts(OLD, NEW)
    assert [(a.text, b.text) for a, b in change.changed] == [("billing: Q7", "billing: Q9")]
    assert [u.text for u in change.added] == ["returns: Q4"] and [u.text for u in change.removed] == ["parking: Q1"]
    assert str(change) == "of the prompt's units 1 changed, 1 added, 1 removed"
    assert change.lines[0] == "~ Queues: billing: Q7  ->  billing: Q9"


def test_another_order_is_no_change():
    moved = OLD.replace("billing: Q7\nlogins: Q2", "logins: Q2\nbilling: Q7")
    change = compare_prompts(OLD, moved)
    assert not (change.added or change.removed or change.changed)


def test_a_reworded_rule_is_paired_with_its_old_form():
    change = compare_prompts(OLD, OLD.replace("write 15m", "write 20m"))
    assert [(a.text, b.text) for a, b in change.changed] == [
        ("When no hour is named, write 15m.", "When no hour is named, write 20m."),
    ]


@pytest.mark.parametrize("query, answer, now", [
    ("my billing is wrong", "Q7 urgent", "Q9 urgent"),
    ("my bill is wrong", "Q7 urgent", None),
    ("I cannot log in: logins", "Q2 calm", "Q2 calm"),
    ("where is parking?", "Q1 calm", None),
    ("billing sent me to Q7", "Q7 calm", "Q7 calm"),
])
def test_a_label_follows_the_unit_that_its_query_names(query, answer, now):
    assert corrected(query, answer, NEW) == now


def test_codes_that_change_places_are_told_apart_by_the_query():
    swapped = OLD.replace("Q7", "Q0").replace("Q2", "Q7").replace("Q0", "Q2")
    assert corrected("billing, please", "Q7 calm", swapped) == "Q2 calm"
    assert corrected("logins, please", "Q2 calm", swapped) == "Q7 calm"


CHAIN = OLD.replace("logins: Q2", "logins: Q7").replace("billing: Q7", "billing: Q9")


def test_a_label_that_follows_the_new_prompt_already_stays():
    assert corrected("logins, please", "Q7 calm", CHAIN) == "Q7 calm"
    sales = OLD.replace("billing: Q7", "sales: Q7").replace("gift cards: Q5", "billing: Q5")
    assert corrected("sales, please", "Q7 calm", sales) == "Q7 calm"
    old, new = "## Queues\n\nbilling: alpha\nads: beta", "## Queues\n\nbilling: beta\nads: gamma"
    assert corrected("billing, please", "beta", new, old) == "beta"
    assert corrected("billing, please", "alpha", new, old) == "beta"
    assert corrected("ads, please", "beta", new, old) == "gamma"


def test_a_word_that_is_the_old_one_of_a_unit_and_the_new_one_of_another_is_not_guessed_where_both_are_named():
    assert corrected("billing, please", "Q7 calm", CHAIN) == "Q9 calm"
    assert corrected("both billing and logins", "Q7 and Q2", CHAIN) is None
    both_have_it = OLD.replace("parking: Q1", "parking: Q1 or Q7")
    kept = both_have_it.replace("Q1 or Q7", "Q3 or Q7").replace("billing: Q7", "billing: Q9")
    assert corrected("billing for parking", "Q7 calm", kept, both_have_it) == "Q9 calm", "parking had it and has it"


def test_a_word_without_a_digit_needs_no_name_in_the_query():
    assert corrected("I cannot work", "Q5 urgent", OLD.replace("urgent:", "red:")) == "Q5 red"


def test_a_number_that_may_have_been_computed_is_dropped_and_one_of_the_query_stays():
    new = OLD.replace("15m", "20m")
    assert corrected("a quarter of an hour, logins", "Q2 15m", new) is None
    assert corrected("15m for logins", "Q2 15m", new) == "Q2 15m"


def test_a_unit_with_several_other_words_is_not_guessed():
    assert corrected("gift cards", "Q5 calm", OLD.replace("gift cards: Q5", "gift cards: Q6 then Q8")) is None
