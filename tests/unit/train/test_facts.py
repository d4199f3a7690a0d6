"""Facts of a template: which words labels copy from it."""

from pi_ray.config import TaskConfig
from pi_ray.tasks.opsql.generate import generate_rows
from pi_ray.tasks.opsql.language import SERVICES
from pi_ray.tasks.opsql.task import OpsqlTask
from pi_ray.train.facts import find_facts, is_code, shape_of

DESK = """Send each message to its queue. Answer with the queue's code.

## Queues

- card lost: QX-417
- card late: QX-502
- top up: QX-611
- transfer: QX-008

## Hours

We answer within 24h, on Sundays within 48h, and on holidays within 72h.
"""
ROWS = [("my card is gone", "QX-417"), ("where is my card", "QX-502"), ("I want to pay in", "QX-611")]


def test_the_codes_of_the_bundled_task_are_those_of_its_services():
    rows = [(row.query, row.answer) for row in generate_rows()["train"][:240]]
    (group,) = find_facts(OpsqlTask(TaskConfig()).template().text, rows)
    assert set(group.words) == set(SERVICES.values()) and group.section == "## Services" and group.shape == "a0"
    assert len(group.used) == 30


def test_codes_that_labels_copy_are_found_with_those_of_their_list_that_no_label_has():
    (group,) = find_facts(DESK, ROWS)
    assert group.words == ("QX-417", "QX-502", "QX-611", "QX-008") and group.shape == "AA-000"
    assert group.used == ("QX-417", "QX-502", "QX-611")
    assert "4 codes under '## Queues'" in str(group) and "3 of them in labels" in str(group)


def test_codes_that_a_query_brings_need_not_be_read():
    assert find_facts(DESK, [*ROWS, ("is QX-008 closed?", "QX-008")]) == []


def test_codes_that_no_label_has_and_codes_of_one_line_are_no_facts():
    assert find_facts(DESK, [("how long?", "24h"), ("and on Sunday?", "48h")]) == []


def test_prose_and_code_have_no_facts():
    prose = "Write a polite answer.\n\nBe short, and name the product in the first sentence."
    code = "Complete the function.\n\n```python\ndef add(a, b):\n    return a + b\n```"
    for text in (prose, code):
        assert find_facts(text, [("say hello", "Hello."), ("add", "def add(a, b):\n    return a + b")]) == []


def test_a_user_adds_words_and_forbids_words():
    text = "Routes.\n\n## Routes\n\nfern: urgent\nkite: serious\nmoss: minor\n"
    rows = [("it burns", "to fern"), ("look at it", "to kite")]
    assert find_facts(text, rows) == []
    (group,) = find_facts(text, rows, words=("fern", "kite", "moss"))
    assert group.words == ("fern", "kite", "moss")
    assert find_facts(DESK, ROWS, ignore=("QX-008",)) == []


def test_a_code_has_a_digit_and_more_than_a_number_s_look():
    assert [is_code(word) for word in ("r9", "QX-417", "4711", "E_2")] == [True] * 4
    assert [is_code(word) for word in ("fern", "15", "SELECT", "top-up")] == [False] * 4
    assert shape_of("Qx-417") == "Aa-000"
