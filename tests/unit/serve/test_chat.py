"""`pi-ray chat`: lines in, answers out, with what each took; the adapter is the one of a run or of the store, verified
as the server does it.
"""

import io
import re
import shutil
import sys

import pytest

from pi_ray import config as configuration
from pi_ray.config import ModelConfig, PromptConfig, RunConfig
from pi_ray.errors import AdapterError, ConfigError
from pi_ray.models import load_tokenizer
from pi_ray.protocols import Token
from pi_ray.run.directory import RunDir
from pi_ray.serve import chat
from pi_ray.serve.engine.completion import Completer
from tests.lora import put_in_store


@pytest.fixture(scope="module")
def store(tiny_model, tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    put_in_store(store, "colours", tiny_model, 1, max_answer_tokens=6)
    put_in_store(store, "shapes", tiny_model, 2, max_answer_tokens=6)
    return store


def run_chat(monkeypatch, target, typed, *overrides):
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    out = io.StringIO()
    chat.chat(str(target), overrides, out)
    return out.getvalue()


def answers(said):
    """(answer, its figures) for each query."""
    return re.findall(r"(?s)\n?([^\n]*)\n\[(.*?)\]\n", said.partition("Ctrl-C stops an answer.\n\n")[2])


def test_chat_answers_each_line_with_the_named_adapter_and_prints_token_counts(store, tiny_model, monkeypatch):
    said = answers(
        run_chat(monkeypatch, "colours", "what is red?\n\nwhat is red?\n/quit\nnever read\n", f"store={store}")
    )
    other = answers(run_chat(monkeypatch, "shapes", "what is red?\n", f"store={store}"))
    assert len(said) == 2 and len(other) == 1
    assert said[0][0] == said[1][0] != other[0][0]
    for _, figures in said + other:
        assert re.fullmatch(r"\d+ tokens in, \d+ out, 108 saved, \d+ ms", figures)


def test_chat_with_a_run_directory_uses_its_best_adapter(store, tiny_model, tmp_path, monkeypatch):
    run = RunDir(tmp_path / "run")
    config = RunConfig(
        name="mine", run_dir=str(run.root), store=str(tmp_path / "empty"), model=ModelConfig(base=str(tiny_model))
    )
    run.root.mkdir()
    (run.root / "run.yaml").write_text(configuration.dump_config(config))
    with pytest.raises(AdapterError, match="pi-ray train"):
        run_chat(monkeypatch, run.root, "")
    shutil.copytree(store / "colours" / "v0001", run.adapter(0))
    run.choose_best(0)
    own = answers(run_chat(monkeypatch, run.root, "what is red?\n"))
    published = answers(run_chat(monkeypatch, "colours", "what is red?\n", f"store={store}"))
    assert own[0][0] == published[0][0]


@pytest.mark.parametrize("name", ["unknown", "../colours", "colours/../shapes"])
def test_unknown_adapter_error_lists_the_store(store, name, monkeypatch):
    with pytest.raises(AdapterError, match="colours, shapes"):
        run_chat(monkeypatch, name, "", f"store={store}")


def test_chat_with_vllm_names_the_transformers_engine(store, monkeypatch):
    with pytest.raises(ConfigError, match=r"serve\.engine=transformers"):
        run_chat(monkeypatch, "colours", "", f"store={store}", "serve.engine=vllm")


class Interrupted:
    """Says one word, then a person presses Ctrl-C; later queries are answered."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.count = self.closed = 0

    async def generate(self, request):
        self.count += 1
        try:
            yield Token(self.tokenizer("Hello").input_ids[0])
            yield Token(self.tokenizer(" there").input_ids[0])
            if self.count == 1:
                raise KeyboardInterrupt
            yield Token(self.tokenizer.eos_token_id)
        finally:
            self.closed += 1


def test_chat_goes_on_after_ctrl_c_and_after_a_refused_query(store, tiny_model):
    config = RunConfig(
        name="t", store=str(store), model=ModelConfig(base=str(tiny_model)), prompt=PromptConfig(chat="chatml")
    )
    tokenizer = load_tokenizer(config.model)
    engine = Interrupted(tokenizer)
    completer = Completer(config, engine, tokenizer, 60)
    out = io.StringIO()
    chat.answer_queries(completer, "colours", iter(["first", "x " * 100, "last"]), out)
    said = out.getvalue()
    assert "[stopped]" in said and "the model's context holds 60" in said
    assert said.rstrip().endswith("ms]") and said.count("Hello") == 2
    assert engine.closed == 2
