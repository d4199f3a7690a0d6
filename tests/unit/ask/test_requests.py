"""What a writer is asked for, round by round, and how its replies are read."""

from pi_ray.ask.coverage import Cell, Coverage
from pi_ray.ask.needs import Partners
from pi_ray.ask.requests import RequestPlanner, parse_reply
from pi_ray.protocols import Row
from pi_ray.units import UnitIndex, find_units

UNITS = find_units("Answer with a code. Never guess.\n\n## Colours\n\nred: k4\nblue: z9\ngreen: q1\n")
ROWS = [Row(str(i), f"what is {c}?", a) for i, (c, a) in enumerate([("red", "k4"), ("blue", "z9")])]


def planner(kinds=("direct", "two"), queries=20, one_each=True, seed=0):
    coverage = Coverage(UNITS, kinds, queries)
    return RequestPlanner(coverage, Partners(UnitIndex(UNITS), []), ROWS, seed, one_each)


def test_twice_what_is_missing_is_asked_for_in_every_cell_and_only_that_again():
    made = planner()
    first = made.plan(0)
    assert made.coverage.target == 2
    assert {r.cell for r in first} == set(made.coverage.cells) and len(first) == 4 * len(made.coverage.cells)
    for request in first:
        if request.cell != Cell(2, "direct"):
            made.coverage.add(request.units, request.kind)
    assert [(r.cell, r.units) for r in made.plan(1)] == [(Cell(2, "direct"), (2,))] * 4


def test_a_cell_that_stays_empty_is_given_up():
    made = planner(kinds=("direct",))
    assert [len(made.plan(number)) for number in range(3)] == [len(UNITS) * 2 * made.coverage.target] * 2 + [0]


def test_requests_depend_on_the_seed_and_the_round_alone():
    assert planner().plan(0) == planner().plan(0)
    assert {r.seed for r in planner().plan(0)}.isdisjoint(r.seed for r in planner(seed=1).plan(0))
    assert len({r.seed for r in planner().plan(0)}) == len(planner().plan(0))


def test_rules_alone_have_an_edge():
    made = planner(kinds=("direct", "reworded", "two", "edge"))
    facts = made.coverage.facts()
    edges = [row[facts["kinds"].index("edge")] for row in facts["matrix"]]
    assert edges == [0, 0, None, None, None]


def test_a_prompted_writer_sees_the_unit_the_kind_and_labelled_queries():
    request = next(r for r in planner(kinds=("two",), one_each=False).plan(0) if r.units[0] == 2)
    assert request.count == 2 * 4
    for words in ("Write 8 different messages", "both of these parts", "Colours: red: k4", "what is blue?"):
        assert words in request.prompt


def test_replies_are_read_line_by_line_without_marks():
    text = '1. What is red?\n- "Which one is 2. red?"\n\n  3 reds, please\n* Tell me'
    assert list(parse_reply(text, 4)) == ["What is red?", "Which one is 2. red?", "3 reds, please", "Tell me"]
    assert list(parse_reply(" one\nquery ", 1)) == ["one\nquery"]
