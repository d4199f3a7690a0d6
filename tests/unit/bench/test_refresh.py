"""The benchmark of a changed prompt: its task, the codes it changes, and how it scores."""

import json

from pi_ray.tasks.opsql.language import SERVICES
from tests.bench.refresh import changed_codes, code_of, scores, write_task


def test_two_known_codes_and_a_hidden_one_become_fresh_ones():
    known = sorted(SERVICES.values())[:30]
    codes = changed_codes(0, known)
    assert [old in known for old in codes] == [True, True, False]
    assert len(set(codes.values())) == 3 and not set(codes.values()) & set(SERVICES.values())
    assert changed_codes(0, known) == codes != changed_codes(1, known)


def test_the_task_tests_the_changed_codes_with_more_rows_and_asks_the_demos_queries(tmp_path):
    codes = write_task(tmp_path, 0)
    rows = {n: (tmp_path / f"{n}.jsonl").read_text().splitlines() for n in ("train", "dev", "test", "queries")}
    assert [len(rows[n]) for n in ("train", "dev", "queries")] == [240, 60, 480]
    tested = [code_of(json.loads(line)["answer"]) for line in rows["test"]]
    assert all(tested.count(code) > 2 for code in codes) and len(tested) > 150
    assert all(f": {code}\n" in (tmp_path / "template.md").read_text() + "\n" for code in codes)


def test_rows_about_changed_services_are_scored_apart(tmp_path):
    lines = [("from a1 | x", "from a1 | x", 1.0), ("from a1 | x", "from a1 | y", 0.0), ("from b2 | x", "?", 0.0)]
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "outputs.jsonl").write_text("".join(
        json.dumps({
            "answer": answer, "outputs": {"promptintern": given}, "scores": {"promptintern": {"exact_match": right}},
        }) + "\n"
        for answer, given, right in lines
    ))
    assert scores(tmp_path, {"z9": "a1"}) == {"codes": 1.0, "changed": 0.5, "others": 0.0, "changed_rows": 2}
