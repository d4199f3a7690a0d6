"""Storage sync: a reader's view while a run directory is written, when the connection is lost, and of damage."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from threading import Event, Timer

import pytest
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

from pi_ray.cluster.storage_sync import StorageSync, fetch_updates, sync_for
from pi_ray.data.ray_map import ItemActor, fan_out
from pi_ray.errors import CorruptArtifactError, StorageError
from pi_ray.run.artifact import digest_file, read_manifest, staged, verify_artifact, write_atomic
from pi_ray.run.directory import RunDir
from pi_ray.run.object_storage import ObjectStorage
from pi_ray.train.checkpoint import remove_checkpoints


class Bucket:
    """A file system that counts its operations and loses the connection at one of them, half of a file written."""

    def __init__(self, files, fails_at=None):
        self.files, self.fails_at, self.done = files, fails_at, 0

    def _step(self):
        self.done += 1
        if self.fails_at is not None and self.done >= self.fails_at:
            raise ConnectionResetError("connection lost")

    def __getattr__(self, name):
        method = getattr(self.files, name)

        def call(*args, **options):
            self._step()
            found = method(*args, **options)
            return Stream(self, found) if name == "open_output_stream" else found

        return call


class Stream:
    def __init__(self, bucket, stream):
        self.bucket, self.stream = bucket, stream

    def write(self, data):
        self.stream.write(data[: len(data) // 2])
        self.bucket._step()
        self.stream.write(data[len(data) // 2 :])

    def __enter__(self):
        return self

    def __exit__(self, *failed):
        self.stream.close()  # as pyarrow does it: what was written stays, also after an error


@pytest.fixture
def bucket(tmp_path):
    (tmp_path / "bucket").mkdir()
    return SubTreeFileSystem(str(tmp_path / "bucket"), LocalFileSystem())


def sync_of(folder: Path, files) -> StorageSync:
    return StorageSync(folder, ObjectStorage("s3://bucket/run", files, "run"))


def write(folder: Path, text: str, *names: str) -> None:
    with staged(folder, fingerprint=text) as tmp:
        for name in names:
            (tmp / name).parent.mkdir(exist_ok=True)
            (tmp / name).write_text(text + name)


def seen(bucket, folder: Path) -> dict:
    """The files of a node that fetches for the first time: relative path -> text."""
    sync_of(folder, bucket).pull()
    return {
        p.relative_to(folder).as_posix(): p.read_text()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in ("manifest.json", ".mirror.json")
    }


def test_artifacts_and_files_keep_their_names_and_hashes_on_storage(bucket, tmp_path):
    here = tmp_path / "here"
    with sync_of(here, bucket).attach_driver():
        write(here / "adapters" / "phase-0", "a", "weights", "more/config")
        write_atomic(here / "run.yaml", "name: demo")
    assert (tmp_path / "bucket" / "run" / "adapters" / "phase-0" / "weights").read_text() == "aweights"
    assert seen(bucket, tmp_path / "there") == {
        "adapters/phase-0/more/config": "amore/config", "adapters/phase-0/weights": "aweights",
        "run.yaml": "name: demo",
    }
    assert verify_artifact(tmp_path / "there" / "adapters" / "phase-0") == verify_artifact(
        here / "adapters" / "phase-0"
    )


@pytest.mark.fault
def test_wherever_the_connection_is_lost_a_reader_has_the_old_the_new_or_no_artifact(bucket, tmp_path):
    """Every single operation of a replacement fails once, in turn."""
    here = tmp_path / "here"
    write(here / "phases" / "0", "old", "a", "b", "gone")
    write_atomic(here / "neighbours", "old")
    sender = sync_of(here, bucket)
    sender.push(here / "phases" / "0")
    sender.push(here / "neighbours")
    outcomes, fails_at = [], 0
    while True:
        fails_at += 1
        write(here / "phases" / "0", "old", "a", "b", "gone")
        write_atomic(here / "neighbours", "old")
        for path in (here / "phases" / "0", here / "neighbours"):
            sync_of(here, bucket).push(path)
        write(here / "phases" / "0", "new", "a", "b")
        write_atomic(here / "neighbours", "new")
        broken = Bucket(bucket, fails_at)
        try:
            for path in (here / "phases" / "0", here / "neighbours"):
                sync_of(here, broken).push(path)
        except StorageError as error:
            assert "connection lost" in str(error)
            reader = seen(bucket, tmp_path / f"reader-{fails_at}")
            folder = {name: text[:3] for name, text in reader.items() if name.startswith("phases")}
            assert folder in (
                {}, dict.fromkeys(("phases/0/a", "phases/0/b", "phases/0/gone"), "old"),
                dict.fromkeys(("phases/0/a", "phases/0/b"), "new"),
            )
            assert reader.get("neighbours") in (None, "old", "new")
            outcomes.append((tuple(folder.values()), reader.get("neighbours")))
            for path in (here / "phases" / "0", here / "neighbours"):
                sync_of(here, bucket).push(path)  # the same command again
            assert set(seen(bucket, tmp_path / f"again-{fails_at}").values()) == {"newa", "newb", "new"}
        else:
            break
    assert len(set(outcomes)) >= 4, "the failures met different states"


@pytest.mark.fault
def test_a_connection_lost_while_fetching_leaves_the_local_copy(bucket, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    write(here / "rows", "old", "train", "test")
    sync_of(here, bucket).push(here / "rows")
    sync_of(there, bucket).pull()
    write(here / "rows", "new", "train", "test")
    sync_of(here, bucket).push(here / "rows")
    fails_at = 0
    while (there / "rows" / "train").read_text() != "newtrain":
        fails_at += 1
        try:
            sync_of(there, Bucket(bucket, fails_at)).pull()
        except StorageError:
            assert verify_artifact(there / "rows")["fingerprint"] in ("old", "new")
            assert not [p for p in there.iterdir() if p.name.endswith((".tmp", ".old"))]
    assert fails_at > 3


@pytest.mark.fault
def test_a_damaged_artifact_is_named_and_never_used(bucket, tmp_path):
    write(tmp_path / "here" / "rows", "a", "train")
    sync_of(tmp_path / "here", bucket).push(tmp_path / "here" / "rows")
    (tmp_path / "bucket" / "run" / "rows" / "train").write_text("other")
    with pytest.raises(CorruptArtifactError, match=r"s3://bucket/run/rows is damaged .*train.*sha256"):
        sync_of(tmp_path / "there", bucket).pull()
    assert not (tmp_path / "there" / "rows").exists()


def test_a_manifest_that_names_files_elsewhere_writes_nothing_there(bucket, tmp_path):
    write(tmp_path / "here" / "rows", "a", "train")
    sync_of(tmp_path / "here", bucket).push(tmp_path / "here" / "rows")
    path = tmp_path / "bucket" / "run" / "rows" / "manifest.json"
    body = json.loads(path.read_text())
    body["files"]["../../escaped"] = body["files"]["train"]
    path.write_text(json.dumps(body))
    with pytest.raises(CorruptArtifactError):
        sync_of(tmp_path / "there", bucket).pull()
    assert not (tmp_path / "escaped").exists() and not (tmp_path / "there" / "escaped").exists()


def test_a_second_pull_and_push_move_nothing(bucket, tmp_path):
    here = tmp_path / "here"
    write(here / "rows", "a", "train")
    write_atomic(here / "run.yaml", "x")
    sender = sync_of(here, bucket)
    sender.push_changes()
    sender.push(here / "rows")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "bucket").rglob("*") if p.is_file()}
    with sync_of(here, bucket).attach_driver():
        write_atomic(here / "run.yaml", "x")
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "bucket").rglob("*") if p.is_file()}


def test_the_choice_of_the_best_adapter_and_the_log_travel(bucket, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    with sync_of(here, bucket).attach_driver():
        write(here / "adapters" / "phase-1", "a", "weights")
        RunDir(here).choose_best(1)
        (here / "train.jsonl").write_text("{}\n")
    sync_of(there, bucket).pull()
    assert (RunDir(there).best / "weights").read_text() == "aweights"
    assert (there / "train.jsonl").read_text() == "{}\n"


def test_files_removed_here_are_removed_on_storage_but_not_the_files_of_other_nodes(bucket, tmp_path):
    here = tmp_path / "here"
    with sync_of(here, bucket).attach_driver():
        for step in (1, 2, 3):
            write(here / "checkpoints" / f"step-{step}", "a", "state")
            if step == 2:
                (here / "checkpoints" / "step-1").rename(here / "x")
                write(tmp_path / "other" / "adapters" / "phase-0", "b", "weights")
                sync_of(tmp_path / "other", bucket).push(tmp_path / "other" / "adapters" / "phase-0")
    assert not (tmp_path / "bucket" / "run" / "checkpoints" / "step-1" / "manifest.json").exists()
    assert read_manifest(tmp_path / "bucket" / "run" / "checkpoints" / "step-3")["fingerprint"] == "a"
    assert (tmp_path / "bucket" / "run" / "adapters" / "phase-0" / "manifest.json").exists()


def test_temporary_files_and_files_outside_the_run_directory_are_not_sent(bucket, tmp_path):
    here = tmp_path / "here"
    with sync_of(here, bucket).attach_driver():
        write_atomic(tmp_path / "elsewhere", "x")
        write_atomic(here / "ray" / "scratch", "x")
    assert not [p for p in (tmp_path / "bucket").rglob("*") if p.is_file()]


class Count:
    """A worker's work: reads the driver's rows and writes a file of its own."""

    def __init__(self, root: Path):
        self.root = root

    def __call__(self, item: dict) -> int:
        write_atomic(self.root / "part", (self.root / "rows" / "train").read_text() + item["name"])
        return item["n"] + 1


def test_a_worker_on_a_node_without_the_run_directory_fetches_it_and_sends_its_files(bucket, tmp_path, monkeypatch):
    driver, node = tmp_path / "driver", tmp_path / "node"
    monkeypatch.setattr("pi_ray.run.artifact.write_listeners", [])
    monkeypatch.setattr("pi_ray.cluster.storage_sync._worker_syncs", {})
    with sync_of(driver, bucket).attach_driver():
        write(driver / "rows", "a", "train")
        assert sync_for(tmp_path / "elsewhere") is None and sync_for(driver / "baselines" / "plain") is sync_for(driver)
        item = json.dumps({"name": "!", "n": 1})
        actor = ItemActor(Count, (node,), sync_of(node, bucket).attach_worker)
        answer = actor({"place": [0], "item": [item]})
        assert json.loads(answer["answer"][0]) == {"value": 2}
        write_atomic(driver / "later", "l")
        fetch_updates(node)
        assert (node / "later").read_text() == "l"
        sync_for(driver).pull()
        assert (driver / "part").read_text() == "atrain!"


class SlowBucket(Bucket):
    """A file system whose uploads wait until they may go on."""

    def __init__(self, files):
        super().__init__(files)
        self.reached, self.open = Event(), Event()

    def __getattr__(self, name):
        if name == "open_output_stream":
            self.reached.set()
            assert self.open.wait(60)
        return super().__getattr__(name)


@pytest.fixture
def worker(bucket, tmp_path, monkeypatch):
    """A training worker's sync on a slow bucket, and the names of the checkpoints on it."""
    monkeypatch.setattr("pi_ray.run.artifact.write_listeners", [])
    monkeypatch.setattr("pi_ray.cluster.storage_sync._worker_syncs", {})
    slow = SlowBucket(bucket)
    sync = sync_of(tmp_path / "node", slow)
    sync.attach_worker()
    manifests = (tmp_path / "bucket" / "run" / "checkpoints").glob
    yield sync, slow, lambda: sorted(path.parent.name for path in manifests("*/manifest.json"))
    slow.open.set()


def test_training_goes_on_while_a_checkpoint_is_sent_and_the_next_one_waits_for_it(worker):
    sync, slow, sent = worker
    checkpoints = sync.local / "checkpoints"
    write(checkpoints / "step-1", "a", "state")
    assert sent() == [], "it is under way, and training is not held up"
    Timer(0.2, slow.open.set).start()
    write(checkpoints / "step-2", "b", "state")
    assert "step-1" in sent(), "one is under way at a time, in their order"
    sync.push_changes()
    assert sent() == ["step-1", "step-2"]


def test_an_adapter_is_sent_at_once_and_behind_the_checkpoint_before_it(worker, tmp_path):
    sync, slow, sent = worker
    write(sync.local / "checkpoints" / "step-1", "a", "state")
    Timer(0.2, slow.open.set).start()
    write(sync.local / "adapters" / "phase-0", "b", "weights")
    assert sent() == ["step-1"] and (tmp_path / "bucket" / "run" / "adapters" / "phase-0" / "manifest.json").is_file()


def test_a_checkpoint_that_could_not_be_sent_is_an_error_of_the_next_thing_that_is(worker):
    sync, slow, _ = worker
    slow.fails_at = slow.done + 5
    slow.open.set()
    write(sync.local / "checkpoints" / "step-1", "a", "state")
    with pytest.raises(StorageError, match="connection lost"):
        write(sync.local / "adapters" / "phase-0", "b", "weights")
    slow.fails_at = None
    sync.push_changes()
    sent = seen(slow.files, sync.local.parent / "there")
    assert {"checkpoints/step-1/state", "adapters/phase-0/weights"} <= set(sent)


def test_checkpoints_that_a_finished_run_removes_while_they_are_sent_leave_nothing_behind(worker, tmp_path):
    sync, slow, _ = worker
    write(sync.local / "checkpoints" / "step-1", "a", "state", "best")
    assert slow.reached.wait(60)
    remove_checkpoints(sync.local / "checkpoints")
    slow.open.set()
    sync.push_changes()
    assert [path for path in (tmp_path / "bucket" / "run").rglob("*") if path.is_file()] == []


class OneActor:
    """Ray Data in this process, as a node's one actor."""

    def __init__(self, rows):
        self.rows = rows

    def map_batches(self, actor, batch_size, compute, fn_constructor_args):
        work = actor(*fn_constructor_args)
        answers = [work({name: [value] for name, value in row.items()}) for row in self.rows]
        return OneActor([{name: values[0] for name, values in answer.items()} for answer in answers])

    def iter_rows(self):
        return self.rows


def test_a_worker_fetches_once_for_each_fan_out_and_leaves_the_pieces_of_others_there(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("ray.data.from_items", lambda rows, **_: OneActor(rows))
    monkeypatch.setattr("pi_ray.cluster.session.connect", lambda: None)
    monkeypatch.setattr("pi_ray.run.artifact.write_listeners", [])
    monkeypatch.setattr("pi_ray.cluster.storage_sync._worker_syncs", {})
    node, other, counted, done = tmp_path / "node", tmp_path / "other", Bucket(bucket), []
    pieces = node / "phases" / ".0-f.partial"

    def make():
        def work(item):
            done.append(counted.done)
            assert not (pieces / "of-another").exists()
            write_atomic(pieces / item["name"], "x")
            return (node / "rows").read_text()

        return work

    for round_ in ("first", "second"):
        with sync_of(other, bucket).attach_driver():
            write_atomic(other / "rows", round_)
            if round_ == "first":
                for name in ("of-another", *map(str, range(30))):
                    write_atomic(other / "phases" / ".0-f.partial" / name, "x")
        items = [{"name": f"{round_}-{i}"} for i in range(4)]
        assert fan_out(items, make, actors=1, sync=sync_of(node, counted)) == [round_] * 4
        assert len({b - a for a, b in pairwise(done)}) == 1 and done[1] - done[0] < 20, (
            "an item costs what sending its piece costs, however many there are"
        )
        assert (pieces / "of-another").exists(), "the driver has them all in the end"
        shutil.rmtree(pieces)
        done.clear()


def test_a_url_of_an_unknown_kind_is_one_sentence(tmp_path):
    with pytest.raises(StorageError, match="take a folder, s3://"):
        ObjectStorage("ftp://host/folder")
    assert digest_file(write_atomic(tmp_path / "x", "x")) == digest_file(tmp_path / "x")


def test_files_written_here_and_not_sent_yet_are_kept_and_sent_later(bucket, tmp_path):
    here = tmp_path / "here"
    with sync_of(here, bucket).attach_driver():
        write(here / "rows", "old", "train")
        write_atomic(here / "run.yaml", "old")
    write(here / "rows", "new", "train")
    write_atomic(here / "run.yaml", "new")
    sync_of(here, bucket).pull()
    assert (here / "rows" / "train").read_text() == "newtrain" and (here / "run.yaml").read_text() == "new"
    sync_of(here, bucket).push_changes()
    assert seen(bucket, tmp_path / "there")["rows/train"] == "newtrain"


def test_an_artifact_that_another_node_replaced_is_replaced_here(bucket, tmp_path):
    for node, text in (("a", "old"), ("b", "new")):
        with sync_of(tmp_path / node, bucket).attach_driver():
            write(tmp_path / node / "rows", text, "train")
            write_atomic(tmp_path / node / "run.yaml", text)
    sync_of(tmp_path / "a", bucket).pull()
    assert (tmp_path / "a" / "rows" / "train").read_text() == "newtrain" and (
        tmp_path / "a" / "run.yaml"
    ).read_text() == "new"
