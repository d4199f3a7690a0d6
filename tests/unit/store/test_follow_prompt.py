"""A refresh after an edit of the template is planned from the published run's directory, or says why it is not."""

import json
import shutil
from pathlib import Path

import pytest

from pi_ray.cluster.jobs import entrypoint
from pi_ray.config import AskConfig, RunConfig, dump_config
from pi_ray.protocols import UNLABELLED, Row
from pi_ray.run.artifact import digest, staged, verify_artifact, write_atomic
from pi_ray.run.directory import RunDir
from pi_ray.run.row_store import write_rows
from pi_ray.schedule import plan_phases
from pi_ray.store import refresh
from pi_ray.store.follow_prompt import follow_prompt
from pi_ray.store.prompt_guard import prompt_record
from pi_ray.tasks.changed_prompt import open_task
from tests.lora import card, rewrite, write_adapter

CODES = {"billing": "q7", "logins": "q2", "returns": "q5"}


def text(**codes):
    return "Answer with a code.\n\n## Queues\n\n" + "\n".join(f"{n}: {c}" for n, c in {**CODES, **codes}.items())


@pytest.fixture
def config(tmp_path, tiny_model):
    """A run that was trained with a teacher and published, before an edit of its template."""
    (tmp_path / "template.md").write_text(text())
    for split in ("train", "dev", "test"):
        rows = [{"query": f"{split} {i}: {name}", "answer": code} for i, (name, code) in enumerate(CODES.items())]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps({"query": f"please, {n}"}) + "\n" for n in CODES))
    files = {key: str(tmp_path / f"{key}.jsonl") for key in ("train", "dev", "test", "queries")}
    config = RunConfig(
        name="shop", run_dir=str(tmp_path / "runs" / "shop"), store=str(tmp_path / "store"),
        model={"base": str(tiny_model)}, task={**files, "template": str(tmp_path / "template.md")},
        train={"objective": "distill", "batch_size": 2, "workers": 1},
    )
    run, facts = RunDir(config.root), {"full_template_sha256": digest(text()), "rate": 0.0, "shots": 0}
    for phase in (0, 2):
        with staged(run.adapter(phase), fingerprint="f") as tmp:
            write_adapter(tmp, tiny_model, phase, facts=card(tiny_model, **facts))
    run.choose_best(2)
    write_atomic(run.templates / "templates.json", json.dumps([{"rate": 1.0, "text": text()}]))
    with staged(tmp_path / "store" / "shop" / "v0001", fingerprint="1") as tmp:
        write_adapter(tmp, tiny_model, 2, facts=card(tiny_model, **facts))
    write_atomic(tmp_path / "store" / "shop" / "latest.json", json.dumps({"version": "v0001"}))
    return config


def follow(config):
    """(the refresh as planned, the refresh as it would be without the change, what was said)"""
    said: list[str] = []
    begun = refresh.refresh_config(config)
    refresh.copy_start_adapter(begun)
    return follow_prompt(begun, config.root, said.append), begun, said


def edit(config, **codes):
    write_atomic(config.root.parents[1] / "template.md", text(**codes))


def test_an_unchanged_template_changes_nothing(config):
    planned, begun, said = follow(config)
    assert planned == begun and not said


def test_the_published_teacher_reads_the_new_template_in_few_updates(config):
    edit(config, billing="q8")
    planned, begun, said = follow(config)
    assert planned.root == begun.root != config.root
    assert [(p.rate, p.steps) for p in plan_phases(planned.schedule)] == [(1.0, 1), (0.0, 9)], "3 passes over 6 in 2s"
    files = [verify_artifact(f)["files"] for f in (planned.root / "teacher", RunDir(config.root).adapter(0))]
    assert planned.train.distill.teacher_adapter == str(planned.root / "teacher") and files[0] == files[1]
    assert planned.train.init_adapter == begun.train.init_adapter and not planned.evaluate.baseline
    assert "  ~ Queues: billing: q7  ->  billing: q8" in said
    labels, rows = said[-1].split("; ")
    assert labels == "3 labels follow the new prompt now, 0 rows are dropped"
    assert rows == "2 rows and queries about the change, 4 replayed."
    assert {row.query: row.answer for row in open_task(planned.task).rows("test")}["test 0: billing"] == "q8"


def test_a_refresh_that_was_cut_short_is_planned_as_before_without_the_first_run(config):
    edit(config, billing="q8")
    planned, _, _ = follow(config)
    RunDir(config.root).best_file.unlink()
    assert follow(config)[0] == planned


def test_new_units_without_a_query_are_named(config):
    edit(config, snacks="q9")
    assert follow(config)[2][-1] == (
        "No row and no query is about: Queues: snacks: q9. Add some to task.queries, or they are not learned."
    )


def test_without_the_published_run_or_a_teacher_all_phases_are_trained(config):
    edit(config, billing="q8")
    planned, begun, said = follow(config.replace(**{"train.objective": "sft"}))
    assert planned == begun and "no adapter of this run teaches" in said[1]
    RunDir(config.root).best_file.unlink()
    planned, begun, said = follow(config)
    assert planned == begun and "nor beside it" in said[1]


def publish_prompt(config):
    """Publish the old prompt beside the adapter."""
    rewrite(Path(config.store) / "shop" / "v0001", "prompt.json", prompt_record(text(), [], []))


def test_a_refresh_that_trains_all_phases_says_which_labels_may_follow_the_old_prompt(config):
    edit(config, billing="q8")
    sft = config.replace(**{"train.objective": "sft"})
    assert "correct those that follow the old one" in follow(sft)[2][-1]
    publish_prompt(config)
    shutil.rmtree(follow(sft)[1].root)
    stale = "3 labels may follow the old prompt, such as those of train-1, dev-1, test-1. They are learned as they"
    assert follow(sft)[2][-1].startswith(stale)
    RunDir(config.root).best_file.unlink()
    assert follow(config)[2][-1].startswith(stale)
    for split in ("train", "dev", "test"):
        file = Path(getattr(config.task, split))
        file.write_text(file.read_text().replace("q7", "q8"))
    assert "All phases are trained" in follow(config)[2][-1], "nothing more where every label follows the new prompt"


def test_a_refresh_as_a_job_of_a_cluster_says_it_too(config, monkeypatch, capsys):
    publish_prompt(config)
    edit(config, billing="q8")
    write_atomic(config.root / "run.yaml", dump_config(config))
    ran: list[str] = []
    monkeypatch.setattr(entrypoint.sys, "argv", ["pi-ray"])
    assert entrypoint.run_job(lambda command: ran.extend(command) or 1, "refresh", [str(config.root)]) == 1
    assert "3 labels may follow the old prompt" in capsys.readouterr().out and ran[0] == "run"


def queries_of(planned):
    return {row.query for row in open_task(planned.task).rows(UNLABELLED)}


@pytest.fixture
def generates(config, monkeypatch):
    """The run as one whose queries were all generated; another file has the default name in the working directory."""
    monkeypatch.chdir(config.root.parents[1])
    edit(config, billing="q8")
    RunDir(config.root).rows.mkdir()
    write_rows(RunDir(config.root).rows_of(UNLABELLED).path, [Row("g-1", "a question about billing", "")])
    return config.replace(ask={"updates": 9}, **{"task.queries": "", "task.generate": True})


def test_generated_queries_of_the_published_run_are_kept_and_no_other_file_is_read(generates):
    planned, _, _ = follow(generates)
    assert not planned.task.generate and planned.ask == AskConfig()
    assert queries_of(planned) == {"a question about billing"}


def test_a_refresh_of_a_refresh_has_all_generated_queries_and_not_its_selection(generates):
    planned, begun, _ = follow(generates)
    run = RunDir(planned.root)
    shutil.copytree(RunDir(generates.root).adapter(0), run.adapter(0))
    shutil.copytree(planned.train.init_adapter, run.adapter(1))
    run.choose_best(1)
    write_atomic(run.templates / "templates.json", json.dumps([{"rate": 1.0, "text": text(billing="q8")}]))
    run.rows.mkdir()
    write_rows(run.rows_of(UNLABELLED).path, [Row("g-9", "one that was selected", "")])
    card_file = run.adapter(1) / "pi_ray.json"
    rewrite(run.adapter(1), "pi_ray.json", json.loads(card_file.read_text()) | {
        "full_template_sha256": digest(text(billing="q8")), "phase": 1,
    })
    shutil.copytree(run.adapter(1), generates.root.parents[1] / "store" / "shop" / "v0002")
    write_atomic(generates.root.parents[1] / "store" / "shop" / "latest.json", json.dumps({"version": "v0002"}))
    RunDir(generates.root).best_file.unlink()
    refresh.write_mark(begun, published=True)
    edit(generates, billing="q9")
    later, _, said = follow(generates)
    assert "  ~ Queues: billing: q8  ->  billing: q9" in said
    assert later.root != planned.root and queries_of(later) == {"a question about billing"}


def test_a_published_prompt_that_ends_with_examples_is_not_cut(config):
    edit(config, billing="q8")
    begun = refresh.refresh_config(config)
    refresh.copy_start_adapter(begun)
    facts = json.loads((Path(begun.train.init_adapter) / "pi_ray.json").read_text())
    rewrite(Path(begun.train.init_adapter), "pi_ray.json", facts | {"fixed_examples": 2})
    said: list[str] = []
    assert follow_prompt(begun, config.root, said.append) == begun
    assert "All phases are trained: the published prompt ends with 2 examples" in said[1]
