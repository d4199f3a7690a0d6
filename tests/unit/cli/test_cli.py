"""The command `pi-ray`: its help, its verbs, and typos in them."""

import json
import os
import re
import subprocess
import sys

import pytest

from pi_ray import __version__, cli

SECURED = """
import json, sys
from pi_ray.cluster import auth
from pi_ray.cli import ON_RAY, main
from pi_ray.errors import ClusterError
seen = []
def secure_session(address):
    seen.append([address, sorted(m for m in sys.modules if m.split(".")[0] == "ray")])
    raise ClusterError("seen")
auth.secure_session = secure_session
for verb in sorted(ON_RAY):
    main([verb, *(["x"] if verb != "demo" else [])])
print(json.dumps([sorted(ON_RAY), seen]))
"""


def printed(capsys, *words):
    with pytest.raises(SystemExit) as done:
        cli.main(words)
    out, err = capsys.readouterr()
    return done.value.code, out + err


def test_help_lists_each_verb_once_by_purpose_on_one_line(capsys):
    code, text = printed(capsys, "--help")
    assert code == 0 and all(len(line) <= 120 for line in text.splitlines())
    assert sorted(verb for verbs in cli.GROUPS.values() for verb in verbs) == sorted(cli.VERBS)
    for name, verb in cli.VERBS.items():
        assert len(re.findall(rf"^  {name} +{re.escape(verb.help)}$", text, flags=re.M)) == 1


@pytest.mark.parametrize("verb", cli.VERBS)
def test_each_verb_explains_itself(verb, capsys):
    code, text = printed(capsys, verb, "--help")
    assert code == 0 and text.startswith(f"usage: pi-ray {verb}")


def test_version(capsys):
    assert printed(capsys, "--version") == (0, f"pi-ray {__version__}\n")


@pytest.mark.parametrize("word, message", [
    ("trian", "unknown verb 'trian'; did you mean 'train'?"),
    ("zzz", "unknown verb 'zzz'; see pi-ray --help"),
])  # fmt: skip
def test_a_typo_in_a_verb_names_the_closest_one(word, message, capsys):
    code, text = printed(capsys, word, "run.yaml")
    assert code == 2 and message in text


def test_a_typo_in_a_key_names_the_closest_one(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("name: a")
    assert cli.main(["show", str(tmp_path / "run.yaml"), "train.lrr=1"]) == 2
    assert "unknown key 'train.lrr'; did you mean 'train.lr'?" in capsys.readouterr().err


def test_verbs_that_start_ray_have_secured_its_session_before_they_import_it():
    """In a process of its own, since Ray keeps the RAY_AUTH_MODE that it finds first."""
    run = {"capture_output": True, "text": True, "check": True, "env": {**os.environ, "RAY_ADDRESS": "10.1.2.3:6379"}}
    verbs, seen = json.loads(subprocess.run([sys.executable, "-c", SECURED], **run).stdout)
    assert seen == [["10.1.2.3:6379", []]] * len(verbs) and {"run", "demo", "bake", "serve"} < set(verbs)


@pytest.mark.parametrize("verb", sorted(set(cli.VERBS) - cli.ON_RAY))
def test_verbs_without_ray_work_whatever_cluster_is_named(verb, monkeypatch):
    """Only a verb that would join the cluster is refused for want of a token."""
    monkeypatch.setattr("pi_ray.cluster.auth.secure_session", lambda address: pytest.fail("asked"))
    monkeypatch.setitem(cli.VERBS, verb, cli.VERBS[verb]._replace(function=lambda args: None))
    words = {"release": ["a"], "key": ["a"], "logs": ["a"], "stop": ["a"], "neighbours": ["a", "--row", "1"],
        "render": ["k8s", "a"]}
    monkeypatch.setattr(cli.requirements, "check_requirements", lambda: None)
    assert cli.main([verb, *words.get(verb, [] if verb in ("doctor", "status", "schema") else ["a"])]) == 0


def test_a_reader_that_has_read_enough_is_no_error():
    command = [sys.executable, "-m", "pi_ray.cli", "schema"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as printing:
        assert printing.stdout.readline() == "{\n"
        printing.stdout.close()
        assert printing.stderr.read() == "" and printing.wait() == 141
