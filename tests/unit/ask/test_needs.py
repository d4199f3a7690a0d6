"""Which units a row needs, and which go together."""

from random import Random

from pi_ray.ask.needs import Partners, needed_units, touched_units
from pi_ray.config import TaskConfig
from pi_ray.protocols import Row
from pi_ray.tasks.opsql.task import OpsqlTask
from pi_ray.units import UnitIndex, find_units


def test_each_row_of_opsql_needs_its_service_most():
    task = OpsqlTask(TaskConfig(name="opsql", rows={"train": 120}))
    index = UnitIndex(find_units(task.template().text))
    rows = list(task.rows("train"))
    codes = {row.answer.split()[1] for row in rows}
    first = [index.units[units[0]] for units in needed_units(rows, touched_units(rows, index), index)]
    assert [unit.text.split(": ")[1] for unit in first] == [row.answer.split()[1] for row in rows] and len(codes) == 30


def test_partners_come_from_sections_that_rows_need_together():
    index = UnitIndex(find_units("## A\n\nant: a1\nbee: b2\n\n## B\n\nred: r1\nblue: c2\n\n## C\n\nmon: m1\ntue: t2\n"))
    rows = [Row("1", "an ant in red", "a1 r1"), Row("2", "a bee in blue", "b2 c2")]
    needed = needed_units(rows, touched_units(rows, index), index)
    assert [sorted(index.units[u].section for u in units) for units in needed] == [["A", "B"], ["A", "B"]]
    partners = Partners(index, needed)
    sections = {index.units[partners.choose(0, Random(seed))].section for seed in range(20)}
    assert sections == {"B"}
    free = Partners(index, [])
    assert {index.units[free.choose(0, Random(seed))].section for seed in range(40)} == {"B", "C"}


def test_a_prompt_of_one_section_still_has_pairs_and_one_unit_has_none():
    alone = UnitIndex(find_units("## A\n\nant: a1\nbee: b2\n"))
    assert Partners(alone, []).choose(0, Random(0)) == 1
    assert Partners(UnitIndex(find_units("Be kind.")), []).choose(0, Random(0)) is None
