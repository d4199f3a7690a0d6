"""The adapter store: which names reach the disk, and which folders are refused (fault tests A1 and A2)."""

import builtins
import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest

from pi_ray.config import ModelConfig
from pi_ray.errors import AdapterError
from pi_ray.run.artifact import seal_folder
from pi_ray.serve.engine.completion import requested_adapter
from pi_ray.store.adapters import AdapterStore, StoreUnavailableError, UnknownAdapterError
from pi_ray.store.prompt_guard import prompt_record
from tests.lora import card, put_in_store, rewrite

HOSTILE_NAMES = [
    "", "..", "../x", "/etc", "/etc/passwd", "a/../../b", "a%2f..", "a\x00b", ".hidden", "tiny:..", "x" * 300,
    "аdapter", "ａ", "a;rm -rf ~", "A", "a b", "a\n", "-a",
    "a@", "a@../v1", "a@v1", "a@v0001/../..", "a@v0001\n", "a\\..\\b", "~", "$HOME", "a\ud800", "a@.prod", "a@PROD",
    "a@prod/x", "a@latest.json", "a@" + "p" * 33, "a@b@c",
]  # fmt: skip


@pytest.fixture(scope="module")
def published(tiny_model, tmp_path_factory):
    return put_in_store(tmp_path_factory.mktemp("store"), "colours", tiny_model)


@pytest.fixture
def store(published, tiny_model, tmp_path):
    shutil.copytree(published.parents[1], tmp_path / "store")
    return AdapterStore(tmp_path / "store", ModelConfig(base=str(tiny_model)))


@pytest.fixture
def folder(store):
    return store.backend.root / "colours" / "v0001"


@pytest.fixture
def no_disk(monkeypatch):
    """Counts every call that touches the file system."""
    calls = []

    def count(module, name):
        monkeypatch.setattr(
            module, name,
            lambda *a, **k: calls.append((name, a)) or (_ for _ in ()).throw(AssertionError(f"{name} was called")),
        )

    for name in ("open", "stat", "lstat", "scandir", "listdir", "readlink"):
        count(os, name)
    count(os.path, "realpath")
    count(builtins, "open")
    return calls


@pytest.mark.fault
@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=repr)
def test_a_forbidden_name_is_refused_before_the_disk_is_touched(store, no_disk, name):
    with pytest.raises(UnknownAdapterError):
        store.open(name)
    assert no_disk == []


@pytest.mark.fault
def test_a_forbidden_name_behind_the_base_models_name_stays_forbidden(store, no_disk):
    with pytest.raises(UnknownAdapterError):
        store.open(requested_adapter("smollm2-135m:..", "smollm2-135m"))
    assert no_disk == []


def test_a_model_field_names_the_adapter_alone_behind_the_base_or_the_base():
    assert requested_adapter("colours", "smollm2-135m") == "colours"
    assert requested_adapter("smollm2-135m:colours", "smollm2-135m") == "colours"
    assert requested_adapter("smollm2-135m", "smollm2-135m") is None
    assert requested_adapter("model", "/some/where/model") is None


def test_an_adapter_opens_by_name_and_by_version(store, folder, tiny_model):
    assert store.names() == ["colours"]
    adapter = store.open("colours")
    assert (adapter.name, adapter.version, adapter.path) == ("colours", "v0001", Path(os.path.realpath(folder)))
    assert adapter.card == card(tiny_model)
    assert store.open("colours@v0001") is adapter
    for unknown in ("colours@v0002", "shapes"):
        with pytest.raises(UnknownAdapterError):
            store.open(unknown)


def test_an_empty_store_has_no_names(tmp_path):
    assert AdapterStore(tmp_path / "none").names() == []


def test_a_changed_file_is_noticed_after_the_adapter_was_verified(store, folder):
    store.open("colours")
    data = bytearray((folder / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "adapter_model.safetensors").write_bytes(data)
    refused(store, "sha256")


def test_the_hash_of_an_adapter_follows_its_content(store, folder, tiny_model):
    before = store.open("colours")
    put_in_store(store.backend.root, "colours", tiny_model, seed=1)  # the same again: another folder, equal content
    assert store.open("colours").hash == before.hash
    put_in_store(store.backend.root, "colours", tiny_model, seed=2)
    assert store.open("colours").hash != before.hash


def test_a_folder_replaced_while_it_is_verified_is_not_served(store, folder, tiny_model, monkeypatch):
    from pi_ray.store import adapters

    def replace_after(path, base, real=adapters.verify_adapter):
        found = real(path, base)
        put_in_store(store.backend.root, "colours", tiny_model, seed=2)
        return found

    monkeypatch.setattr(adapters, "verify_adapter", replace_after)
    with pytest.raises(StoreUnavailableError, match="replaced"):
        store.open("colours")
    monkeypatch.undo()
    assert store.open("colours").name == "colours"


def refused(store, reason):
    with pytest.raises(AdapterError, match=reason) as error:
        store.open("colours")
    assert str(store.backend.root) not in str(error.value)  # the message goes to clients


@pytest.mark.fault
def test_links_that_lead_out_of_the_store_are_refused(store, folder, tmp_path):
    shutil.move(folder, tmp_path / "outside")
    folder.symlink_to(tmp_path / "outside")
    refused(store, "leads out")
    folder.unlink()
    shutil.move(tmp_path / "outside", folder)
    shutil.move(folder / "pi_ray.json", tmp_path / "card.json")
    (folder / "pi_ray.json").symlink_to(tmp_path / "card.json")
    refused(store, "not a plain file")
    shutil.rmtree(store.backend.root / "colours")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "latest.json").write_text('{"version": "v0001"}')
    (store.backend.root / "colours").symlink_to(tmp_path / "other")
    refused(store, "leads out")
    assert store.names() == []


def test_a_refusal_is_remembered_until_the_folder_changes(store, folder, monkeypatch):
    """Asking for a damaged adapter again and again must not hash it again and again."""
    from pi_ray.store import adapters

    seen = []
    monkeypatch.setattr(
        adapters, "verify_adapter",
        lambda path, base, real=adapters.verify_adapter: seen.append(path) or real(path, base),
    )
    (folder / "x.bin").write_bytes(b"")
    for _ in range(3):
        refused(store, r"x\.bin")
    (folder / "x.bin").unlink()
    assert store.open("colours").name == "colours"
    assert len(seen) == 2


PROMPT = prompt_record("The template.", [{"rate": 0.5, "text": "template."}], ["red\nk4"])


def test_a_published_prompt_is_known_and_an_adapter_without_one_is_served_as_well(store, folder):
    assert store.open("colours").guard is None
    rewrite(folder, "prompt.json", PROMPT)
    assert store.open("colours").guard.inspect("The\ntemplate.", "red").kind == "stripped"


@pytest.mark.fault
@pytest.mark.parametrize(
    "data",
    [
        {}, {**PROMPT, "template": "Another."}, {**PROMPT, "examples": [1]},
        {**PROMPT, "compressed": [{"rate": 2, "text": ""}]}, b"[]", b"[" * 100_000,
    ],
)
def test_a_prompt_file_that_publishing_did_not_write_is_refused(store, folder, data):
    rewrite(folder, "prompt.json", data)
    refused(store, r"prompt\.json")


def test_latest_must_name_a_version(store):
    (store.backend.root / "colours" / "latest.json").write_text('{"version": "../../x"}')
    refused(store, "names no version")


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.fault
@pytest.mark.parametrize("file", ["adapter_model.bin", "adapter_model.pt", "x.pkl", "weights"])
def test_a_pickle_is_refused_and_never_opened(store, folder, tmp_path, file):
    rewrite(folder, file, pickle.dumps(Canary(tmp_path / "canary")))
    refused(store, "only .*safetensors")
    assert not (tmp_path / "canary").exists()


@pytest.mark.fault
def test_a_pickle_under_the_name_of_safetensors_is_refused(store, folder, tmp_path):
    rewrite(folder, "adapter_model.safetensors", pickle.dumps(Canary(tmp_path / "canary")) * 100)
    refused(store, "header claims")
    assert not (tmp_path / "canary").exists()


def safetensors(tensors, metadata_length=None):
    """Bytes of a file with `tensors`: name -> (dtype, shape, data)."""
    header, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if metadata_length is None else metadata_length) + text + data


A, B = (
    "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight",
    "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight",
)


def pair(a=("F32", [4, 32], b"\0" * 512), b=("F32", [64, 4], b"\0" * 1024)):
    return {A: a, B: b}


NAN = struct.pack("<f", float("nan")) * 128


@pytest.mark.fault
@pytest.mark.parametrize(("data", "reason"), [
    (safetensors(pair(), metadata_length=2**60), "header claims"),
    (safetensors(pair(), metadata_length=2**64 - 1), "header claims"),
    (b"", "header too small"),
    (safetensors(pair())[:-1], "file not fully covered"),
    (safetensors(pair()) + b"x", "file not fully covered"),
    (safetensors(pair(a=("F32", [8, 32], b"\0" * 1024))), "has rank 8"),
    (safetensors(pair(a=("F32", [4, 32, 1], b"\0" * 512))), "not a matrix"),
    (safetensors(pair(a=("F32", [4, -32], b"\0" * 512))), "invalid value: integer `-32`"),
    (safetensors(pair(a=("F32", [4, 2**30], b"\0" * 512))), "invalid shape"),
    (safetensors(pair(a=("F32", [4, 0], b""))), "not a matrix"),
    (safetensors(pair(a=("I32", [4, 32], b"\0" * 512))), "dtype I32"),
    (safetensors(pair(a=("F32", [4, 32], NAN))), "NaN"),
    (safetensors({A: pair()[A]}), "pairs"),
    (safetensors({}), "pairs"),
    (safetensors({**pair(), "base_model.model.lm_head.weight": ("F32", [1, 1], b"\0" * 4)}), "not a LoRA matrix"),
    (struct.pack("<Q", 200_000) + b"[" * 200_000, "invalid JSON in header"),
])  # fmt: skip
def test_weights_that_are_not_a_lora_of_the_declared_rank_are_refused(store, folder, data, reason):
    rewrite(folder, "adapter_model.safetensors", data)
    refused(store, reason)


@pytest.mark.fault
@pytest.mark.parametrize(("changes", "reason"), [
    ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
    ({"auto_mapping": {"base_model_class": "X"}}, "auto_mapping"),
    ({"megatron_config": {"x": 1}}, "megatron_config"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"rank_pattern": {"(a+)+$": 4}}, "rank_pattern"),
    ({"target_modules": "(a+)+$"}, "target_modules must be a list of names"),
    ({"target_modules": ["q_proj", "(a+)+$"]}, "target_modules must be a list of names"),
    ({"target_modules": None}, "target_modules must be a list of names"),
    ({"peft_type": "IA3"}, "peft_type"),
    ({"r": 8}, "has rank 4"),
    ({"r": True}, "r: Input should be a valid integer"),
    ({"lora_alpha": float("inf")}, "lora_alpha"),
])  # fmt: skip
def test_a_config_that_asks_for_more_than_lora_is_refused(store, folder, changes, reason):
    rewrite(folder, "adapter_config.json", {**json.loads((folder / "adapter_config.json").read_text()), **changes})
    refused(store, reason)


@pytest.mark.fault
@pytest.mark.parametrize(("changes", "reason"), [
    ({"base": "smollm2-135m"}, "another base model"),
    ({"prompt": {"chat": "evil"}}, r"prompt\.chat"),
    ({"prompt": {"unknown": 1}}, r"prompt\.unknown"),
    ({"template": None}, "template"),
    ({"max_answer_tokens": 0}, "max_answer_tokens"),
    ({"full_prompt_tokens": float("nan")}, "full_prompt_tokens: Input should be less"),
    ({"query_prompt_tokens": -1}, "query_prompt_tokens: .*greater than or equal to 0"),
    ({"full_prompt_tokens": 10**400}, "full_prompt_tokens: .*valid number"),
    ({"prompt": {"query": "{query}" * 1000}}, "multiplies the query"),
    ({"prompt": {"example": "{query}" + "{answer}" * 1000}}, "multiplies the query"),
    ({"prompt": {"examples_heading": "x" * 200_000}}, "multiplies the query"),
    ({"gist": 4}, "gist tokens"),
    ({"base_content": "0" * 64}, "other weights of its base model, which were replaced since"),
])  # fmt: skip
def test_a_card_that_does_not_fit_is_refused(store, folder, tiny_model, changes, reason):
    rewrite(folder, "pi_ray.json", card(tiny_model, **changes))
    refused(store, reason)


@pytest.mark.fault
def test_the_manifest_must_list_exactly_the_files(store, folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "extra.json").write_text("{}")
    refused(store, "exactly")
    (folder / "extra.json").unlink()
    manifest["files"]["../../../secret.json"] = {"sha256": "0" * 64}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    refused(store, "exactly")
    (folder / "manifest.json").unlink()
    refused(store, "missing")


@pytest.mark.fault
def test_a_refused_adapter_leaves_the_others_alone(store, folder, tiny_model):
    put_in_store(store.backend.root, "shapes", tiny_model, seed=2)
    (folder / "evil.bin").write_bytes(b"x")
    seal_folder(folder)
    refused(store, "only")
    assert store.open("shapes").name == "shapes"
