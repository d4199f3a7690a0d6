"""The report is one file, true to the summary, safe against what models write, and looks right in a browser."""

import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from rich.console import Console

from pi_ray.config import CostConfig
from pi_ray.errors import CorruptArtifactError, DataError
from pi_ray.report import charts, cost
from pi_ray.report import summary as numbers
from pi_ray.report.loss_plot import read_updates
from pi_ray.report.page import write_report
from pi_ray.run.artifact import staged
from pi_ray.schedule import Phase
from tests.unit.fake_run import HOSTILE, SUMMARY, config, summary, write_run

QUERY_ALONE = Phase(0.0, 0, 1)


class Elements(HTMLParser):
    """Every element of a page with its attributes, and its text."""

    def __init__(self, page):
        super().__init__()
        self.found, self.text = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)


def page_of(folder, made=SUMMARY, text="errors by host", **changes):
    return write_report(write_run(folder, made, text), config(folder, **changes)).read_text(encoding="utf-8")


def words(page):
    return " ".join(" ".join(Elements(page).text).split())


def test_the_page_says_the_result_in_plain_words(tmp_path):
    said = words(page_of(tmp_path))
    assert (
        "The adapter answers with the query alone: 31 input tokens instead of 640 (95% fewer). Its exact match is 70%, "
        "against 6%"
        in said
    )
    assert "64.0% to 76.0%" in said and "services only in the template" in said
    assert "pi-ray run run.yaml" in said and "51.3% kept" in said and "torch 2.13.0" in said


def test_the_first_sentence_is_the_verdict_of_a_quality_floor(tmp_path):
    phases = [{"rate": 1.0, "shots": 2}, {"rate": 0.5, "shots": 1}, {"rate": 0.0, "shots": 0}]
    for chosen, sends in enumerate(("the whole prompt", "a shortened prompt", "the query alone")):
        floor = {"sentence": f"The run ends at phase {chosen}.", "chosen": chosen, "phases": phases}
        said = words(page_of(tmp_path / str(chosen), summary(floor=floor)))
        assert f"The run ends at phase {chosen}. The adapter answers with {sends}: " in said


def test_hostile_text_stays_text(tmp_path):
    plain, hostile = page_of(tmp_path / "a", text="x"), page_of(tmp_path / "b", text=HOSTILE)
    assert [t for t, _ in Elements(plain).found] == [t for t, _ in Elements(hostile).found]
    assert "pwned" in words(hostile) and "{{ 7*7 }}" in words(hostile)
    assert "\x00" not in hostile and "\u2400" in hostile


def test_hostile_group_and_label_stay_text_in_pictures(tmp_path):
    made = summary(**{"plain.label": HOSTILE, "groups": {HOSTILE: 60, "b": 60}})
    elements = Elements(page_of(tmp_path, made))
    assert not {"script", "img"} & {t for t, _ in elements.found}


def test_the_page_loads_nothing_and_runs_nothing(tmp_path):
    for tag, attributes in Elements(page_of(tmp_path)).found:
        assert tag not in {"script", "iframe", "object", "embed", "img", "base", "form"}
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "srcset", "action", "data"):
            assert attributes.get(name, "data:,").startswith("data:"), (tag, attributes)
    page = page_of(tmp_path)
    assert "@import" not in page and not re.search(r"url\(", page)
    assert "default-src 'none'" in page


def test_what_is_missing_is_left_out(tmp_path):
    run = write_run(tmp_path, summary(**{"plain": None, "train.plain": None, "groups": {"": 120}}))
    run.train_log.unlink()
    (run.evaluation / "samples.jsonl").unlink()
    shutil.rmtree(run.templates)
    said = words(write_report(run, config(tmp_path)).read_text())
    assert "Plain fine-tuning was not evaluated" in said
    assert "Samples" not in said and "dev loss" not in said and "The template at each rate" not in said


def test_only_as_many_samples_as_asked(tmp_path):
    assert page_of(tmp_path, **{"evaluate.samples": 3}).count('<section class="sample">') == 3


def test_an_update_done_again_after_a_restart_counts_once_and_nan_is_skipped(tmp_path):
    run = write_run(tmp_path)
    with open(run.train_log, "a") as f:
        f.write(
            "\n"
            + json.dumps({"step": 89, "phase": 2, "loss": 0.123})
            + "\n"
            + '{"step": 90, "phase": 2, "loss": NaN}\n'
        )
    updates = read_updates(run.train_log)
    assert len(updates) == 90 and updates[-1]["loss"] == 0.123


def test_no_summary_and_a_damaged_one_are_told_apart(tmp_path):
    run = write_run(tmp_path)
    (run.evaluation / "summary.json").write_text("{")
    with pytest.raises(CorruptArtifactError, match=r"summary\.json"):
        write_report(run, config(tmp_path))
    (run.evaluation / "summary.json").unlink()
    with pytest.raises(DataError, match="pi-ray evaluate"):
        write_report(run, config(tmp_path))


def test_findings_are_honest_about_plain_fine_tuning():
    level = summary(**{"plain.exact_match": 0.68, "plain.intervals.exact_match": [0.6, 0.74]})
    wins = summary(**{"plain.exact_match": 0.9, "plain.intervals.exact_match": [0.85, 0.95]})
    assert "no difference is shown" in next(numbers.findings(level))
    assert "does better: 90% against 70%" in next(numbers.findings(wins))
    assert "PromptIntern 43%, plain fine-tuning 2%" in list(numbers.findings(summary()))[1]


def test_a_difference_that_the_paired_test_sees_is_no_level_though_the_intervals_overlap():
    close = {"base_full_prompt.exact_match": 0.76, "base_full_prompt.intervals.exact_match": [0.7, 0.82]}
    lost = summary(**close) | {"paired": {"base_full_prompt": {"exact_match": [-0.06, -0.095, -0.03, 0.0005]}}}
    assert "level with 76%" in numbers.headline(summary(**close), QUERY_ALONE)
    assert "70%, below 76%" in numbers.headline(lost, QUERY_ALONE)
    assert "measurably worse" in cost.verdict(lost, CostConfig())
    assert "measurably worse" not in cost.verdict(summary(**close), CostConfig())
    plain = summary(**{"plain.exact_match": 0.68, "plain.intervals.exact_match": [0.6, 0.74]})
    won = plain | {"paired": {"plain": {"exact_match": [0.02, 0.01, 0.03, 0.01]}}}
    assert "PromptIntern's 70% is better. Row by row: +2.0 points" in next(numbers.findings(won))
    even = plain | {"paired": {"plain": {"exact_match": [0.02, -0.01, 0.05, 0.2]}}}
    assert "no difference is shown. Row by row" in next(numbers.findings(even))


def test_a_run_that_was_trained_again_says_that_its_scores_are_older(tmp_path):
    run = write_run(tmp_path)
    with staged(run.adapter(2)):
        pass
    run.best_file.write_text(json.dumps({"adapter": run.adapter(2).name}))
    summary_file = run.evaluation / "summary.json"
    summary_file.write_text(json.dumps(json.loads(summary_file.read_text()) | {"adapter_sha256": "0" * 64}))
    assert "those of an earlier adapter" in write_report(run, config(tmp_path)).read_text()


def test_headline_says_when_quality_is_lower_or_the_prompt_is_only_shortened():
    worse = summary(**{"base_full_prompt.exact_match": 0.95, "base_full_prompt.intervals.exact_match": [0.9, 0.99]})
    assert "70%, below 95%" in numbers.headline(worse, QUERY_ALONE)
    assert "a shortened prompt" in numbers.headline(summary(), Phase(0.3, 0, 1))


def test_answers_that_never_ended_are_counted_where_there_are_some():
    cells = lambda found: {line.name: line.cells for line in numbers.table_lines(found)}  # noqa: E731
    assert "Answers cut off" not in cells(summary())
    assert cells(summary(**{"promptintern.cut_off": 0.05}))["Answers cut off"][-1] == ("5.0%", "at 40 tokens")


def test_percents_never_round_to_all_or_nothing():
    assert [numbers.format_percent(x) for x in (0, 0.004, 0.5, 0.996, 1)] == ["0%", "0.4%", "50%", "99.6%", "100%"]


def test_the_metric_of_headlines_is_one_that_tells_columns_apart():
    low = {f"{c}.exact_match": 0.01 for c in ("base", "base_full_prompt", "plain", "promptintern")}
    assert numbers.main_metric(summary()) == "exact_match"
    assert numbers.main_metric(summary(**low)) == "execution"


def test_the_terminal_table_shows_every_column_and_reads_no_markup():
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(numbers.summary_table(summary(**{"plain.label": "[red]Plain[/red]"})))
    text = console.export_text()
    for part in (
        "Base, full prompt", "[red]Plain[/red]", "PromptIntern", "70.0%", "64.0% to 76.0%",
        "services only in the template (60)",
    ):
        assert part in text


def test_a_long_log_is_averaged_down():
    updates = [{"step": i, "phase": 0, "loss": 1.0} for i in range(5000)]
    span = charts.PhaseSpan(0, Phase(1.0, 0, 1), 1.0, 0, 4999, 0.5)
    assert len(charts.training_chart(updates, [], [span])) < 40_000


def test_a_browser_shows_the_page_without_errors(tmp_path):
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.fail("no Chromium found: install chromium (or google-chrome) to check that the report renders")
    run = write_run(tmp_path / "run", text=HOSTILE)
    write_report(run, config(run.root))
    shot = tmp_path / "report.png"
    quiet = [
        "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync",
    ]
    command = [
        chromium, *quiet, f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
        "--window-size=1280,1600",
    ]
    drawn = subprocess.run(
        [*command, f"--screenshot={shot}", run.report.as_uri()], capture_output=True, text=True, timeout=120
    )
    dumped = subprocess.run([*command, "--dump-dom", run.report.as_uri()], capture_output=True, text=True, timeout=120)
    assert drawn.returncode == dumped.returncode == 0, drawn.stderr + dumped.stderr
    assert not [line for line in (drawn.stderr + dumped.stderr).splitlines() if "CONSOLE" in line]
    assert '<table id="main-table">' in dumped.stdout and "64.0% to 76.0%" in dumped.stdout
    assert shot.stat().st_size > 20_000


def test_a_teacher_is_named_with_what_it_answered(tmp_path):
    facts = {
        "updates": 90, "seconds": 2710.0, "tokens": 351_220, "workers": 2, "queries": 480, "answered": 479, "kept": 432,
    }
    said = words(page_of(tmp_path, summary(**{"train.promptintern": facts})))
    assert "answered 479 of 480 unlabelled queries; the adapter also learned from the 432 answers" in said

    assert "generated from the template" not in said

    asked = facts | {"generated": 300, "writer": "adapter"}
    said = words(page_of(tmp_path, summary(**{"train.promptintern": asked})))
    assert "300 of these queries were generated from the template: an adapter of the base model" in said

    drilled = facts | {"views": 2, "facts": ["40 codes under '## Services' (r9, ...), 30 of them in labels"]}
    said = words(page_of(tmp_path, summary(**{"train.promptintern": drilled})))
    assert "from the 432 answers that it gave in each of 2 orders of the prompt" in said
    assert "Reading drills in the first phase exchanged 40 codes under" in said
    assert "How it learned" not in said and "The student wrote" not in said
    options = {"options": ["labelled rows have at least 50% of each batch", "the teacher sees"]}
    own = {"student_answers": 300, "student_tokens": 2000, "student_replaced": 60}
    said = words(page_of(tmp_path, summary(**{"train.promptintern": facts | options | own})))
    assert "How it learned from the teacher: labelled rows have at least 50% of each batch; the teacher sees." in said
    assert "The student wrote 300 answers itself in the last updates; the teacher replaced 3% of their tokens." in said


def by_metric(*names, **changes):
    """A summary whose columns have these metrics, the first as exact match was."""
    made = summary(metrics=list(names), **changes)
    for column in (made[name] for name in ("base", "base_full_prompt", "plain", "promptintern")):
        for block in (column, *column["groups"].values()):
            value, interval = block.pop("exact_match"), block["intervals"]["exact_match"]
            block.pop("bleu"), block.pop("execution")
            block["intervals"] = dict.fromkeys(names, interval)
            block.update(dict.fromkeys(names, value))
    return made


def test_with_task_metric_its_first_number_decides_and_no_other_is_shown(tmp_path):
    made = by_metric("tool_call", "rouge_l", **{"promptintern.judge": 0.5})
    assert numbers.main_metric(made) == "tool_call" and numbers.metrics_of(made) == ["tool_call", "rouge_l"]
    said = words(page_of(tmp_path, made))
    assert "Its tool-call match is 70%, against 6%" in said and "ROUGE-L" in said
    assert "Exact match" not in said and "BLEU" not in said


def test_a_first_metric_near_zero_still_decides(tmp_path):
    low = {f"{c}.exact_match": 0.01 for c in ("base", "base_full_prompt", "plain", "promptintern")}
    assert numbers.main_metric(by_metric("f1", "number", **low)) == "f1"
    assert "Its F1 is 1%" in words(page_of(tmp_path, by_metric("f1", "number", **low)))


def test_the_page_says_how_steady_a_judge_is(tmp_path):
    facts = {"judge_agreement": 0.87, "judge_second_pass": 100, "judge_unread": 3}
    said = words(page_of(tmp_path, by_metric("judge", **{f"promptintern.{k}": v for k, v in facts.items()})))
    assert "asked again about 100 of the adapter's answers" in said and "to 87%. 3 of its replies had no grade" in said
