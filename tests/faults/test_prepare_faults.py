"""Preparation under faults: hostile and broken rows, a killed driver, a lost node, a full disk."""

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pi_ray.config import RunConfig, TaskConfig
from pi_ray.data import phase_dataset, pieces
from pi_ray.data.ingest import ingest
from pi_ray.data.pieces import RangeSource, partial_folder
from pi_ray.data.prepare import prepare
from pi_ray.errors import CorruptArtifactError, DataError, StorageError
from pi_ray.protocols import Row
from pi_ray.run.artifact import digest_file, seal_folder
from pi_ray.run.directory import RunDir
from pi_ray.tasks.jsonl import JsonlTask
from pi_ray.train.batches import PhaseDataset
from tests import two_nodes
from tests.bench.crash import ray_cluster, try_worker_death
from tests.crash_steps import copy_root, make_ready_to_prepare, outcome
from tests.crash_steps import prepare as prepare_step
from tests.crashing import changes_of_workers, give_orders, run_step
from tests.disks import fill, leftovers
from tests.prepared import prepare_by_hand, tiny_config
from tests.two_nodes import apart, outside
from tests.unit.tasks.test_jsonl import BAD

pytestmark = pytest.mark.fault


def write_rows(folder, train=40):
    for split, count in (("train", train), ("dev", 6), ("test", 6)):
        rows = [
            {"id": f"{split}-{i}", "query": f"{split} {i}: which code has case {i}?", "answer": f"code k{i % 7} | {i}"}
            for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "template.md").write_text("# Instruction\n\nAnswer with one code.\n")
    return {
        **{s: str(folder / f"{s}.jsonl") for s in ("train", "dev", "test")}, "template": str(folder / "template.md"),
    }


def config_in(folder):
    return RunConfig.model_validate({
        "name": "tiny", "run_dir": str(folder / "run"), "prompt": {"chat": "chatml"}, "compress": {"name": "none"},
        "task": write_rows(folder), "schedule": {"phases": 2, "shots": 1},
    })  # fmt: skip


@pytest.fixture
def config(tmp_path):
    return config_in(tmp_path)


def phases(config):
    """Hash of every file that preparation leaves, by its path."""
    return {
        p.relative_to(config.root).as_posix(): digest_file(p) for p in sorted(config.root.rglob("*")) if p.is_file()
    }


# D1: rows that cannot be used


def test_d1_every_kind_of_bad_row_lands_in_the_rejects_and_every_good_row_is_kept(config, tmp_path):
    good = b'{"query": "good %d", "answer": "a", "id": "g%d"}'
    lines = [b'{"query": "one", "answer": "a", "id": "first"}']
    for i, bad in enumerate(BAD.values()):
        lines += [bad, good % (i, i)]
    (tmp_path / "train.jsonl").write_bytes(b"\n".join(lines))
    run = RunDir(config.root)
    allowed = config.task.model_copy(update={"max_bad_rows": len(BAD)})
    ingest(JsonlTask(allowed), allowed, run, "f", lambda line: None)
    rejects = [json.loads(line) for line in run.rejects.read_text().splitlines()]
    assert [r["line"] for r in rejects] == [2 * i + 2 for i in range(len(BAD))] and all(
        r["reason"] and r["source"].endswith("train.jsonl") for r in rejects
    )
    assert [r.id for r in run.read_rows("train")] == ["first", *(f"g{i}" for i in range(len(BAD)))]
    strict = config.task.model_copy(update={"max_bad_rows": len(BAD) - 1})
    with pytest.raises(DataError, match=f"{len(BAD)} bad rows, and task.max_bad_rows is {len(BAD) - 1}"):
        ingest(JsonlTask(strict), strict, run, "g", lambda line: None)


def test_d1_an_empty_split_is_refused(config, tmp_path):
    (tmp_path / "test.jsonl").write_text("")
    with pytest.raises(DataError, match="no test rows"):
        ingest(JsonlTask(config.task), config.task, RunDir(config.root), "f", lambda line: None)


# D3: files that would run code where something trusting reads them


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture
def canary(tmp_path):
    path = tmp_path / "canary"
    with pickle.loads(pickle.dumps(Canary(path))):
        assert path.exists(), "the bomb works where something unpickles it"
    path.unlink()
    yield path
    assert not path.exists()


def pickled_column(canary, name):
    """A Parquet file with Ray's own column type for Python objects, which unpickles a value when it is looked at."""
    import ray.data  # noqa: F401  # registers the type
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

    storage = pa.array([pickle.dumps(Canary(canary))] * 4, pa.large_binary())
    return pa.table({name: pa.ExtensionArray.from_storage(ArrowPythonObjectType(), storage)})


@pytest.mark.parametrize("name", ["rows.parquet", "rows.json", "rows.jsonl"])
def test_d3_pickled_columns_are_no_rows(tmp_path, canary, name):
    pq.write_table(pickled_column(canary, "query"), tmp_path / name)
    task = JsonlTask(
        TaskConfig(train=str(tmp_path / name), test=str(tmp_path / "none"), template=str(tmp_path / "none"))
    )
    assert not [row for row in task.rows("train") if isinstance(row, Row)]


def test_d3_pickled_columns_in_a_run_directory_are_refused_though_its_hashes_agree(tiny_model, tmp_path, canary):
    config = tiny_config(tiny_model, tmp_path / "run")
    prepare_by_hand(config)
    folder = RunDir(config.root).phase(0)
    table = pickled_column(canary, "prompt_ids").append_column("label_ids", pa.array([[1]] * 4))
    pq.write_table(table, folder / "part-00000.parquet")
    manifest = json.loads((folder / "manifest.json").read_text())
    seal_folder(folder, **{k: v for k, v in manifest.items() if k not in ("files", "manifest_sha256")})
    with pytest.raises(CorruptArtifactError, match="prompt_ids has an Arrow extension type"):
        PhaseDataset(folder)


def test_d3_tensor_columns_with_pickled_metadata_are_refused(tmp_path, canary):
    """As Ray 2.49 to 2.54 wrote them: the shape of the tensors is a pickle in the file's metadata."""
    import ray.data  # noqa: F401
    from ray.data._internal.tensor_extensions.arrow import ArrowTensorTypeV2

    class Hostile(ArrowTensorTypeV2):
        def __arrow_ext_serialize__(self):
            return pickle.dumps(Canary(canary))

    column = pa.ExtensionArray.from_storage(Hostile((1,), pa.int64()), pa.array([[1]], pa.large_list(pa.int64())))
    path = RunDir(tmp_path).rows / "train.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table({"id": ["a"], "query": column}), path)
    with pytest.raises((CorruptArtifactError, ValueError)):
        RunDir(tmp_path).read_rows("train")


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_d3_class_keys_in_json_are_text_and_nothing_else(tmp_path, canary, name):
    hostile = {
        "__class__": "os.system", "__reduce__": ["os.system", [f"touch {canary}"]], "py/object": "os.system",
        "py/reduce": [{"py/function": "os.system"}, {"py/tuple": [f"touch {canary}"]}],
    }
    rows = [{**hostile, "query": "q", "answer": "a"}, hostile]
    (tmp_path / name).write_text(json.dumps(rows) if name.endswith("json") else "\n".join(map(json.dumps, rows)))
    first, second = JsonlTask(TaskConfig(train=str(tmp_path / name), test="none", template="none")).rows("train")
    assert first == Row("train-1", "q", "a") and "missing field" in second.reason


# F6: a disk that is full


def test_f6_a_piece_that_does_not_fit_leaves_the_finished_ones_and_no_debris(tiny_model, small_disk):
    config = tiny_config(tiny_model, small_disk / "run").replace(**{"schedule.shots": 0})
    rng = random.Random(0)
    rows = [Row(f"r{i}", f"what is case {rng.getrandbits(500)}?", f"a{i}") for i in range(200)]
    run = RunDir(config.root)
    run.rows.mkdir(parents=True)
    pq.write_table(
        pa.table({k: [getattr(r, k) for r in rows] for k in ("id", "query", "answer", "group")}),
        run.rows / "train.parquet",
    )
    folder = partial_folder(run.phase(0), "f")
    phase = phase_dataset.PhaseData("0", "train", 1.0, 0)
    step = pieces.Pieces(run, phase_dataset.SCHEMA, 100, {"train": {"0": f"{folder}/part-"}})
    one, two = step.ranges("train")
    mapped = pieces.MapRange(phase_dataset.TokeniseRows, (config, "f", [phase]), step.outputs, None)

    def write(rows):
        pieces.write_files(mapped(*RangeSource(run, [rows], None).get_read_tasks(1)[0]()), step.schema)

    write(one)
    ballast = fill(small_disk, 4096)
    with pytest.raises(StorageError, match=r"part-00001\.parquet.*No space left"):
        write(two)
    assert step.is_finished(one) and not step.is_finished(two) and not leftovers(small_disk)
    ballast.unlink()
    write(two)
    assert step.is_finished(two)


# D2, F3: a killed driver, a lost node


@pytest.fixture(scope="module")
def clean(tmp_path_factory, ray_local):
    """A run that was prepared without faults."""
    folder = tmp_path_factory.mktemp("clean")
    config = config_in(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phase_dataset, "PIECE_ROWS", 10)
        prepare(config, lambda line: None)
    return config


@pytest.mark.ray
def test_d2_killed_half_way_the_same_command_writes_no_file_twice_and_ends_the_same(clean, tmp_path, monkeypatch):
    config = clean.replace(run_dir=str(tmp_path / "run"))
    monkeypatch.setattr(phase_dataset, "PIECE_ROWS", 10)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    first = subprocess.Popen(
        [sys.executable, "-m", "tests.two_nodes", "held", str(tmp_path)], start_new_session=True, env=outside()
    )
    written, deadline = tmp_path / "written", time.monotonic() + 120
    while not (written.exists() and len(written.read_text().split()) >= 4):
        assert first.poll() is None and time.monotonic() < deadline, "the first run ended before it could be killed"
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    monkeypatch.setattr(pieces, "PieceSink", two_nodes.CountedSink)
    prepare(config, lambda line: None)
    done = written.read_text().split()
    assert len(done) == len(set(done)) == 9, "4 + 4 of train, 1 of dev"
    assert phases(config) == phases(clean)


@pytest.mark.ray
@pytest.mark.parametrize("torn", [False, True], ids=["killed", "torn"])
def test_d2_a_worker_that_dies_at_a_sync_of_its_file_changes_no_byte(dying_workers, tmp_path, torn):
    """A sample; `python -m tests.bench.crash --only workers` kills one at every change of the disk."""
    source, orders, changes, expected = dying_workers
    syncs = [at for at, change in enumerate(changes, 1) if change.startswith("fsync") and change.endswith(".tmp")]
    root = copy_root(source, orders.parent / f"died-{torn}")
    assert try_worker_death(root, orders, syncs[len(syncs) // 2], torn, expected) == ""


@pytest.fixture(scope="module")
def dying_workers(tmp_path_factory):
    """(root, orders, changes and outcome of an undisturbed preparation) on a cluster whose workers obey the orders."""
    folder = tmp_path_factory.mktemp("workers")
    orders, root = folder / "orders.json", make_ready_to_prepare(folder / "root")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
            patch.setenv(name, "")  # the cluster sets them, and they are put back
        with ray_cluster(folder / "ray", orders):
            undisturbed = copy_root(root, folder / "undisturbed")
            give_orders(orders, undisturbed)
            run_step(prepare_step, undisturbed)
            yield root, orders, changes_of_workers(orders), outcome(undisturbed)


@pytest.mark.ray
def test_f3_a_node_that_is_lost_in_preparation_changes_no_byte(clean, tmp_path):
    config = clean.replace(run_dir=str(tmp_path / "run"))
    (tmp_path / "config.json").write_text(config.model_dump_json())
    apart("prepare", str(tmp_path))
    assert (tmp_path / "killed").exists() and phases(config) == phases(clean)
