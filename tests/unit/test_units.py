"""Units of a prompt: what counts as one, and which of them a text is about."""

import math

import pytest

from pi_ray.units import RARE, Unit, UnitIndex, find_units, words_of

PROMPT = """You sort messages. Answer with the code alone! Never guess.

## Queues

- billing: Q7
- logins: Q2
  (also passwords)

## Metrics

| metric | unit |
|---|---|
| lat | milliseconds |
| ram | megabytes |

## Form

Write it as here:

```
from SERVICE | to ROUTE
for WINDOW
```
"""


def test_lists_tables_sentences_and_fenced_blocks_are_units():
    assert find_units(PROMPT) == [
        Unit("", "You sort messages.", "rule"),
        Unit("", "Answer with the code alone!", "rule"),
        Unit("", "Never guess.", "rule"),
        Unit("Queues", "billing: Q7", "item"),
        Unit("Queues", "logins: Q2 (also passwords)", "item"),
        Unit("Metrics", "metric | unit", "item"),
        Unit("Metrics", "lat | milliseconds", "item"),
        Unit("Metrics", "ram | megabytes", "item"),
        Unit("Form", "Write it as here:", "rule"),
        Unit("Form", "from SERVICE | to ROUTE\nfor WINDOW", "example"),
    ]


def test_code_on_one_line_opens_no_block_and_tildes_do():
    found = find_units("Ask with ```SELECT 1``` alone.\n\n```SELECT 2```\n\nBe kind.\n\n~~~\nx = 1\n~~~\n")
    assert [(unit.text, unit.kind) for unit in found][2:] == [("Be kind.", "rule"), ("x = 1", "example")]


def test_pairs_on_one_line_are_items():
    found = find_units("## Queues\n\nbilling: Q7, logins: Q2, delivery: Q5, anything else: Q9\n")
    assert [unit.text for unit in found] == ["billing: Q7", "logins: Q2", "delivery: Q5", "anything else: Q9"]


def test_lines_with_a_colon_are_a_list_without_marks():
    found = find_units("## Routes\n\nfern: critical or urgent\nkite: serious\nmoss: minor, or none\n")
    assert [(unit.text, unit.kind) for unit in found][1] == ("kite: serious", "item")


@pytest.mark.parametrize("text", ["", "\n\n", "## \n", "```\n```"])
def test_a_prompt_that_says_nothing_has_no_units(text):
    assert find_units(text) == []


def test_a_text_is_about_the_units_whose_rare_words_it_has():
    units = find_units(PROMPT)
    index = UnitIndex(units)
    assert units[index.best("I cannot find my login")].text == "logins: Q2 (also passwords)"
    touched = [units[i].text for i in index.touched("billing, when ram is above 3 megabytes")]
    assert touched[0] == "ram | megabytes"
    assert "billing: Q7" in touched
    assert index.best("zebra") is None
    assert index.touched("zebra") == []


def test_characters_of_texts_without_spaces_are_words():
    assert words_of("退款3天，Tokyoで") == ["退", "款", "3", "天", "tokyo", "で"]
    index = UnitIndex(find_units("## 规则\n\n- 退款需要三天\n- 换货找客服\n"))
    assert index.best("怎么退款？") == 0 and index.best("可以换货吗") == 1


@pytest.mark.parametrize("text", ["billing, when ram is above 3 megabytes", "the code of a login", "", "zebra", PROMPT])
def test_the_index_scores_as_its_definition_does(text):
    units = find_units(PROMPT)
    words, asked = [set(words_of(str(unit))) for unit in units], set(words_of(text))
    count = {word: sum(word in some for some in words) for some in words for word in some}
    scores = [sum(math.log(len(units) / count[word]) for word in some & asked) for some in words]
    index = UnitIndex(units)
    assert index.scores(text) == pytest.approx(scores)
    rare = [i for i, some in enumerate(words) if any(count[word] <= RARE for word in some & asked)]
    assert sorted(index.touched(text)) == rare
    found = [round(scores[i], 9) for i in index.touched(text)]
    assert found == sorted(found, reverse=True)
