"""Bearer keys: what a keys file may hold, whose a key is, and that keys can be taken back while serving."""

import hashlib
import hmac
import json
import os
from pathlib import Path

import pytest

from pi_ray import cli
from pi_ray.config import RunConfig, ServeConfig, run_file
from pi_ray.errors import ConfigError
from pi_ray.serve.http import keys as module
from pi_ray.serve.http.keys import ApiKeys, key_digest, keys_file_line, new_key

ALL, SOME = "pr-for-everything", "pr-for-colours"


def write(tmp_path, content):
    file = tmp_path / "keys.yaml"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(file)


@pytest.fixture
def file(tmp_path):
    return write(tmp_path, keys_file_line(ALL, "ops", []) + "\n" + keys_file_line(SOME, "team-a", ["colours"]) + "\n")


def find(keys, key, scheme="Bearer"):
    return keys.find(f"{scheme} {key}".encode())


def test_find_returns_holder_and_allowed_models(file):
    keys = ApiKeys(key_digest("from-the-environment"), file)
    assert (find(keys, ALL).name, find(keys, SOME).name) == ("ops", "team-a")
    assert find(keys, ALL).allows("anything") and find(keys, "from-the-environment").allows("anything")
    assert find(keys, SOME).allows("colours") and not find(keys, SOME).allows("shapes")
    assert find(keys, SOME, "bearer") and not find(keys, SOME, "Basic")
    for wrong in ("", "x", SOME + "x", key_digest(SOME)):
        assert find(keys, wrong) is None


def test_keys_file_may_be_json_and_adapters_may_be_all_or_none(tmp_path):
    keys = ApiKeys(
        "",
        write(
            tmp_path,
            {key_digest(ALL): {"name": "ops", "adapters": "all"}, key_digest(SOME): {"name": "none", "adapters": []}},
        ),
    )
    assert find(keys, ALL).allows("x")
    assert not find(keys, SOME).allows("x")


def test_find_compares_every_key_in_constant_time(file, monkeypatch):
    """The time says neither which key it was nor how much of it was right."""
    compared = []
    monkeypatch.setattr(
        module.hmac, "compare_digest", lambda a, b, real=hmac.compare_digest: compared.append((a, b)) or real(a, b)
    )
    keys = ApiKeys(key_digest("one"), file)
    for given in (ALL, SOME, "one", "wrong"):
        compared.clear()
        find(keys, given)
        assert len(compared) == 3
        assert all(a == hashlib.sha256(given.encode()).hexdigest() for a, _ in compared)


def test_no_keys_are_falsy_but_an_empty_keys_file_admits_nobody(tmp_path):
    assert not ApiKeys()
    empty = ApiKeys("", write(tmp_path, "{}"))
    assert empty and find(empty, ALL) is None


def test_keys_file_is_read_again_and_kept_when_invalid_or_gone(file, tmp_path, caplog):
    keys = ApiKeys("", file)
    write(tmp_path, keys_file_line("new-key", "team-b", []))
    assert find(keys, ALL) is None and find(keys, "new-key").name == "team-b"
    write(tmp_path, "not: [valid")
    assert find(keys, "new-key").name == "team-b"
    assert "stay as they were" in caplog.text
    os.unlink(file)
    assert find(keys, "new-key").name == "team-b"


def test_keys_file_suffices_off_loopback_and_is_checked_at_the_start(file, tmp_path, monkeypatch):
    from pi_ray.serve.app import bearer_key

    monkeypatch.delenv("PI_RAY_API_KEY", raising=False)

    def config(keys_file):
        return RunConfig(name="t", serve=ServeConfig(host="0.0.0.0", keys_file=keys_file))

    assert bearer_key(config(file)) == ""
    for wrong in ("", str(tmp_path / "none.yaml")):
        with pytest.raises(ConfigError, match="keys_file"):
            bearer_key(config(wrong))
    assert run_file.parse_run_file("name: t\nserve: {keys_file: keys.yaml}", "t.yaml").serve.keys_file == str(
        Path.cwd() / "keys.yaml"
    )


def test_budgets_need_a_folder_where_they_are_counted(tmp_path, monkeypatch):
    from pi_ray.serve.app import bearer_key

    file = write(tmp_path, keys_file_line(ALL, "ops", [], monthly_tokens=5))
    with pytest.raises(ConfigError, match=r"serve\.usage_dir"):
        bearer_key(RunConfig(name="t", serve=ServeConfig(keys_file=file)))
    bearer_key(RunConfig(name="t", serve=ServeConfig(keys_file=file, usage_dir=str(tmp_path / "usage"))))


@pytest.mark.parametrize(("content", "message"), [
    ("- a", "expected lines"),
    ("a: [", "not valid YAML"),
    (SOME + ": {name: a}", "never as itself"),
    (key_digest(SOME).upper() + ": {name: a}", "64 lower-case"),
    ({key_digest(SOME): "team"}, "entry 1: expected {name"),
    ({key_digest(SOME): {"adapters": ["x"]}}, "entry 1: expected {name"),
    ({key_digest(SOME): {"name": "a", "adapter": ["x"]}}, "entry 1: expected {name"),
    ({key_digest(SOME): {"name": "a", "adapters": "colours"}}, "a list of names"),
    ({key_digest(SOME): {"name": "a", "adapters": [1]}}, "a list of names"),
    ({key_digest(SOME): {"name": "a", "rpm_limit": 0}}, "rpm_limit"),
])  # fmt: skip
def test_invalid_keys_file_error_names_the_file_and_hides_keys(tmp_path, content, message):
    with pytest.raises(ConfigError) as error:
        ApiKeys("", write(tmp_path, content))
    assert message in str(error.value) and "keys.yaml" in str(error.value)
    assert SOME not in str(error.value)


def test_missing_keys_file_error_names_the_key_command(tmp_path):
    with pytest.raises(ConfigError, match="pi-ray key"):
        ApiKeys("", str(tmp_path / "none.yaml"))


@pytest.mark.parametrize("limit", ["--rpm", "--tpm", "--monthly-tokens"])
def test_key_command_refuses_a_limit_below_one(limit, capsys):
    with pytest.raises(SystemExit):
        cli.main(["key", "team", limit, "0"])
    assert "pr-" not in capsys.readouterr().out


def test_key_command_prints_a_key_and_a_valid_keys_file_line(tmp_path, capsys):
    limits = ["--rpm", "60", "--tpm", "9000", "--monthly-tokens", "10", "--full-prompt"]
    assert cli.main(["key", "team a: 'x'", "--adapters", "colours", "shapes", *limits]) == 0
    _, key, _, made = capsys.readouterr().out.strip().split("\n")
    assert key.strip() not in made
    found = find(ApiKeys("", write(tmp_path, made.strip())), key.strip())
    assert (found.name, found.adapters) == ("team a: 'x'", {"colours", "shapes"})
    assert (found.rpm_limit, found.tpm_limit, found.monthly_tokens, found.full_prompt) == (60, 9000, 10, True)
    assert len({new_key() for _ in range(100)}) == 100
