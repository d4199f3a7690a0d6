"""What an adapter knows, on the page and on the terminal: worst first, with examples, and as plain text."""

import io

from rich.console import Console

from pi_ray.evaluate.knowledge import KNOWLEDGE_FILE, AnsweredQuestion, Knowledge, UnitKnowledge
from pi_ray.report.knowledge import MOST_LINES, print_knowledge
from pi_ray.report.page import write_report
from pi_ray.run.artifact import write_atomic
from tests.unit.fake_run import HOSTILE, config, write_run
from tests.unit.report.test_report import Elements, words


def knowledge(text="a case", units=3):
    def unit(i):
        right = AnsweredQuestion(query=text, expected="r9", source="teacher", answer="r9", right=True)
        wrong = AnsweredQuestion(query=text, expected=text, source="label", answer=f"wrong {text}", right=False)
        return UnitKnowledge(
            section=text, text=f"desk {i}: {text}", kind="item", rows=1200, queries=12, sure=11, asked=2,
            agreed=0 if i == 1 else 2, examples=(wrong, wrong) if i == 1 else (right, right),
        )

    return Knowledge(adapter_sha256="a" * 64, units=tuple(map(unit, range(units))))


def page(folder, made):
    run = write_run(folder)
    if made:
        write_atomic(run.evaluation / KNOWLEDGE_FILE, made.model_dump_json())
    return write_report(run, config(folder)).read_text(encoding="utf-8")


def test_the_page_says_what_is_known_and_shows_the_worst_first(tmp_path):
    said = words(page(tmp_path, knowledge()))
    assert "2 of 3 facts are known; ask again for: desk 1." in said
    assert "1,200 12 11 of 12 0 of 2" in said
    assert said.index("✗ not known desk 1") < said.index("✓ known desk 0")
    assert "Label a case Adapter · ✗ differs wrong a case" in said


def test_many_units_are_folded(tmp_path):
    made = page(tmp_path, knowledge(units=MOST_LINES + 7))
    assert "7 more units" in words(made) and made.count('<table class="units">') == 2


def test_without_an_evaluation_that_asked_there_is_no_section(tmp_path):
    assert "What the adapter knows" not in page(tmp_path, None)


def test_hostile_units_and_answers_stay_text(tmp_path):
    hostile = HOSTILE.replace("\ud800", "")
    plain, made = page(tmp_path / "a", knowledge("x")), page(tmp_path / "b", knowledge(hostile))
    assert [t for t, _ in Elements(plain).found] == [t for t, _ in Elements(made).found]
    assert "pwned" in words(made)


def printed(made, **options):
    console = Console(width=160, file=io.StringIO())
    print_knowledge(made, console, **options)
    return console.file.getvalue()


def test_the_terminal_names_the_unknown_units_with_an_example_each(tmp_path):
    out = printed(knowledge("[b]a case[/b]"))
    assert out.startswith("2 of 3 facts are known; ask again for: desk 1.\n")
    assert "✗ not known" in out and "[b]a case[/b]: desk 1" in out and "✓" not in out
    assert "the label says: [b]a case[/b]" in out and "the adapter says: wrong [b]a case[/b]" in out
    assert "✓ known" in printed(knowledge(), everything=True)


def test_no_text_can_move_the_terminals_cursor():
    assert "\x1b" not in printed(knowledge("\x1b[2Jgone\x9b"), everything=True)
