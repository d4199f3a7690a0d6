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
