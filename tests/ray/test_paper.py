"""Tables of the paper and closed models, as a person runs them, on a tiny model."""

import json
import re
import shlex

import pytest
from test_main_job import REPO, SMALL, shell

from pi_ray.run.directory import RunDir
from tests.unit.fake_openai import FakeOpenAI

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def small(tiny_model):
    rows = SMALL.replace("schedule.epochs=1 ", "")  # which columns set themselves, and would hide
    overrides = re.findall(r"\S+?=\{.*?\}|\S+", f"model.base={tiny_model} compress.model={tiny_model} {rows}")
    return " ".join(map(shlex.quote, overrides))


def test_a_table_is_run_printed_and_kept_and_goes_on_where_it_was_stopped(small, tmp_path, joining):
    (tmp_path / "paper").mkdir()
    text = (
        (REPO / "jobs" / "paper" / "distill.yaml")
        .read_text()
        .replace("../../pi_ray/cli/demo.yaml", str(REPO / "pi_ray" / "cli" / "demo.yaml"))
    )
    (tmp_path / "paper" / "distill.yaml").write_text(re.sub(r"epochs: \d", "epochs: 1", text))
    command = f"pi-ray table paper/distill.yaml {small} 'table.seeds=[0]' 'table.only=%s'"
    first = shell(command % "[distill]", tmp_path, **joining)
    assert re.search(r"the teacher answered \d+ of 12 unlabelled queries", first)
    out = shell(command % "[plain, distill]", tmp_path, **joining)
    assert out.count("nothing to do, every phase has its adapter") == 1, "distill was trained before"
    assert "No gap" not in out and "Gap" not in out, "the column of the full prompt, which it needs, was left out"
    assert "Plain fine-tuning" in out and "template" in out, "columns and groups, which may stand on two lines"
    kept = json.loads((tmp_path / "paper" / "results.json").read_text())
    assert {(e["column"], e["metric"]) for e in kept} >= {
        (c, m) for c in ("plain", "distill") for m in ("exact_match", "bleu", "execution")
    }
    assert (tmp_path / "runs" / "demo" / "table-distill.md").read_text().startswith("|  | Exact match (95%) |")


def test_a_closed_model_is_tuned_phase_by_phase_and_compared(small, tmp_path, joining):
    with FakeOpenAI(answer=lambda model, prompt: f"{model} says {len(prompt)}") as service:
        at = f"train.backend.name=openai closed.base_url={service.url} closed.model=base-1 closed.poll_s=0"
        own = f"{at} evaluate.baseline=false train.objective=sft"  # a service learns from labels
        command = f"OPENAI_API_KEY={service.key} pi-ray demo {small} {own}"
        with pytest.raises(AssertionError, match=r"closed\.confirmed=true"):
            shell(command, tmp_path, **joining)
        assert not service.jobs, "nothing is spent unasked"
        out = shell(f"{command} closed.confirmed=true", tmp_path, **joining)
        assert len(service.jobs) == 3 and "phase 2" in out and "Serve it" not in out
        summary = json.loads((tmp_path / "runs" / "demo" / "eval" / "summary.json").read_text())
        assert {"base", "base_full_prompt", "promptintern"} <= summary.keys()
        assert service.key not in "".join(
            p.read_text(errors="replace") for p in (tmp_path / "runs").rglob("*") if p.is_file()
        )
        assert "confirmed: false" in RunDir(tmp_path / "runs" / "demo").config.read_text()
