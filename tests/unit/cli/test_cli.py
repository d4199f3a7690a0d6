"""The command `pi-ray`: its help, its verbs, and typos in them."""

import re

import pytest

from pi_ray import __version__, cli


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
