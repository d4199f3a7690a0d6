"""Run files and overrides: whatever they hold, there is a config or a ConfigError, and a config survives its own text.
"""

from importlib.resources import files

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from pi_ray.config.run_file import parse_run_file
from pi_ray.errors import ConfigError
from tests.unit.property.strategies import changed, json_values, texts

DEMO = yaml.safe_load(files("pi_ray.cli").joinpath("demo.yaml").read_text(encoding="utf-8"))
TEXT = yaml.safe_dump(DEMO)
KEYS = [f"{block}.{key}" for block, keys in DEMO.items() if isinstance(keys, dict) for key in keys]


def parse_or_refuse(text, overrides=()):
    """The config, or None where it was refused in words."""
    try:
        return parse_run_file(text, "run.yaml", overrides)
    except ConfigError as error:
        assert str(error).strip()
        return None


@given(changed(DEMO))
def test_a_changed_run_file_is_read_or_refused(content):
    parse_or_refuse(yaml.safe_dump(content, allow_unicode=True))


@given(texts | st.text(st.sampled_from("a: -\n[]{}&*!|>'\"#%@`,?\t0.e"), max_size=60))
@example("[" * 5000)
@example("{a: " * 3000)
@example("a: &a [*a, *a]")
@example("<<: 1")
@example("? [1]\n: 2")
@example("!!python/object/apply:os.system [id]")
def test_any_text_is_read_or_refused(text):
    parse_or_refuse(text)


@given(st.lists(st.tuples(st.sampled_from(KEYS) | texts, texts).map("=".join) | texts, max_size=3))
@example(["0=x"])
@example([f"schedule.shots={10**400}"])
@example([f"schedule.phases={10**9}"])
@example([f"serve.max_new_tokens={10**400}"])
def test_any_override_is_read_or_refused(overrides):
    parse_or_refuse(TEXT, overrides)


@given(st.sampled_from(KEYS), json_values(4))
def test_a_config_is_the_same_when_it_is_read_again(key, value):
    config = parse_or_refuse(TEXT, [f"{key}={yaml.safe_dump(value)}"])
    if config is not None:
        assert parse_run_file(yaml.safe_dump(config.model_dump(mode="json")), "again.yaml") == config


def test_a_run_file_that_is_right_is_read():
    assert parse_or_refuse(TEXT).name == "demo"
    with pytest.raises(ConfigError, match="did you mean"):
        parse_run_file(yaml.safe_dump({**DEMO, "trian": {}}), "run.yaml")
