"""A unit of a prompt is known, not known, unsure or not asked, and a sentence says so for all of them."""

import json

import pytest

from pi_ray.errors import CorruptArtifactError
from pi_ray.evaluate.knowledge import KNOWLEDGE_FILE, Knowledge, UnitKnowledge, read_knowledge


def unit(text, asked=0, agreed=0, queries=0, sure=0, kind="item"):
    return UnitKnowledge(
        section="Queues", text=text, kind=kind, rows=3, queries=queries, sure=sure, asked=asked, agreed=agreed
    )


def known(*units):
    return Knowledge(adapter_sha256="a" * 64, units=units)


@pytest.mark.parametrize("asked, agreed, queries, sure, verdict", [
    (4, 3, 9, 9, "known"), (4, 2, 9, 9, "not known"), (1, 1, 0, 0, "known"), (1, 0, 9, 0, "not known"),
    (0, 0, 9, 0, "teacher unsure"), (0, 0, 9, 1, "not asked"), (0, 0, 0, 0, "not asked"),
])
def test_a_unit_is_known_when_most_of_its_questions_are_right(asked, agreed, queries, sure, verdict):
    assert unit("a: b", asked, agreed, queries, sure).verdict == verdict


def test_the_sentence_counts_what_was_asked_and_names_what_to_ask_again():
    found = known(
        unit("chat: a3", 2, 2), unit("ads: s3", 2, 0), unit("feeds: e9", 2, 1), unit("mail: m5", queries=4),
        unit("no one asks: x1"),
    )
    assert found.sentence == (
        "1 of 4 facts are known; ask again for: ads, feeds, mail. 1 was not asked about."
    )
    assert known(unit("chat: a3", 1, 1)).sentence == "1 of 1 facts are known."
    assert "cannot be said" in known(unit("chat: a3")).sentence
    assert known(*(unit(f"n{i}: x", 1, 0) for i in range(15))).sentence.endswith("n11 and 3 more.")


def test_the_worst_come_first_and_what_was_not_asked_last():
    units = [unit("a: 1", 2, 2), unit("b: 1"), unit("c: 1", 2, 1), unit("d: 1", 2, 0), unit("e: 1", queries=1)]
    assert [u.name for u in known(*units).worst_first] == ["d", "c", "e", "a", "b"]


def test_a_unit_is_called_by_its_first_words():
    assert unit("checkout: r9").name == "checkout" and unit("r9 | checkout desk").name == "r9"
    assert unit("Write > for above: or over or more.", kind="rule").name == "Write > for above: or over …"


def test_a_file_that_is_not_as_it_was_written_is_refused(tmp_path):
    assert read_knowledge(tmp_path) is None
    made = known(unit("a: 1", 2, 2))
    (tmp_path / KNOWLEDGE_FILE).write_text(made.model_dump_json())
    assert read_knowledge(tmp_path) == made
    (tmp_path / KNOWLEDGE_FILE).write_text(json.dumps({**made.model_dump(), "units": [{"text": "a"}]}))
    with pytest.raises(CorruptArtifactError, match="evaluate again"):
        read_knowledge(tmp_path)
