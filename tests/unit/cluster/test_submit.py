"""What travels with a job, who is let in, and how a run keeps its place on the cluster's storage. No cluster is
needed.
"""

import asyncio
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from pi_ray import cli
from pi_ray.cli import job
from pi_ray.cli.init import write_task
from pi_ray.cluster import auth
from pi_ray.cluster.jobs import bundle, entrypoint, submit
from pi_ray.config import RunConfig, run_file
from pi_ray.errors import ClusterError, ConfigError
from pi_ray.progress import LogProgress, progress_line
from pi_ray.run.artifact import staged
from pi_ray.serve.http.keys import new_key
from pi_ray.store import refresh
from tests.conftest import unset
from tests.lora import put_in_store


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path):
    """No token, no address and no storage of this machine's user."""
    unset(
        monkeypatch, "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS",
        "PI_RAY_STORAGE",
    )
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def task(tmp_path):
    write_task(tmp_path / "task")
    return tmp_path / "task"


def unresolved(task, *overrides) -> RunConfig:
    return run_file.validate_yaml(RunConfig, (task / "run.yaml").read_text(), "run.yaml", overrides)


# The parcel


def test_a_parcel_holds_the_run_file_and_what_it_names_and_nothing_else(task, tmp_path):
    for name in ("runs/my-task/big", "store/x", ".git/config", ".venv/lib", "notes.txt"):
        (task / name).parent.mkdir(parents=True, exist_ok=True)
        (task / name).write_text("at home")
    bundle.write_bundle(unresolved(task), task, tmp_path / "out")
    assert sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()) == [
        "inputs/dev.jsonl", "inputs/template.md", "inputs/test.jsonl", "inputs/train.jsonl", "run.yaml",
    ]  # fmt: skip
    sent = run_file.load_run_file(tmp_path / "out" / "run.yaml")
    assert sent.task.train == str(tmp_path / "out" / "inputs" / "train.jsonl")
    assert not os.path.exists(sent.task.queries), "an optional file that was missing is missing there too"


def test_files_above_the_run_file_and_equal_names_travel_under_their_keys(task, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text("1")
    (task / "rows.jsonl").write_text("2")
    settings = unresolved(task, "task.train=../data/rows.jsonl", "task.dev=rows.jsonl")
    bundle.write_bundle(settings, task, tmp_path / "out")
    assert (tmp_path / "out" / "inputs" / "train.jsonl").read_text() == "1"
    assert (tmp_path / "out" / "inputs" / "dev.jsonl").read_text() == "2"


def test_absolute_paths_are_the_clusters_own_and_stay(task, tmp_path):
    settings = unresolved(task, "task.train=/shared/train.jsonl", "task.folder=data")
    (task / "data" / "in").mkdir(parents=True)
    (task / "data" / "in" / "a.json").write_text("{}")
    (task / "data" / ".gitignore").write_text("*")
    sent, found = bundle.gather_inputs(settings, task)
    assert sent.task.train == "/shared/train.jsonl"
    assert "folder/in/a.json" in found and "folder/.gitignore" not in found


def test_a_metrics_files_travel_too(task, tmp_path):
    (task / "score.py").write_text("def score(row, output):\n    return {'right': 1}\n")
    settings = unresolved(task, "task.metric=[f1,{name: python, file: score.py}]")
    bundle.write_bundle(settings, task, tmp_path / "out")
    sent = run_file.load_run_file(tmp_path / "out" / "run.yaml")
    assert sent.task.metric[1].file == str(tmp_path / "out" / "inputs" / "metric.1.file.py")
    assert Path(sent.task.metric[1].file).read_text() == (task / "score.py").read_text()


def test_equal_runs_have_equal_hashes_and_a_changed_row_another(task, tmp_path):
    first, again = (bundle.write_bundle(unresolved(task), task, tmp_path / name) for name in "ab")
    with open(task / "train.jsonl", "a") as rows:
        rows.write('{"query": "q", "answer": "a"}\n')
    assert first == again != bundle.write_bundle(unresolved(task), task, tmp_path / "c")
    assert first != bundle.write_bundle(unresolved(task, "train.lr=0.1"), task, tmp_path / "d")


@pytest.mark.parametrize("link, key", [
    ("train.jsonl", "train"), ("data/inner/rows.json", "folder"), ("deep/train.jsonl", "deep"), ("data", "folder"),
])  # fmt: skip
def test_a_symbolic_link_out_of_the_task_folder_is_refused(task, tmp_path, link, key):
    (tmp_path / "home").mkdir()
    secret = tmp_path / "home" / "id_rsa"
    secret.write_text("private")
    target = tmp_path / "home" if link == "data" or key == "deep" else secret
    place = task / "deep" if key == "deep" else task / link
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    place.symlink_to(target)
    settings = unresolved(task, *(["task.train=deep/id_rsa"] if key == "deep" else []), "task.folder=data")
    with pytest.raises(ConfigError, match="leads out of"):
        bundle.gather_inputs(settings, task)


def test_a_linked_folder_is_refused_and_not_left_out(tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "part.txt").write_text("part")
    (tmp_path / ".hidden").symlink_to("shared")
    assert list(bundle.files_of("folder", tmp_path)) == ["folder/shared/part.txt"]
    (tmp_path / "again").symlink_to("shared")
    with pytest.raises(ConfigError, match="again: a job takes no linked folder along; put the folder itself there"):
        bundle.files_of("folder", tmp_path)


def test_a_symbolic_link_inside_the_task_folder_travels_as_the_file_that_it_leads_to(task):
    (task / "rows").mkdir()
    shutil.move(task / "train.jsonl", task / "rows" / "all.jsonl")
    (task / "train.jsonl").symlink_to("rows/all.jsonl")
    found = bundle.gather_inputs(unresolved(task), task)[1]
    assert found["train.jsonl"].read_text() == (task / "rows" / "all.jsonl").read_text()


def test_a_parcel_that_is_too_large_names_the_largest_file_and_the_cure(task, monkeypatch):
    monkeypatch.setattr(bundle, "LIMIT", 1 << 10)
    (task / "test.jsonl").write_bytes(bytes(1 << 12))
    with pytest.raises(ConfigError, match=r"most of it .*test\.jsonl.*absolute path"):
        bundle.gather_inputs(unresolved(task), task)


@pytest.mark.parametrize(
    "override",
    [
        "api_key=abc", "serve.api_key=abc", "hub.token=x", "model.base=hf_abcdefghijklmnopqrst",
        "closed.suffix=sk-abcdefghijklmnopqrstu", pytest.param(f"closed.suffix={new_key()}", id="a key of pi-ray"),
    ],
)
def test_overrides_that_look_like_secrets_are_refused_without_being_shown(override):
    key, _, value = override.partition("=")
    with pytest.raises(ConfigError) as refused:
        bundle.refuse_secrets([override])
    assert f"'{key}' looks like a secret" in str(refused.value) and value not in str(refused.value).replace(key, "")


def test_the_value_of_a_secret_variable_is_refused_wherever_it_stands(task, monkeypatch):
    monkeypatch.setenv("PI_RAY_API_KEY", "plain-looking")
    with pytest.raises(ConfigError, match=r"'prompt\.query' looks like a secret"):
        bundle.refuse_secrets([], unresolved(task, "prompt.query='plain-looking {query}'"))
    with pytest.raises(ConfigError, match=r"'train\.lr' looks like a secret"):
        bundle.refuse_secrets(["train.lr=plain-looking"])
    allowed = ["serve.api_key_env=MY_KEY", "cluster.kubernetes.secret=named"]
    bundle.refuse_secrets(allowed, unresolved(task, *allowed))


def test_a_base_model_that_lies_here_is_not_sent(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    with pytest.raises(ConfigError, match=r"model\.base: weights lies on this machine"):
        bundle.refuse_local_models(unresolved(task, "model.base=weights"))
    bundle.refuse_local_models(unresolved(task, f"model.base={tmp_path / 'weights'}"))


# Who is let in


@pytest.mark.fault
def test_submit_refuses_a_cluster_off_this_machine_when_authentication_is_off(task, monkeypatch, capsys):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x" * 32)
    assert cli.main(["submit", str(task / "run.yaml"), "--address", "http://10.1.2.3:8265"]) == ClusterError.exit_code
    said = capsys.readouterr().err
    assert "not on this machine" in said and "RAY_AUTH_MODE=token" in said and "x" * 32 not in said


def test_without_a_token_only_this_machine_is_spoken_to(monkeypatch, tmp_path):
    auth.require_token("http://127.0.0.1:8265")
    monkeypatch.delenv("RAY_AUTH_MODE")
    with pytest.raises(ClusterError, match="without a token"):
        auth.require_token("https://ray.example.org")
    (tmp_path / "token").write_text("secret")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    auth.require_token("https://ray.example.org")
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_token_mode_without_a_token_says_where_it_is_looked_for(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(ClusterError, match="RAY_AUTH_TOKEN_PATH"):
        auth.require_token("http://127.0.0.1:8265")


@pytest.mark.parametrize("address, here", [
    ("http://127.0.0.1:8265", True), ("http://localhost:8265", True), ("http://[::1]:8265", True),
    ("http://127.9.9.9", True),
    ("http://10.0.0.1:8265", False), ("https://localhost.example.org", False), ("http://0.0.0.0:8265", False),
])  # fmt: skip
def test_loopback_is_told_by_the_address(address, here):
    assert auth.is_loopback(address) is here


@pytest.mark.parametrize(
    "address", ["10.0.0.1:6379", "ray://head:10001", "auto", "http://user:pass@head:8265", "http://head:8265/?token=x"]
)
def test_an_address_is_a_plain_url(address):
    with pytest.raises(ConfigError, match="URL of the cluster's Jobs API"):
        auth.address_of(address)


# The log


def test_a_line_of_progress_is_read_as_it_was_printed():
    seen = LogProgress()
    assert not seen.read_line("Train  LoRA rank 4 through the phases, 1 worker(s), ddp")
    text = "phase 1  loss 0.310  900 tokens/s  3 min left"
    assert seen.read_line(progress_line("  promptintern: update", 12, 90, text))
    assert str(seen) == "train  promptintern: update 12/90  phase 1  loss 0.310  900 tokens/s  3 min left"
    assert not seen.read_line("Evaluate  test rows, temperature 0") and str(seen) == "evaluate"
    assert not seen.read_line("templates: rate 1/2 of 3")


class FakeClient:
    """A Jobs API whose log stream breaks off: each connection gives the log from its start, as Ray's does."""

    def __init__(self, connections, statuses):
        self.connections, self.statuses = connections, statuses

    async def tail_job_logs(self, job):
        for chunk in self.connections.pop(0):
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk

    def get_job_info(self, job):
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        if isinstance(status, Exception):
            raise status
        return SimpleNamespace(status=status)


def tailed(monkeypatch, connections, statuses):
    async def at_once(seconds):
        return None

    jobs, lines = submit.Jobs.__new__(submit.Jobs), []
    jobs.address, jobs.client = "http://127.0.0.1:8265", FakeClient(connections, statuses)
    monkeypatch.setattr(asyncio, "sleep", at_once)
    try:
        asyncio.run(jobs.tail("job", lines.append))
    finally:
        tailed.lines = lines
    return lines


def test_a_log_goes_on_after_a_lost_connection_without_a_line_twice_or_missing(monkeypatch):
    connections = [
        ["one\ntw", RuntimeError("closed")], ["one\n", "two\nth", ConnectionError("reset")],
        ["one\ntwo\nthree\n", "four"],
    ]
    assert tailed(monkeypatch, connections, ["RUNNING", ConnectionError("no route"), "SUCCEEDED"]) == [
        "one", "two", "three", "four",
    ]


def test_a_job_that_a_new_head_does_not_know_is_said_so(monkeypatch):
    with pytest.raises(ClusterError, match="submit again: the run goes on from storage"):
        tailed(
            monkeypatch, [["one\n", ConnectionError("gone")]],
            [RuntimeError("Request failed with status code 404: Job x does not exist")],
        )
    assert tailed.lines == ["one"]


def test_a_cluster_that_stays_silent_is_given_up(monkeypatch):
    monkeypatch.setattr(submit, "PATIENCE_S", 0)
    with pytest.raises(ClusterError, match="The job may go on"):
        tailed(monkeypatch, [[ConnectionError("gone")]], [ConnectionError("no route")])


# One job a run


class FakeJobs(submit.Jobs):
    def __init__(self, known):
        self.address, self.client, self.known = "http://127.0.0.1:8265", self, known

    def all(self):
        return self.known

    def submit_job(self, submission_id, metadata, entrypoint, runtime_env):
        self.sent = (entrypoint, json.dumps(runtime_env))
        return submission_id


FACTS = {
    "pi_ray.run": "demo", "pi_ray.step": "run", "pi_ray.run_dir": "", "pi_ray.storage": "", "pi_ray.fingerprint": "f",
}


def known(number, status, **changes):
    return SimpleNamespace(submission_id=f"pi-ray-demo-{number}", status=status, metadata={**FACTS, **changes})


@pytest.fixture
def clock(monkeypatch):
    """Time that passes in pauses alone; holds their seconds."""
    pauses = []
    monkeypatch.setattr(submit, "time", SimpleNamespace(monotonic=lambda: sum(pauses), sleep=pauses.append))
    return pauses


def test_a_run_that_has_no_job_gets_one_and_later_ones_count_on(tmp_path):
    assert FakeJobs([]).start(FACTS, tmp_path, {}) == ("pi-ray-demo-1", True)
    jobs = FakeJobs([known(2, "FAILED"), known(1, "SUCCEEDED")])
    assert jobs.start(FACTS, tmp_path, {}) == ("pi-ray-demo-3", True)
    assert jobs.sent[0] == "python -m pi_ray.cli.job run run.yaml" and "RAY_AUTH" not in jobs.sent[1]


def test_a_number_is_not_given_twice_where_older_jobs_were_deleted(tmp_path):
    assert FakeJobs([known(3, "SUCCEEDED")]).start(FACTS, tmp_path, {}) == ("pi-ray-demo-4", True)
    assert FakeJobs([known(10, "FAILED"), known(9, "FAILED")]).start(FACTS, tmp_path, {}) == ("pi-ray-demo-11", True)


@pytest.mark.parametrize(
    "said",
    [
        "Job with submission_id pi-ray-demo-1 already exists.",
        "No available agent to submit job, please try again later.",
    ],
)
def test_a_cluster_that_never_takes_the_job_is_asked_once_a_second_and_then_given_up(
    tmp_path, clock, monkeypatch, said
):
    class Never(FakeJobs):
        asked = 0

        def submit_job(self, **sent):
            self.asked += 1
            assert self.asked <= 4, "it goes on for ever"
            raise RuntimeError(f"Request failed with status code 500: {said}")

    monkeypatch.setattr(submit, "PATIENCE_S", 3)
    with pytest.raises(ClusterError, match=said):
        Never([]).start(FACTS, tmp_path, {})
    assert clock == [1, 1, 1]


def test_a_run_that_is_going_on_is_attached_to(tmp_path):
    assert FakeJobs([known(1, "RUNNING")]).start(FACTS, tmp_path, {}) == ("pi-ray-demo-1", False)


def test_two_that_start_a_run_at_the_same_time_get_one_job(tmp_path, clock):
    class Race(FakeJobs):
        def submit_job(self, submission_id, **sent):
            self.known.append(known(1, "PENDING"))  # the other was first
            raise RuntimeError(
                f"Request failed with status code 400: ValueError: Job with submission_id {submission_id} already "
                "exists."
            )

    assert Race([]).start(FACTS, tmp_path, {}) == ("pi-ray-demo-1", False)


def test_a_cluster_that_is_only_just_up_is_asked_again(tmp_path, clock):
    class Young(FakeJobs):
        asked = 0

        def submit_job(self, submission_id, **sent):
            self.asked += 1
            if self.asked < 3:
                raise RuntimeError(
                    "Request failed with status code 500: No available agent to submit job, please try again later.."
                )
            return submission_id

    assert Young([]).start(FACTS, tmp_path, {}) == ("pi-ray-demo-1", True)


def test_a_head_whose_python_lacks_pi_rays_packages_is_told_with_its_cure():
    said = submit._main_line(
        "Job failed: log:\nTraceback (most recent call last):\n  File \"x.py\", line 1\nModuleNotFoundError: No module "
        "named 'rich'\n"
    )
    assert "No module named 'rich'" in said and "before 'ray start'" in said
    assert submit._main_line("a\npi-ray: one sentence\nb") == "pi-ray: one sentence"


def test_a_cluster_that_refuses_a_job_says_why(tmp_path):
    class Full(FakeJobs):
        def submit_job(self, **sent):
            raise RuntimeError("Request failed with status code 500: no space left.")

    with pytest.raises(ClusterError, match="no space left"):
        Full([]).start(FACTS, tmp_path, {})


@pytest.mark.parametrize("changes", [{"pi_ray.fingerprint": "g"}, {"pi_ray.step": "prepare"}])
def test_a_run_that_is_going_on_otherwise_is_neither_attached_to_nor_started_twice(tmp_path, changes):
    with pytest.raises(ClusterError, match="pi-ray stop pi-ray-demo-1"):
        FakeJobs([known(1, "PENDING", **changes)]).start(FACTS, tmp_path, {})


def test_another_run_directory_is_another_run(tmp_path):
    assert FakeJobs([known(1, "RUNNING", **{"pi_ray.run_dir": "/shared/mine"})]).start(FACTS, tmp_path, {}) == (
        "pi-ray-demo-2", True,
    )


def test_a_job_is_found_by_its_id_and_by_its_run():
    jobs = FakeJobs([known(2, "FAILED"), known(1, "RUNNING")])
    assert jobs.find("demo").submission_id == "pi-ray-demo-1" and jobs.find("pi-ray-demo-2").status == "FAILED"
    with pytest.raises(ClusterError, match="no job and no run 'other'"):
        jobs.find("other")


@pytest.mark.parametrize("verb, reads", [("submit", True), ("status", False), ("logs", False), ("stop", False)])
def test_the_help_names_the_run_file_where_it_is_read(capsys, verb, reads):
    with pytest.raises(SystemExit):
        cli.main([verb, "--help"])
    assert ("cluster.address of" in capsys.readouterr().out) == reads


# On the cluster


def test_a_job_keeps_its_inputs_in_the_run_directory_under_paths_that_stay(task, tmp_path, monkeypatch):
    monkeypatch.setenv("PI_RAY_STORAGE", str(tmp_path / "storage"))
    root = tmp_path / "storage" / "runs" / "my-task"
    loaded = []
    for session in ("session-1", "session-2"):  # each cluster session unpacks the parcel somewhere else
        folder = tmp_path / session
        bundle.write_bundle(unresolved(task), task, folder)
        monkeypatch.chdir(folder)
        assert entrypoint.settle(folder / "run.yaml", []).root == root
        loaded.append(run_file.load_run_file(root / "run.yaml"))
    assert loaded[0] == loaded[1]
    assert loaded[0].task.train == str(root / "inputs" / "train.jsonl") and loaded[0].store == str(
        tmp_path / "storage" / "store"
    )
    assert (root / "inputs" / "train.jsonl").read_bytes() == (task / "train.jsonl").read_bytes()


def test_what_serving_keeps_and_reads_lies_on_the_storage(task, tmp_path, monkeypatch):
    monkeypatch.setenv("PI_RAY_STORAGE", str(tmp_path / "storage"))
    monkeypatch.chdir(task)
    serve = entrypoint.settle(task / "run.yaml", ["serve.usage_dir=usage", "serve.keys_file=keys.yaml"]).serve
    assert (serve.usage_dir, serve.keys_file) == (f"{tmp_path}/storage/usage", f"{tmp_path}/storage/keys.yaml")
    serve = entrypoint.settle(task / "run.yaml", [f"serve.usage_dir={tmp_path}/mine"]).serve
    assert (serve.usage_dir, serve.keys_file) == (f"{tmp_path}/mine", "")


def test_a_refresh_keeps_its_inputs_apart_from_those_of_the_first_run(task, tmp_path, monkeypatch, tiny_model):
    storage = tmp_path / "storage"
    monkeypatch.setenv("PI_RAY_STORAGE", str(storage))
    put_in_store(storage / "store", "my-task", tiny_model)
    monkeypatch.chdir(task)
    settings = [f"model.base={tiny_model}"]
    first = entrypoint.settle(task / "run.yaml", settings)
    before = (first.root / "inputs" / "train.jsonl").read_bytes()
    (task / "train.jsonl").write_bytes(before + before)
    again = entrypoint.settle(task / "run.yaml", settings, refreshes=True)
    assert again.root.parent == first.root.parent and again.root.name.startswith("my-task-")
    assert again.task.train == str(again.root / "inputs" / "train.jsonl")
    assert Path(again.task.train).read_bytes() == before + before
    assert (first.root / "inputs" / "train.jsonl").read_bytes() == before
    refresh.copy_start_adapter(again)
    assert entrypoint.settle(task / "run.yaml", settings, refreshes=True) == again, "it goes on"


def test_a_score_file_runs_in_the_sandbox_of_a_job_whatever_the_run_file_says(task, tmp_path, monkeypatch):
    monkeypatch.setenv("PI_RAY_STORAGE", str(tmp_path / "storage"))
    (task / "score.py").write_text("def score(row, output):\n    return {'right': 1}\n")
    bundle.write_bundle(unresolved(task, "task.metric=[{name: python, file: score.py}]"), task, tmp_path / "sent")
    monkeypatch.chdir(tmp_path / "sent")
    config = entrypoint.settle(Path("run.yaml"), ["task.metric.0.sandbox=false"])
    (metric,) = run_file.load_run_file(config.root / "run.yaml").task.metric
    assert metric.sandbox and metric.file == str(config.root / "inputs" / "metric.0.file.py")


def test_changed_rows_replace_the_inputs(task, tmp_path, monkeypatch):
    monkeypatch.setenv("PI_RAY_STORAGE", str(tmp_path / "storage"))
    monkeypatch.chdir(task)
    entrypoint.settle(task / "run.yaml", [])
    (task / "train.jsonl").write_text("other")
    entrypoint.settle(task / "run.yaml", [])
    assert (tmp_path / "storage" / "runs" / "my-task" / "inputs" / "train.jsonl").read_text() == "other"


def test_a_run_file_on_storage_is_used_where_it_is(task, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    entrypoint.settle(task, [f"run_dir={tmp_path}/mine"])
    settings = run_file.load_run_file(tmp_path / "mine" / "run.yaml")
    assert settings.task.train == str(task / "train.jsonl") and not (tmp_path / "mine" / "inputs").exists()
    assert settings.store == str(tmp_path / "home" / "pi-ray" / "store")


def test_inputs_on_object_storage_are_fetched_and_those_that_are_not_there_are_missing_here_too(
    task, tmp_path, monkeypatch
):
    """As the run file of a RayJob names them, on a cluster whose storage is a bucket."""
    place = f"file://{tmp_path}/bucket/inputs/my-task"
    shutil.copytree(task, tmp_path / "bucket" / "inputs" / "my-task")
    (tmp_path / "bucket" / "inputs" / "my-task" / "extra" / "deep").mkdir(parents=True)
    (tmp_path / "bucket" / "inputs" / "my-task" / "extra" / "deep" / "a.txt").write_text("a")
    monkeypatch.setenv("PI_RAY_STORAGE", str(tmp_path / "node"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = entrypoint.settle(
        task / "run.yaml",
        [
            f"task.{key}={place}/{name}"
            for key, name in (("train", "train.jsonl"), ("queries", "none.jsonl"), ("folder", "extra"))
        ] + [f"task.metric={{name: python, file: '{place}/extra/deep/a.txt'}}"],
    )
    inputs = tmp_path / "node" / "runs" / "my-task" / "inputs"
    assert (inputs / "train.jsonl").read_bytes() == (task / "train.jsonl").read_bytes() and (
        inputs / "folder" / "deep" / "a.txt"
    ).read_text() == "a"
    assert (config.task.train, config.task.folder, config.task.queries) == (
        str(inputs / "train.jsonl"), str(inputs / "folder"), str(inputs / "queries.jsonl"),
    )
    assert config.task.metric[0].file == str(inputs / "metric.0.file.txt") and config.task.metric[0].sandbox
    assert not (inputs / "queries.jsonl").exists() and run_file.load_run_file(inputs.parent / "run.yaml") == config


def test_inputs_by_url_and_those_that_came_along_lie_side_by_side(task, tmp_path, monkeypatch):
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "rows.jsonl").write_text("far")
    monkeypatch.setenv("PI_RAY_STORAGE", str(tmp_path / "node"))
    bundle.write_bundle(unresolved(task, f"task.train=file://{tmp_path}/bucket/rows.jsonl"), task, tmp_path / "sent")
    monkeypatch.chdir(tmp_path / "sent")
    config, inputs = entrypoint.settle(Path("run.yaml"), []), tmp_path / "node" / "runs" / "my-task" / "inputs"
    assert (config.task.train, Path(config.task.train).read_text()) == (str(inputs / "train.jsonl"), "far")
    assert (
        Path(config.task.dev).parent == inputs
        and Path(config.task.dev).read_bytes() == (task / "dev.jsonl").read_bytes()
    )


def test_a_yes_to_spending_is_for_one_job(task, tmp_path, monkeypatch):
    monkeypatch.chdir(task)
    said = []
    monkeypatch.setattr(cli, "main", lambda command: said.append(command) or 0)
    assert job.main("run", [str(task / "run.yaml"), "closed.confirmed=true", f"run_dir={tmp_path}/mine"]) == 0
    assert said == [["run", f"{tmp_path}/mine", "closed.confirmed=true"]]
    assert run_file.load_run_file(tmp_path / "mine" / "run.yaml").closed.confirmed is False


def test_on_object_storage_each_node_has_a_folder_of_its_own_and_the_next_job_finds_all_there(
    task, tmp_path, monkeypatch
):
    (tmp_path / "bucket").mkdir()
    place, found = f"file://{tmp_path}/bucket", []

    def step(command):
        config = run_file.load_run_file(Path(command[1]) / "run.yaml")
        found.append((config.store, sorted(p.name for p in config.root.iterdir())))
        with staged(config.root / "rows", fingerprint="x") as tmp:
            (tmp / "train").write_text("rows")
        return 3

    monkeypatch.setattr(cli, "main", step)
    for node in ("a", "b"):
        monkeypatch.setenv("PI_RAY_STORAGE", str(tmp_path / node))
        monkeypatch.chdir(task)
        assert job.main("prepare", ["run.yaml", f"cluster.storage_path={place}"]) == 3
    assert found[0] == (f"{place}/store", [".mirror.json", "inputs", "run.yaml"])
    assert found[1] == (f"{place}/store", [".mirror.json", "inputs", "rows", "run.yaml"])
    assert (tmp_path / "bucket" / "runs" / "my-task" / "rows" / "train").read_text() == "rows"


def test_a_mistake_in_the_run_file_is_one_sentence_of_the_job(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("name: demo\ntrian: {}\n")
    assert job.main("run", ["run.yaml"]) == 2
    assert "did you mean 'train'" in capsys.readouterr().err
