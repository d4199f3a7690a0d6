"""Run directories, stores and inputs in buckets, through pyarrow's clients, against servers on this machine."""

import os
import shutil
from pathlib import Path

import pytest

from pi_ray import cli
from pi_ray.cli import job
from pi_ray.cluster.storage_sync import StorageSync
from pi_ray.config import ModelConfig
from pi_ray.config.run_file import load_run_file
from pi_ray.errors import CorruptArtifactError, StorageError
from pi_ray.run.artifact import digest, staged, write_atomic
from pi_ray.run.object_storage import ObjectStorage
from pi_ray.store.adapters import AdapterStore
from tests.lora import put_in_store


def test_a_node_fetches_the_files_of_another_one_and_finds_damage(bucket, tmp_path):
    there = ObjectStorage(f"{bucket}/runs/a")
    with StorageSync(tmp_path / "one", there).attach_driver():
        write_atomic(tmp_path / "one" / "run.yaml", "name: a\n")
        with staged(tmp_path / "one" / "rows", fingerprint="x") as tmp:
            (tmp / "train").write_bytes(b"rows" * 400_000)
        assert {"run.yaml", "rows/train", "rows/manifest.json"} <= set(there.list_keys()), "sent when it was written"
    StorageSync(tmp_path / "two", ObjectStorage(there.url)).pull()
    assert (tmp_path / "two" / "rows" / "train").read_bytes() == b"rows" * 400_000 and (
        tmp_path / "two" / "run.yaml"
    ).read_text() == "name: a\n"
    there.upload(b"other", "rows/train")
    with pytest.raises(CorruptArtifactError, match="rows is damaged"):
        StorageSync(tmp_path / "three", ObjectStorage(there.url)).pull()


def test_a_job_beside_a_bucket_takes_its_inputs_from_it_and_leaves_its_run_there(bucket, tmp_path, monkeypatch):
    inputs = ObjectStorage(f"{bucket}/inputs")
    for name in ("train", "dev", "test"):
        inputs.upload(b'{"query": "q", "answer": "a"}\n', f"{name}.jsonl")
    inputs.upload(b"# Instruction\n\nDo it.\n", "template.md")
    lines = [f"  {key}: {bucket}/inputs/{key}.jsonl" for key in ("train", "dev", "test")]
    (tmp_path / "run.yaml").write_text(
        "\n".join(
            [
                "name: far", f"cluster: {{storage_path: {bucket}/pi-ray}}", "task:", *lines,
                f"  template: {bucket}/inputs/template.md",
            ]
        )
        + "\n"
    )
    monkeypatch.setenv("PI_RAY_STORAGE", str(tmp_path / "pod"))
    monkeypatch.chdir(tmp_path / "..")
    seen = []

    def step(command):
        config = load_run_file(Path(command[1]) / "run.yaml")
        seen.append(
            (
                config.store, Path(config.task.train).read_text(),
                sorted(p.name for p in config.root.iterdir() if p.is_dir()),
            )
        )
        with staged(config.root / "rows", fingerprint="x") as tmp:
            (tmp / "train").write_text("prepared")
        return 0

    monkeypatch.setattr(cli, "main", step)
    for _ in range(2):
        assert job.main("prepare", [str(tmp_path / "run.yaml")]) == 0
        shutil.rmtree(tmp_path / "pod")
    row = '{"query": "q", "answer": "a"}\n'
    assert seen == [
        (f"{bucket}/pi-ray/store", row, ["inputs"]), (f"{bucket}/pi-ray/store", row, ["inputs", "rows"]),
    ]
    assert (
        ObjectStorage(f"{bucket}/pi-ray").list_folders(pattern="r*") == ["runs"]
        and ObjectStorage(f"{bucket}/pi-ray/runs/far").read("rows/train") == b"prepared"
    )


def test_an_adapter_is_served_from_a_bucket(bucket, tiny_model, tmp_path):
    put_in_store(tmp_path / "store", "shop", tiny_model)
    there = ObjectStorage(f"{bucket}/store")
    for path in (p for p in (tmp_path / "store").rglob("*") if p.is_file()):
        there.upload(path, path.relative_to(tmp_path / "store").as_posix())
    store = AdapterStore(f"{bucket}/store", ModelConfig(base=str(tiny_model)))
    assert store.names() == ["shop"]
    assert (store.open("shop").path / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "store" / "shop" / "v0001" / "adapter_model.safetensors"
    ).read_bytes()


def test_a_missing_bucket_is_one_sentence(bucket, tmp_path):
    with (
        pytest.raises(StorageError, match="storage does not answer, or refuses"),
        StorageSync(tmp_path / "run", ObjectStorage(f"{bucket}-that-is-not-there/run")).attach_driver(),
    ):
        write_atomic(tmp_path / "run" / "run.yaml", "name: a\n")


@pytest.mark.parametrize("key", ["../evil", "rows/../../../evil", "rows//evil", "/evil", "./evil"])
def test_a_key_that_leads_out_of_the_copy_is_refused_before_any_file_is_written(s3_server, tmp_path, key):
    import boto3

    there, copy = ObjectStorage(f"s3://bucket/runs/{digest(key)[:8]}"), tmp_path / "a" / "b"
    put = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"]).put_object
    for ending, content in (("", b"x"), (".sha256", digest(b"x").encode())):
        put(Bucket="bucket", Key=f"{there.url.removeprefix('s3://bucket/')}/{key}{ending}", Body=content)
    with pytest.raises(CorruptArtifactError, match="leads out of"):
        StorageSync(copy, ObjectStorage(there.url)).pull()
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [".mirror.json"]


def test_inputs_of_a_job_come_whole_from_a_bucket_and_no_key_leads_out_of_their_folder(s3_server, tmp_path):
    import boto3

    put = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"]).put_object
    task = ObjectStorage("s3://bucket/tasks/mine")
    for key, content in (("train.jsonl", b"rows"), ("docs/one.md", b"a page")):
        task.upload(content, key)
    task.fetch_all(tmp_path / "task")
    assert (tmp_path / "task" / "train.jsonl").read_bytes() == b"rows"
    assert (tmp_path / "task" / "docs" / "one.md").read_bytes() == b"a page"
    ObjectStorage("s3://bucket/tasks/mine/train.jsonl").fetch_all(tmp_path / "rows.jsonl")
    assert (tmp_path / "rows.jsonl").read_bytes() == b"rows"
    ObjectStorage("s3://bucket/tasks/none").fetch_all(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    put(Bucket="bucket", Key="tasks/mine/../../evil", Body=b"x")
    with pytest.raises(CorruptArtifactError, match="leads out of"):
        ObjectStorage(task.url).fetch_all(tmp_path / "a" / "b" / "task")
    assert not list((tmp_path / "a").rglob("*")) and not (tmp_path / "evil").exists()


@pytest.mark.parametrize("key", ["task.folder", "task.train"])
def test_a_job_refuses_inputs_whose_keys_lead_out_of_their_folder(s3_server, tmp_path, monkeypatch, capsys, key):
    import boto3

    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    for name in ("../../evil", "train.jsonl"):
        client.put_object(Bucket="bucket", Key=f"jobs/{key}/inputs/{name}", Body=b"{}")
    (tmp_path / "run.yaml").write_text("name: far\ntask: {name: nl2bash}\n")
    monkeypatch.setenv("PI_RAY_STORAGE", str(tmp_path / "pod"))
    monkeypatch.chdir(tmp_path / "..")
    monkeypatch.setattr(cli, "main", lambda command: 0)
    assert job.main("prepare", [str(tmp_path / "run.yaml"), f"{key}=s3://bucket/jobs/{key}/inputs"]) != 0
    assert "leads out of its folder" in capsys.readouterr().err
    assert not [path for path in (tmp_path / "pod").rglob("*") if path.is_file()]
