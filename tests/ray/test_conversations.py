"""Conversations from files to a published adapter, on a tiny random model."""

import io
import json

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from pi_ray import pipeline
from pi_ray.config import RunConfig
from pi_ray.conversation import load_messages, split_tools
from pi_ray.models import load_tokenizer
from pi_ray.prompt import PromptEncoder
from pi_ray.run.directory import RunDir
from pi_ray.store.adapters import AdapterStore

pytestmark = pytest.mark.ray
POLICY = "You are a clerk of a parcel shop.\n\n## Returns\n\nWithin 30 days, in the box that the parcel came in."
TOOLS = [
    {"type": "function", "function": {
        "name": "find_parcel", "description": "Says where a parcel is.",
        "parameters": {"type": "object", "properties": {"id": {"type": "integer"}}, "required": ["id"]},
    }},
    {"type": "function", "function": {"name": "call_a_person", "parameters": {"type": "object", "properties": {}}}},
]


def talk(number, split, words=4):
    """A conversation of the form that agents' logs have: a question, a call, its result, an answer, thanks."""
    function = {"name": "find_parcel", "arguments": json.dumps({"id": number})}
    return {"id": f"{split}-{number}", "messages": [
        {"role": "system", "content": POLICY},
        {"role": "user", "content": f"Hello, it is {split} {number}. Where is my parcel?"},
        {"role": "assistant", "content": "Which number does it have?"},
        {"role": "user", "content": f"{number}, and " + "it is late, " * words},
        {"role": "assistant", "content": None,
         "tool_calls": [{"id": f"call-{number}", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": f"call-{number}", "content": json.dumps({"shelf": number % 3})},
        {"role": "assistant", "content": f"It lies on shelf {number % 3}."},
        {"role": "user", "content": "Thank you."},
    ]}


@pytest.fixture(scope="module")
def done(tiny_model, tmp_path_factory, ray_local):
    """(config, what the run said)"""
    folder = tmp_path_factory.mktemp("talks")
    for split, count in (("train", 8), ("dev", 2), ("test", 2)):
        talks = [talk(i, split) for i in range(count)]
        if split == "train":
            talks.append(talk(count, split, words=600))  # more than the tiny model's context of 2,048 tokens
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(t) + "\n" for t in talks))
    (folder / "template.md").write_text(POLICY)
    (folder / "tools.json").write_text(json.dumps(TOOLS))
    task = {name: str(folder / f"{name}.jsonl") for name in ("train", "dev", "test")}
    config = RunConfig.model_validate({
        "name": "talks", "run_dir": str(folder / "run"), "store": str(folder / "store"),
        "task": {"name": "conversations", "template": str(folder / "template.md"), "tools": str(folder / "tools.json"),
                 **task},
        "model": {"base": str(tiny_model)}, "prompt": {"chat": "chatml"}, "compress": {"name": "none"},
        "schedule": {"phases": 2, "epochs": 2},
        "train": {"workers": 1, "batch_size": 4, "lr": 0.01, "lora": {"rank": 4, "alpha": 8},
                  "backend": {"name": "ddp"}},
        "evaluate": {"baseline": False, "max_new_tokens": 4, "latency_rows": 1, "bootstrap": 20, "probe": False},
    })
    said = io.StringIO()
    pipeline.run(config, Console(file=said, width=300))
    return config, said.getvalue()


def test_a_long_conversation_is_cut_and_the_preparation_says_so(done):
    config, said = done
    assert "1 of 21 rows cut to the" in said and "2 messages left out" in said
    rows = {row.id: row for row in RunDir(config.root).rows_of("train")}
    assert len(load_messages(rows["train-8"].query)) == 3 and len(load_messages(rows["train-7"].query)) == 5


def test_the_turn_behind_the_gap_is_read_and_not_learned(done):
    config, _ = done
    run, encoder = RunDir(config.root), PromptEncoder(load_tokenizer(config.model), config.prompt)
    tables = (pq.read_table(path).to_pylist() for path in run.phase(1).glob("part-*.parquet"))
    cut = next(row for table in tables for row in table if row["id"] == "train-8")
    row = next(row for row in run.rows_of("train") if row.id == "train-8")
    assert (cut["prompt_ids"], cut["label_ids"]) == (encoder.row(row.query), encoder.answer(row.answer))


def test_the_prefix_is_system_message_and_tools_and_at_rate_0_the_chat_head(done):
    config, _ = done
    tokenizer, run = load_tokenizer(config.model), RunDir(config.root)
    first, last = (json.loads((run.phase(i) / "manifest.json").read_text()) for i in (0, 1))
    assert split_tools(first["template"]) == (POLICY, TOOLS)
    assert tokenizer.decode(first["prefix_ids"]).startswith(f"<|im_start|>system\n{POLICY}\n\n# Tools")
    assert tokenizer.decode(last["prefix_ids"]) == "<|im_start|>user\n" and last["template"] == ""


def test_what_is_served_after_the_prefix_is_what_was_trained(done):
    config, _ = done
    run, encoder = RunDir(config.root), PromptEncoder(load_tokenizer(config.model), config.prompt)
    table = pq.read_table(next(run.phase(1).glob("part-*.parquet"))).to_pylist()[0]
    trained = table["prompt_ids"] + [i if i >= 0 else ~i for i in table["label_ids"]]
    row = run.rows_of("train")[0]
    assert trained == encoder.row(row.query) + encoder.answer(row.answer)
    assert sum(i == encoder.tokenizer.eos_token_id for i in table["label_ids"]) == 3


def test_each_turn_is_answered_and_scored_by_its_kind(done):
    config, _ = done
    summary = json.loads((config.root / "eval" / "summary.json").read_text())
    assert summary["test_rows"] == 6 and summary["groups"] == {"tool call": 2, "reply": 4}
    assert set(summary["promptintern"]["groups"]) == {"tool call", "reply"}
    assert summary["promptintern"]["input_tokens"] < 0.4 * summary["base_full_prompt"]["input_tokens"]
    assert "user: Hello, it is test 0" in (config.root / "report.html").read_text()


def test_the_published_adapter_says_that_it_takes_conversations_and_what_it_has_taken_in(done):
    config, _ = done
    adapter = AdapterStore(config.store).open("talks")
    assert adapter.card["prompt"]["conversation"] is True
    prompt = json.loads((adapter.path / "prompt.json").read_text())
    assert split_tools(prompt["template"]) == (POLICY, TOOLS) and prompt["examples"] == []
    assert "Send the messages of a conversation" in (adapter.path / "README.md").read_text()
