"""Leases by conditional writes, on S3 and Google Cloud Storage of this machine, and on storage that has none."""

import logging
import threading

import pytest
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

from pi_ray.cluster import storage_lease
from pi_ray.cluster.storage_lease import StorageLease
from pi_ray.errors import TrainingError
from pi_ray.run.object_storage import ObjectStorage

KEY = "train.owner"
ENDPOINTS = ("AWS_ENDPOINT_URL", "CLOUD_STORAGE_EMULATOR_ENDPOINT")  # read anew by each client that is made


@pytest.fixture
def storage(bucket, tmp_path):
    return ObjectStorage(f"{bucket}/{tmp_path.name}")


@pytest.mark.fault
@pytest.mark.parametrize("conditional", [True, False], ids=["conditional writes", "plain writes"])
def test_the_group_that_started_last_has_it_and_the_one_before_is_told_at_its_next_renewal(
    storage, tmp_path, conditional
):
    if not conditional:
        storage = ObjectStorage("s3://bucket/run", SubTreeFileSystem(str(tmp_path), LocalFileSystem()), "run")
    first = StorageLease(storage, KEY, "first")
    first.renew()
    second = StorageLease(storage, KEY, "second")
    with pytest.raises(TrainingError, match=r"train\.owner: another group of workers has taken this run over"):
        first.renew()
    second.renew()
    second.renew()
    assert storage.read(KEY) == b"second"


def between(monkeypatch, lease_of, happens):
    """Let `happens` come between the reading and the first write of leases whose holder is `lease_of`."""
    write = StorageLease._write

    def interrupted(self, version):
        if self.holder == lease_of and (todo := happens.pop("once", None)):
            todo()
        return write(self, version)

    monkeypatch.setattr(StorageLease, "_write", interrupted)


@pytest.mark.fault
@pytest.mark.parametrize("held", [False, True], ids=["a new run", "a run that was held"])
def test_of_two_groups_that_start_at_the_same_moment_one_stops_at_once(storage, monkeypatch, held):
    if held:
        StorageLease(storage, KEY, "before")
    made = []
    between(monkeypatch, "one", {"once": lambda: made.append(StorageLease(storage, KEY, "two"))})
    with pytest.raises(TrainingError, match="another group of workers has just started on this run"):
        StorageLease(storage, KEY, "one")
    made[0].renew()
    assert storage.read(KEY) == b"two"


@pytest.mark.fault
def test_of_many_groups_at_once_one_has_the_lease(storage):
    taken, ready = [], threading.Barrier(8)

    def start(name):
        ready.wait()
        try:
            taken.append(StorageLease(storage, KEY, name))
        except TrainingError:
            taken.append(None)

    threads = [threading.Thread(target=start, args=(f"group {i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    holders = []
    for lease in filter(None, taken):
        try:
            lease.renew()
            holders.append(lease.holder.encode())
        except TrainingError:
            pass  # it had it for a moment, and another one started after it
    assert len(taken) == 8 and holders == [storage.read(KEY)]


@pytest.mark.fault
def test_a_holder_that_renews_while_it_is_replaced_does_not_stop_the_new_one(storage, monkeypatch):
    before = StorageLease(storage, KEY, "before")
    between(monkeypatch, "after", {"once": before.renew})
    StorageLease(storage, KEY, "after").renew()
    with pytest.raises(TrainingError):
        before.renew()


@pytest.mark.fault
def test_a_renewal_whose_confirmation_was_lost_counts(storage):
    lease = StorageLease(storage, KEY, "one")
    lease._version = {"e_tag": '"of an earlier state"', "version": "7"}
    lease.renew()
    lease.renew()


@pytest.mark.fault
def test_storage_that_does_not_answer_is_an_error_of_the_disk_and_no_lost_lease(storage, monkeypatch):
    lease = StorageLease(storage, KEY, "one")
    monkeypatch.setattr(storage_lease, "PATIENCE", {"max_retries": 0})
    for name in ENDPOINTS:
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    lease._objects = storage_lease.open_client(lease.storage)
    with pytest.raises(OSError, match=r"127\.0\.0\.1"):
        lease.renew()


def test_where_the_second_client_does_not_get_in_the_lease_is_written_without_it_and_the_log_says_so(
    storage, monkeypatch, caplog
):
    monkeypatch.setattr(storage_lease, "PATIENCE", {"max_retries": 0})
    for name in ENDPOINTS:
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with caplog.at_level(logging.WARNING, "pi_ray"):
        StorageLease(storage, KEY, "one").renew()
    assert "the lease is not written conditionally" in caplog.text and storage.read(KEY) == b"one"


def test_the_second_client_has_pyarrows_region_and_speaks_plain_http_only_where_the_endpoint_does(monkeypatch):
    asked = {}
    monkeypatch.setattr("obstore.store.from_url", lambda url, **settings: asked.update(settings, url=url))
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    storage_lease.open_client(ObjectStorage("s3://bucket/run?region=eu-west-3"))
    assert asked["url"] == "s3://bucket/run" and asked["config"] == {"region": "eu-west-3"}
    assert asked["client_options"]["allow_http"] is False
    storage_lease.open_client(ObjectStorage("s3://bucket/run?region=x&scheme=http&endpoint_override=minio:9000"))
    assert asked["config"] == {"region": "x", "endpoint": "http://minio:9000"}
    assert asked["client_options"]["allow_http"] is True
    monkeypatch.delenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", raising=False)
    storage_lease.open_client(ObjectStorage("gs://anonymous@bucket/run"))
    assert asked["url"] == "gs://bucket/run" and asked["client_options"]["allow_http"] is False
