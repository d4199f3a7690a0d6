"""What stands in a bucket or an adapter's folder: cards, settings, manifests, weights; taken or refused by name."""

import json
import shutil

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pi_ray.config import PromptConfig
from pi_ray.conversation import check_tools
from pi_ray.errors import AdapterError, CorruptArtifactError
from pi_ray.run.artifact import MANIFEST, is_current, read_manifest, verify_artifact
from pi_ray.store.adapters import AdapterStore
from pi_ray.store.conversation_guard import ConversationGuard
from pi_ray.store.prompt_guard import PromptGuard, prompt_record
from pi_ray.store.verify import check_listed_files, verify_adapter
from tests.lora import card, put_in_store, rewrite
from tests.unit.property.strategies import changed, deep, json_values, texts

shared_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
TEMPLATE = "Answer with one code. " + " ".join(f"The code of colour {i} is k{i}." for i in range(40))
FORMS = [{"rate": 0.5, "text": " ".join(f"code colour {i} k{i}." for i in range(40))}]
ALIAS = {"version": "v0001", "canary": "v0001", "percent": 10.0, "before": ["v0001"]}
QUESTION = {"query": "what is red?", "expected": "k4", "source": "label", "answer": "k4", "right": True}
UNIT = {
    "section": "", "text": "The code of red is k4.", "kind": "rule", "rows": 3, "queries": 2, "sure": 1, "asked": 1,
    "agreed": 1, "examples": [QUESTION],
}
KNOWLEDGE = {"format": 1, "adapter_sha256": "0" * 64, "units": [UNIT]}
RECORD = prompt_record(TEMPLATE, FORMS, ["what is red?\nk4"])


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    folder = put_in_store(tmp_path_factory.mktemp("store"), "colours", tiny_model)
    rewrite(folder, "prompt.json", RECORD)
    rewrite(folder, "knows.json", KNOWLEDGE)
    verify_adapter(folder)
    return folder


def with_file(adapter, folder, name, content):
    """A copy of the adapter with another content of one file, as its manifest says."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(adapter, folder)
    rewrite(folder, name, content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


@shared_folder
@given(st.data())
def test_a_changed_file_of_an_adapter_is_taken_or_refused_by_name(adapter, tmp_path, data):
    name = data.draw(st.sampled_from(("pi_ray.json", "adapter_config.json", "prompt.json", "knows.json")))
    content = data.draw(changed(json.loads((adapter / name).read_bytes())) | st.binary(max_size=40))
    try:
        verify_adapter(with_file(adapter, tmp_path / "a", name, content))
    except AdapterError as error:
        assert str(error)


@shared_folder
@given(st.data())
def test_a_changed_file_of_a_store_is_followed_or_refused(adapter, tmp_path, data):
    store = tmp_path / "store"
    shutil.rmtree(store, ignore_errors=True)
    shutil.copytree(adapter, store / "colours" / "v0001")
    valid = {"latest.json": {"version": "v0001"}, "aliases.json": {"prod": ALIAS, "stable": ALIAS}}
    for name, content in valid.items():
        found = data.draw(st.just(content) | changed(content))
        written = data.draw(st.just(json.dumps(found).encode()) | st.binary(max_size=30))
        (store / "colours" / name).write_bytes(written)
    opened, there = AdapterStore(store), set(tmp_path.rglob("*"))
    for ask in ("colours", "colours@stable", "colours@v0001", "colours@latest"):
        try:
            assert opened.open(ask).name == "colours"
        except AdapterError as error:
            assert str(error)
    assert set(tmp_path.rglob("*")) == there


@shared_folder
@given(st.data())
def test_changed_weights_are_taken_or_refused(adapter, tmp_path, data):
    weights = bytearray((adapter / "adapter_model.safetensors").read_bytes())
    head = int.from_bytes(weights[:8], "little") + 8
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, head) | st.integers(0, len(weights) - 1))
        weights[place % len(weights)] = data.draw(st.integers(0, 255))
    cut = data.draw(st.none() | st.integers(0, len(weights)))
    try:
        verify_adapter(with_file(adapter, tmp_path / "a", "adapter_model.safetensors", bytes(weights[:cut])))
    except AdapterError as error:
        assert str(error)


@given(st.data())
def test_a_changed_manifest_is_taken_or_refused(adapter, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "manifest"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(adapter, folder)
    valid = json.loads((folder / MANIFEST).read_bytes())
    content = data.draw(changed(valid).map(lambda v: json.dumps(v).encode()) | st.binary(max_size=40))
    (folder / MANIFEST).write_bytes(content)
    for use in (read_manifest, verify_artifact, lambda path: is_current(path, "x")):
        try:
            use(folder)
        except CorruptArtifactError as error:
            assert str(folder) in str(error)
    for use in (lambda: verify_adapter(folder), lambda: check_listed_files(content)):
        try:
            use()
        except AdapterError as error:
            assert str(error)


@given(texts | st.text(st.sampled_from("./@:a-Z0\\\0%~"), max_size=20))
@example("../x@v0001")
def test_any_name_of_an_adapter_is_found_or_refused(adapter, name):
    store = AdapterStore(str(adapter.parent.parent))
    try:
        found = store.open(name)
    except AdapterError as error:
        assert str(error)
    else:
        assert found.path.resolve().is_relative_to(adapter.parent.parent.resolve())


@given(texts, texts, st.lists(st.tuples(st.sampled_from(("user", "assistant")), texts), max_size=4))
@example("", TEMPLATE, [])
@example(TEMPLATE, "what is blue?", [("user", "what is red?"), ("assistant", "k4")])
def test_the_guard_answers_for_any_request(system, query, turns):
    result = PromptGuard(RECORD, PromptConfig()).inspect(system, query, turns)
    assert result.kind in ("internalised", "stripped", "drifted", "unknown") and isinstance(result.text, str)


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=60).filter(lambda text: text.strip()))
def test_the_prompt_is_taken_from_before_any_query(query):
    guard = PromptGuard(RECORD, PromptConfig())
    for system, sent in ((TEMPLATE, query), (FORMS[0]["text"], query), ("", f"{TEMPLATE}\n\n{query}")):
        result = guard.inspect(system, sent)
        assert (result.kind, result.text.strip()) == ("stripped", query.strip())


@given(texts, texts, st.text(st.characters(codec="utf-8"), min_size=1, max_size=60).filter(lambda text: text.strip()))
def test_any_values_of_a_prompt_are_found_in_it(time, town, query):
    record = prompt_record("It is {time} in {town}, says the clock. Write the code.", [], [], ["time", "town"])
    prompt = record["template"].replace("{town}", town).replace("{time}", time)
    seen = PromptGuard(record, PromptConfig()).inspect(prompt, query)
    if " in " not in time and ", says the clock. Write the code." not in town:
        assert seen.kind == "stripped" and seen.text.endswith(query.strip())


@given(texts, changed([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]))
def test_the_guard_of_conversations_knows_other_tools(system, tools):
    record = {"template": "Be brief.", "compressed": []}
    try:
        check_tools(tools)
    except ValueError:  # as the server refuses them
        return
    kind, _ = ConversationGuard(record).inspect(system, tools)
    assert kind == "internalised" if not system and not tools else kind in ("stripped", "drifted")


def test_a_card_of_a_deep_value_is_refused(adapter, tmp_path):
    deeply = json.dumps({**card("x"), "more": 0}).replace('"more": 0', f'"more": {"[" * 9000}{"]" * 9000}')
    with pytest.raises(AdapterError, match=r"pi_ray\.json"):
        verify_adapter(with_file(adapter, tmp_path / "a", "pi_ray.json", deeply.encode()))
    (tmp_path / "a" / MANIFEST).write_bytes(("[" * 9000 + "]" * 9000).encode())
    with pytest.raises(CorruptArtifactError):
        read_manifest(tmp_path / "a")
    assert deep(1) == [[]] and json_values() is not None
