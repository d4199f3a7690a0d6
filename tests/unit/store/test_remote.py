"""A store behind a URL: fetched once, checked here, and never trusted with a path, a size or a hash."""

import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from pi_ray.config import ModelConfig, RunConfig
from pi_ray.errors import AdapterError, ConfigError
from pi_ray.run import object_storage
from pi_ray.run.artifact import seal_folder, staged, temporary_path, write_atomic
from pi_ray.run.directory import RunDir
from pi_ray.store import disk_cache, remote
from pi_ray.store.adapters import AdapterStore, StoreUnavailableError, UnknownAdapterError
from pi_ray.store.publish import publish_adapter
from pi_ray.store.release import release_version
from tests.lora import card, put_in_store, rewrite, write_adapter
from tests.unit.fake_bucket import Bucket, Clock


@pytest.fixture(scope="module")
def published(tiny_model, tmp_path_factory):
    root = tmp_path_factory.mktemp("bucket") / "adapters"
    put_in_store(root, "colours", tiny_model, 1)
    put_in_store(root, "shapes", tiny_model, 2)
    return root


@pytest.fixture
def root(published, tmp_path, monkeypatch):
    monkeypatch.setenv("PI_RAY_CACHE", str(tmp_path / "cache"))
    shutil.copytree(published, tmp_path / "bucket" / "adapters")
    return tmp_path / "bucket" / "adapters"


@pytest.fixture
def bucket(root, monkeypatch):
    bucket = Bucket(root.parent)
    monkeypatch.setattr(object_storage, "open_file_system", lambda url: (bucket, "adapters"))
    return bucket


@pytest.fixture
def store(bucket, tiny_model):
    store = AdapterStore("s3://bucket/adapters", ModelConfig(base=str(tiny_model)))
    store.backend._clock = Clock()
    return store


def test_an_adapter_is_fetched_once_verified_and_served_from_here(store, bucket, root, tmp_path):
    assert store.names() == ["colours", "shapes"]
    adapter = store.open("colours")
    assert (adapter.name, adapter.version) == ("colours", "v0001")
    assert adapter.path.is_relative_to(tmp_path / "cache")
    for file in (root / "colours" / "v0001").iterdir():
        assert (adapter.path / file.name).read_bytes() == file.read_bytes()
    bucket.opened.clear()
    assert store.open("colours") is adapter
    assert bucket.opened == []
    assert {p.name for p in (tmp_path / "cache" / "adapters").rglob("*") if "tmp" in p.name} == set()


def test_another_process_of_the_machine_finds_the_fetched_copy(store, bucket, tiny_model):
    path = store.open("colours").path
    bucket.opened.clear()
    other = AdapterStore("s3://bucket/adapters", ModelConfig(base=str(tiny_model)))
    assert other.open("colours").path == path
    assert not any("safetensors" in name for name in bucket.opened)


def test_a_copy_that_was_damaged_here_is_fetched_again(store, bucket, tiny_model):
    path = store.open("colours").path
    (path / "adapter_model.safetensors").write_bytes(b"x")
    other = AdapterStore("s3://bucket/adapters", ModelConfig(base=str(tiny_model)))
    assert other.open("colours").path == path
    assert (path / "adapter_model.safetensors").stat().st_size > 1


def test_a_new_version_is_seen_within_seconds_and_the_store_is_not_asked_for_every_request(
    store, bucket, root, tiny_model
):
    store.open("colours")
    put_in_store(root, "colours", tiny_model, 3, version="v0002")
    assert store.open("colours").version == "v0001"
    store.backend._clock.now += remote.REFRESH_S
    assert store.open("colours").version == "v0002"
    assert store.open("colours@v0001").version == "v0001"


def test_while_the_store_is_out_of_reach_known_adapters_are_served(store, bucket):
    store.open("colours")
    bucket.down = True
    store.backend._clock.now += 100
    assert store.open("colours").version == "v0001"
    with pytest.raises(StoreUnavailableError) as error:
        store.open("shapes")
    assert "secret-bucket" not in str(error.value)
    asked, bucket.down = bucket.asked, False
    with pytest.raises(StoreUnavailableError):
        store.open("shapes")
    assert bucket.asked == asked, "requests do not wait one after the other for a store that has just not answered"
    store.backend._clock.now += remote.REFRESH_S
    assert store.open("shapes").name == "shapes"


def test_while_the_store_is_out_of_reach_one_request_in_some_seconds_waits_for_it(store, bucket):
    store.open("colours")
    bucket.down = True
    for times in (1, 2):
        store.backend._clock.now += remote.REFRESH_S
        asked = bucket.asked
        for _ in range(10):
            assert store.open("colours").version == store.backend.versions("colours")[-1] == "v0001", times
        assert bucket.asked == asked + 1


def test_requests_beside_the_one_that_waits_for_the_store_do_not(store, bucket):
    store.open("colours")
    store.backend._clock.now += remote.REFRESH_S
    entered, goes_on, asking = threading.Event(), threading.Event(), []
    bucket._check = lambda: (
        asking.append(threading.current_thread()) or entered.set() or (asking[-1] is waiting and goes_on.wait(30))
    )
    waiting = threading.Thread(target=store.open, args=("colours",))
    waiting.start()
    try:
        assert entered.wait(30)
        assert store.open("colours").version == "v0001"
        assert set(asking) == {waiting}
    finally:
        goes_on.set()
        waiting.join()


@pytest.mark.fault
def test_names_that_somebody_made_up_cost_the_store_nothing_and_are_not_kept(store, bucket):
    store.open("colours")
    before = bucket.asked, len(store.backend._answers)
    for i in range(50):
        for spec in (f"made-up-{i}", f"made-up-{i}@v0001", f"colours@v{i + 2:04d}"):
            with pytest.raises(UnknownAdapterError):
                store.open(spec)
    assert (bucket.asked, len(store.backend._answers)) == before


def test_unknown_names_and_versions_are_unknown(store, root):
    for spec in ("nothing", "colours@v0002", "colours@prod"):
        with pytest.raises(UnknownAdapterError):
            store.open(spec)


@pytest.mark.fault
@pytest.mark.parametrize(
    "name",
    [
        "..", "../x", "/etc", "a/../../b", "a%2f..", "a\x00b", ".hidden", "x" * 300, "аdapter", "colours@../v0001",
        "a;rm -rf ~",
    ],
)
def test_a_forbidden_name_reaches_neither_the_store_nor_the_disk(store, bucket, tmp_path, name):
    bucket.down = True
    with pytest.raises(UnknownAdapterError):
        store.open(name)
    assert not (tmp_path / "cache").exists()


def refused(store, message):
    with pytest.raises(AdapterError, match=message) as error:
        store.open("colours")
    assert not isinstance(error.value, StoreUnavailableError)
    assert "bucket" not in str(error.value) and str(Path.cwd()) not in str(error.value)


@pytest.mark.fault
@pytest.mark.parametrize(("change", "message"), [
    ({"../../../evil.json": {"sha256": "0" * 64, "bytes": 1}}, "names a file that no adapter has"),
    ({"adapter_model.bin": {"sha256": "0" * 64, "bytes": 1}}, "never a pickle"),
    ({"manifest.json": {"sha256": "0" * 64, "bytes": 1}}, "names a file that no adapter has"),
    ({"adapter_model.safetensors": {"sha256": "0" * 64, "bytes": 2**60}}, "too large"),
    ({"adapter_model.safetensors": {"sha256": "0" * 64, "bytes": -1}}, "too large"),
    ({"adapter_model.safetensors": {"sha256": "0" * 64, "bytes": 10}}, "larger than the 10 bytes"),
    ({"adapter_model.safetensors": {"bytes": 10}}, "no size and hash"),
    ({"adapter_model.safetensors": 3}, "no size and hash"),
    ({f"x{i}.json": {"sha256": "0" * 64, "bytes": 1} for i in range(20)}, "does not list the files of an adapter"),
    ({"gone.json": {"sha256": "0" * 64, "bytes": 1}}, "not whole in the store"),
])  # fmt: skip
def test_a_hostile_manifest_leaves_nothing_behind(store, root, tmp_path, change, message):
    path = root / "colours" / "v0001" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.pop("manifest_sha256", None)
    path.write_text(json.dumps({**manifest, "files": {**manifest["files"], **change}}))
    refused(store, message)
    left = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] if (tmp_path / "cache").exists() else []
    assert left == [] and not (tmp_path / "evil.json").exists()
    assert store.open("shapes").name == "shapes"


@pytest.mark.fault
def test_a_flipped_bit_is_refused_and_not_fetched_again_with_every_request(store, bucket, root):
    file = root / "colours" / "v0001" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    refused(store, "not whole in the store: adapter_model.safetensors: sha256")
    bucket.opened.clear()
    refused(store, "not whole in the store")
    assert bucket.opened == []
    data[-1] ^= 1
    file.write_bytes(data)
    store.backend._clock.now += remote.RETRY_S
    assert store.open("colours").name == "colours"


@pytest.mark.fault
def test_an_adapter_is_verified_as_in_a_folder(store, bucket, root, tiny_model):
    config = json.loads((root / "colours" / "v0001" / "adapter_config.json").read_text())
    rewrite(root / "colours" / "v0001", "adapter_config.json", {**config, "auto_map": {"AutoModel": "evil.Model"}})
    refused(store, "auto_map")
    bucket.opened.clear()
    refused(store, "auto_map")
    assert bucket.opened == []


def train(run, base, seed):
    with staged(run.adapter(0), fingerprint=str(seed)) as tmp:
        write_adapter(tmp, base, seed, facts=card(base))
    run.choose_best(0)


def test_publish_and_release_write_to_a_store_behind_a_url(store, bucket, root, tiny_model, tmp_path):
    config = RunConfig(
        name="flags", run_dir=str(tmp_path / "run"), store="s3://bucket/adapters",
        model=ModelConfig(base=str(tiny_model)),
    )
    run = RunDir(config.root)
    train(run, tiny_model, 1)
    first = publish_adapter(run, config)
    assert first.parts[-2:] == ("flags", "v0001")
    assert sorted(p.name for p in (root / "flags" / "v0001").iterdir()) == sorted(p.name for p in first.iterdir())
    assert publish_adapter(run, config) == first
    train(run, tiny_model, 2)
    assert publish_adapter(run, config).name == "v0002"
    assert store.names() == ["colours", "flags", "shapes"]
    release_version(store, "flags", "v0001")
    assert store.open("flags").version == "v0001"
    assert json.loads((root / "flags" / "aliases.json").read_text())["prod"]["version"] == "v0001"
    assert not any((tmp_path / "cache" / "uploads").iterdir())


def test_a_failed_upload_is_no_version(store, bucket, root, tiny_model, tmp_path):
    config = RunConfig(
        name="flags", run_dir=str(tmp_path / "run"), store="s3://bucket/adapters",
        model=ModelConfig(base=str(tiny_model)),
    )
    train(RunDir(config.root), tiny_model, 1)

    def fail_late(path, real=bucket.open_output_stream):
        if path.endswith("pi_ray.json"):
            raise OSError("no space in the bucket")
        return real(path)

    bucket.open_output_stream = fail_late
    with pytest.raises(StoreUnavailableError):
        publish_adapter(RunDir(config.root), config)
    assert not (root / "flags" / "v0001" / "manifest.json").exists() and not (root / "flags" / "latest.json").exists()
    assert store.names() == ["colours", "shapes"]
    del bucket.open_output_stream
    assert publish_adapter(RunDir(config.root), config).name == "v0001"
    assert AdapterStore(config.store).open("flags").version == "v0001"


def test_a_url_is_opened_by_pyarrow(root, tiny_model):
    store = AdapterStore(f"file://{root}/", ModelConfig(base=str(tiny_model)))
    assert store.names() == ["colours", "shapes"]
    assert store.open("colours").card["task"] == "colours"
    assert AdapterStore(f"file://{root}/nowhere").names() == []


def test_a_url_by_fsspec_sees_new_versions(root, tiny_model):
    """hf:// comes through fsspec, whose file systems remember listings."""
    store = AdapterStore(f"fsspec+file://{root}", ModelConfig(base=str(tiny_model)))
    store.backend._clock = Clock()
    assert store.open("colours").version == "v0001"
    put_in_store(root, "colours", tiny_model, 3, version="v0002")
    store.backend._clock.now += remote.REFRESH_S
    assert store.open("colours").version == "v0002"


@pytest.mark.parametrize("url", ["nope://x/y", "s3://", "file:///", "http://example.org/x"])
def test_a_url_of_an_unknown_kind_is_an_error_that_names_the_known_kinds(url):
    with pytest.raises(ConfigError, match=r"s3://.*gs://, hf://"):
        AdapterStore(url)


def test_of_two_replicas_that_fetch_a_version_at_once_the_first_ones_files_stay(store, bucket, tiny_model):
    other = AdapterStore("s3://bucket/adapters", ModelConfig(base=str(tiny_model)))
    opened, found = bucket.open_input_stream, []

    def open_input_stream(path):
        if path.endswith("adapter_model.safetensors") and not found:
            found.append(None)  # the other replica overtakes this one
            found[0] = other.open("colours").path
            found.append(found[0].stat().st_ino)
        return opened(path)

    bucket.open_input_stream = open_input_stream
    path = store.open("colours").path
    assert [path, path.stat().st_ino] == found and sorted(p.name for p in path.parent.iterdir()) == ["v0001"]


def test_a_damaged_copy_on_this_machine_is_replaced(store, root):
    path = store.open("colours").path
    (path / "pi_ray.json").write_text("{}")
    other = AdapterStore("s3://bucket/adapters", store.base)
    assert (other.open("colours").path / "pi_ray.json").read_bytes() == (
        root / "colours" / "v0001" / "pi_ray.json"
    ).read_bytes()


def test_the_cache_on_disk_is_bounded_and_the_least_recently_used_version_goes(store, monkeypatch, tiny_model):
    colours = store.open("colours").path
    size = sum(file.stat().st_size for file in colours.iterdir())
    os.utime(colours.parents[1], (1, 1))
    monkeypatch.setattr(store.backend._cache, "limit", 1.5 * size)
    shapes = store.open("shapes").path
    assert shapes.is_dir() and not colours.exists()
    assert store.open("colours").path == colours and colours.is_dir(), "fetched again when it is asked for"
    assert [folder.name for folder in store.backend._cache.root.iterdir()] == [colours.parents[1].name]


def test_room_is_not_made_of_a_folder_into_which_another_process_fetches(store, monkeypatch):
    colours = store.open("colours").path
    other = store.backend._cache.folder("0" * 64, "other", "v0001")
    part = temporary_path(other)
    part.mkdir(parents=True)
    (part / "adapter_model.safetensors").write_bytes(b"half")
    os.utime(other.parents[1], (1, 1))
    monkeypatch.setattr(store.backend._cache, "limit", 0)
    store.backend._cache.make_room(keep=colours)
    assert part.is_dir() and colours.is_dir()
    os.utime(part, (time.time() - 2 * disk_cache.DAY_S,) * 2)
    store.backend._cache.make_room(keep=colours)
    assert not other.parents[1].exists(), "its process was killed long ago"


@pytest.mark.fault
@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors", "pi_ray.json"])
def test_a_folder_removed_while_it_is_fetched_is_not_taken_for_damage_in_the_store(store, bucket, tmp_path, file):
    opened = bucket.open_input_stream

    def open_input_stream(path):
        if path.endswith(f"v0001/{file}"):
            shutil.rmtree(tmp_path / "cache" / "adapters")
        return opened(path)

    bucket.open_input_stream = open_input_stream
    with pytest.raises(StoreUnavailableError, match="'colours@v0001' was removed here while it was fetched; ask again"):
        store.open("colours")
    bucket.open_input_stream = opened
    assert store.open("colours").name == "colours"


def test_the_bound_of_the_cache_comes_from_the_environment(bucket, monkeypatch):
    monkeypatch.setenv("PI_RAY_CACHE_GIB", "0.5")
    assert AdapterStore("s3://bucket/adapters").backend._cache.limit == 2**29
    monkeypatch.setenv("PI_RAY_CACHE_GIB", "much")
    with pytest.raises(ConfigError, match="PI_RAY_CACHE_GIB: 'much' is no number of GiB"):
        AdapterStore("s3://bucket/adapters")


def test_a_reader_of_a_store_on_a_disk_never_sees_half_of_a_file(root, monkeypatch):
    store = AdapterStore(f"file://{root}")
    before = (root / "colours" / "latest.json").read_bytes()

    def fails(source, out, chunk):
        out.write(b'{"version"')
        out.flush()
        assert (root / "colours" / "latest.json").read_bytes() == before
        raise OSError("the disk is gone")

    monkeypatch.setattr(object_storage.shutil, "copyfileobj", fails)
    with pytest.raises(StoreUnavailableError):
        store.backend.write("colours", "latest.json", '{"version": "v0002"}')
    assert (root / "colours" / "latest.json").read_bytes() == before
    assert not list((root / "colours").glob(".*"))


def test_uploads_of_killed_publications_are_removed_after_a_day(store):
    uploads = store.backend._cache.uploads
    for name, age in (("old", 2 * disk_cache.DAY_S), ("going-on", 60)):
        (uploads / name).mkdir(parents=True)
        os.utime(uploads / name, (time.time() - age,) * 2)
    with pytest.raises(RuntimeError), store.backend.stage_version("colours", "v0002", "f"):
        raise RuntimeError
    assert [folder.name for folder in uploads.iterdir()] == ["going-on"]


def test_what_a_killed_publication_has_left_in_a_store_on_a_disk_is_removed_by_the_next_one(store, root):
    version = root / "colours" / "v0001"
    left = [version / f".adapter_model.safetensors.{'a' * 32}.tmp", root / "colours" / f".latest.json.{'b' * 32}.tmp"]
    for path in left:
        path.write_bytes(b"half")
    before = {path for path in root.rglob("*") if path not in left}
    with store.backend.lock("colours"):
        assert {*root.rglob("*")} == before


def test_a_url_with_a_secret_is_refused_without_being_shown():
    with pytest.raises(ConfigError, match="may not hold a user, a password or a key") as refused:
        AdapterStore("s3://AKIAKEY:secret@bucket/store")
    assert "AKIAKEY" not in str(refused.value) and "secret@" not in str(refused.value)


def test_a_manifest_too_large_is_not_read_whole(store, root):
    (root / "colours" / "v0001" / "manifest.json").write_bytes(b" " * (remote.MAX_JSON_BYTES + 2))
    refused(store, "too large")


def test_a_folder_without_a_manifest_is_no_version(store, root):
    (root / "colours" / "v0001" / "manifest.json").unlink()
    with pytest.raises(UnknownAdapterError):
        store.open("colours")
    write_atomic(root / "colours" / "latest.json", "{}")
    seal_folder(root / "colours" / "v0001")
    store.backend._clock.now += remote.REFRESH_S
    with pytest.raises(AdapterError, match="names no version"):
        store.open("colours")
