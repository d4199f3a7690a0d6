"""Release: which version answers, for whom, and the way back."""

import json
import threading

import pytest

from pi_ray import cli
from pi_ray.config import ModelConfig
from pi_ray.errors import AdapterError, ConfigError
from pi_ray.store.adapters import AdapterStore, Alias, UnknownAdapterError
from pi_ray.store.release import release_version
from tests.lora import put_in_store

KEYS = [f"chatcmpl-{i}" for i in range(2000)]


@pytest.fixture(scope="module")
def published(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    for seed in (1, 2, 3):
        put_in_store(folder, "colours", tiny_model, seed, version=f"v000{seed}")
    return folder


@pytest.fixture
def store(published, tiny_model):
    (published / "colours" / "aliases.json").unlink(missing_ok=True)
    return AdapterStore(published, ModelConfig(base=str(tiny_model)))


def version(store, spec="colours", key=""):
    return store.resolve(spec, key)[1]


def shares(store, spec="colours"):
    found = [version(store, spec, t) for t in KEYS]
    return {v: found.count(v) / len(found) for v in set(found)}


def test_without_a_release_the_newest_version_answers(store):
    assert release_version(store, "colours") == {}
    assert version(store) == version(store, "colours@latest") == "v0003"
    with pytest.raises(UnknownAdapterError, match="alias 'prod'"):
        version(store, "colours@prod")


def test_a_released_version_answers_until_another_one_is_released(store, published):
    release_version(store, "colours", "v0001")
    other = AdapterStore(published)  # as a replica has it, already running
    assert version(other) == version(other, "colours@prod") == "v0001"
    assert version(other, "colours@latest") == "v0003"
    release_version(store, "colours", "v0002")
    assert version(other) == "v0002"
    assert other.open("colours").version == "v0002"


def test_a_canary_gets_its_share_and_a_sticky_key_always_meets_the_same_version(store):
    release_version(store, "colours", "v0001")
    release_version(store, "colours", "v0002", canary=10)
    assert shares(store)["v0002"] == pytest.approx(0.1, abs=0.03)
    few = {t for t in KEYS if version(store, key=t) == "v0002"}
    release_version(store, "colours", canary=50)
    assert shares(store)["v0002"] == pytest.approx(0.5, abs=0.05)
    assert few <= {t for t in KEYS if version(store, key=t) == "v0002"}
    assert [version(store, key=t) for t in KEYS] == [version(store, key=t) for t in KEYS]
    assert version(store, "colours@v0001", KEYS[0]) == "v0001"


def test_without_a_sticky_key_the_canary_never_answers(store):
    """A server that merges an adapter when it starts has no key."""
    release_version(store, "colours", "v0001")
    release_version(store, "colours", "v0002", canary=99.9)
    assert version(store) == "v0001" and version(store, key=KEYS[0]) == "v0002"


def test_rollback_ends_a_canary_first_and_then_goes_back_step_by_step(store):
    release_version(store, "colours", "v0001")
    release_version(store, "colours", "v0002")
    release_version(store, "colours", canary=30)
    assert set(shares(store)) == {"v0002", "v0003"}
    for expected in ("v0002", "v0001"):
        release_version(store, "colours", rollback=True)
        assert shares(store) == {expected: 1.0}
    with pytest.raises(AdapterError, match="no earlier version"):
        release_version(store, "colours", rollback=True)


def test_a_damaged_version_is_not_gone_back_to(store, published):
    release_version(store, "colours", "v0001")
    release_version(store, "colours", "v0002")
    (published / "colours" / "v0001" / "x.bin").write_bytes(b"")
    with pytest.raises(AdapterError, match=r"x\.bin"):
        release_version(store, "colours", rollback=True)
    assert version(store) == "v0002"
    release_version(store, "colours", "v0003", canary=5)
    release_version(store, "colours", rollback=True)
    assert version(store) == "v0002", "the end of a canary opens nothing"
    (published / "colours" / "v0001" / "x.bin").unlink()


def test_a_canary_becomes_the_release_and_can_be_taken_back(store):
    release_version(store, "colours", "v0001")
    release_version(store, "colours", "v0003", canary=5)
    assert release_version(store, "colours", "v0003") == {"prod": Alias("v0003", before=("v0001",))}
    release_version(store, "colours", rollback=True)
    assert version(store) == "v0001"
    release_version(store, "colours", "latest")
    assert release_version(store, "colours") == {}
    assert version(store) == "v0003"


def test_aliases_do_not_change_each_other(store):
    release_version(store, "colours", "v0001")
    release_version(store, "colours", "v0002", alias="staging")
    assert (version(store), version(store, "colours@staging")) == ("v0001", "v0002")
    assert store.open("colours@staging").version == "v0002"


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"version": "v0009"}, AdapterError, "no adapter 'colours@v0009'"),
    ({"version": "../x"}, ConfigError, "looks like v0003"),
    ({"rollback": True}, AdapterError, "nothing to go back to"),
    ({"rollback": True, "version": "v0001"}, ConfigError, "goes alone"),
    ({"canary": 10}, AdapterError, "--version v0002"),
    ({"canary": 0, "version": "v0002"}, ConfigError, "between 0 and 100"),
    ({"canary": 100, "version": "v0002"}, ConfigError, "between 0 and 100"),
    ({"canary": 10, "version": "v0002", "alias": "new"}, AdapterError, "--alias new"),
    ({"alias": "v1", "version": "v0002"}, ConfigError, "--alias v1"),
    ({"alias": "latest", "version": "v0002"}, ConfigError, "--alias latest"),
    ({"alias": "../x", "version": "v0002"}, ConfigError, "--alias"),
    ({"name": "../x"}, AdapterError, "can be named"),
    ({"name": "colours@v0001"}, ConfigError, "name alone"),
    ({"name": "shapes", "version": "v0001"}, AdapterError, "no adapter 'shapes'"),
])  # fmt: skip
def test_a_wrong_release_is_an_error_and_changes_nothing(store, published, options, error, message):
    with pytest.raises(error, match=message):
        release_version(store, **{"name": "colours", **options})
    assert not (published / "colours" / "aliases.json").exists()
    assert {p.name for p in published.iterdir()} == {"colours"}


def test_the_command_for_a_first_release_names_another_version_than_the_newest(store):
    with pytest.raises(AdapterError, match="--version v0002"):
        release_version(store, "colours", "latest", canary=20)


def test_an_older_version_can_be_tried_against_the_newest(store):
    release_version(store, "colours", "v0001", canary=20)
    assert set(shares(store)) == {"v0001", "v0003"}


def test_a_version_that_serving_would_refuse_is_not_released(store, tmp_path, tiny_model):
    bad = put_in_store(tmp_path, "bad", tiny_model)
    (bad / "x.bin").write_bytes(b"")
    with pytest.raises(AdapterError, match=r"x\.bin"):
        release_version(AdapterStore(tmp_path), "bad", "v0001")


@pytest.mark.parametrize("content", [
    '{"prod": {"version": "../../x"}}', '{"prod": {"version": "v0001", "canary": "x", "percent": 5}}',
    '{"prod": {"version": "v0001", "percent": 1000}}',
    '{"prod": "v0001"}', '{"../x": {"version": "v0001"}}', "[]", "{",
    '{"prod": {"version": "v0001", "before": "v0001"}}',
])  # fmt: skip
def test_damaged_aliases_are_an_error_and_never_a_path(store, published, content):
    (published / "colours" / "aliases.json").write_text(content)
    with pytest.raises(AdapterError, match=r"aliases\.json"):
        store.open("colours")
    assert store.open("colours@v0001").version == "v0001"


def test_releases_at_once_do_not_lose_each_others_alias(store):
    threads = [
        threading.Thread(target=release_version, args=(store, "colours", "v0001", None, False, f"team-{i}"))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(release_version(store, "colours")) == {f"team-{i}" for i in range(8)}


def test_the_verb_shows_and_changes_what_answers(store, published, capsys):
    def pi_ray(*words):
        code = cli.main(["release", "colours", "--store", str(published), *words])
        return code, "".join(capsys.readouterr())

    assert "colours: v0003 answers, and whatever is published after it" in pi_ray()[1]
    assert "colours: v0001 answers\nversions: v0001, v0002, v0003 (newest)" in pi_ray("--version", "v0001")[1]
    assert (
        "v0001 answers; canary: v0002 answers 10 % of requests" in pi_ray("--version", "v0002", "--canary", "10%")[1]
    )
    assert "colours@staging: v0003 answers" in pi_ray("--version", "latest", "--alias", "staging")[1]
    assert "colours: v0001 answers\n" in pi_ray("--rollback")[1]
    assert pi_ray("--canary", "ten") == (2, "pi-ray: --canary ten: give a percentage between 0 and 100\n")
    assert json.loads((published / "colours" / "aliases.json").read_text())["prod"] == {
        "version": "v0001", "canary": "", "percent": 0.0, "before": [],
    }
