"""Tools and formats of answers, through the openai client: a random model whose calls are forced, in a loop that runs
them, by the base model and by an adapter that was trained on conversations.
"""

import asyncio
import json
import threading
from contextlib import asynccontextmanager
from typing import Literal

import httpx
import openai
import pytest
from pydantic import BaseModel, Field

from pi_ray import prompt
from pi_ray.config import ModelConfig, PromptConfig, RunConfig, ServeConfig
from pi_ray.conversation import dump_messages, join_tools, render_tool_calls
from pi_ray.models import load_tokenizer
from pi_ray.prompt import PromptEncoder, content_ids
from pi_ray.protocols import Token
from pi_ray.serve.engine import prompt_reader
from pi_ray.serve.engine.completion import Completer
from pi_ray.serve.engine.engine import TransformersEngine
from pi_ray.serve.engine.refusal import RefusedError
from pi_ray.serve.engine.request import CompletionRequest
from pi_ray.serve.http.api import create_api
from pi_ray.store.prompt_guard import prompt_record
from tests.lora import put_in_store, rewrite

SYSTEM = "You are an agent of a weather station. Answer with what the tools say."
QUESTION = {"role": "user", "content": "How warm is it in Oslo?"}
WORDING = {"chat": "chatml", "conversation": True}
CONTEXT = 4096


def tool(name, **properties):
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "parameters": schema, "strict": True}}


TOOLS = [
    tool("weather", city={"enum": ["Oslo", "Rome"]}, day={"type": "integer", "minimum": 0, "maximum": 6}),
    tool("add", a={"type": "integer", "minimum": 0, "maximum": 9}, b={"type": "integer", "minimum": 0, "maximum": 9}),
]
RUN = {"weather": lambda city, day: f"{len(city) + day} degrees", "add": lambda a, b: a + b}


class Report(BaseModel):
    city: Literal["Oslo", "Rome"]
    degrees: int = Field(ge=-40, le=40)
    sunny: bool


class Local:
    base = "base"

    def __init__(self, completer):
        self.complete, self.store = completer.complete, completer.store


class Says:
    """An engine that says one text, and keeps the requests."""

    def __init__(self, tokenizer, text):
        self.ids, self.requests = [*tokenizer(text).input_ids, tokenizer.eos_token_id], []

    async def generate(self, request):
        self.requests.append(request)
        for token in self.ids[: request.max_new_tokens]:
            yield Token(token)


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(ModelConfig(base=str(tiny_model)))


@pytest.fixture(scope="module")
def config(tiny_model, tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    put_in_store(store, "queries", tiny_model)
    agent = put_in_store(
        store, "agent", tiny_model, 2, prompt=WORDING, full_prompt_tokens=500.0, query_prompt_tokens=40.0,
        max_answer_tokens=40,
    )
    rewrite(agent, "prompt.json", prompt_record(join_tools(SYSTEM, TOOLS), [], []))
    put_in_store(store, "unguarded", tiny_model, 2, prompt=WORDING)
    toolless = put_in_store(store, "toolless", tiny_model, 2, prompt=WORDING)
    rewrite(toolless, "prompt.json", prompt_record(SYSTEM, [], []))
    dated = put_in_store(store, "dated", tiny_model, 2, prompt=WORDING, full_prompt_tokens=500.0)
    rewrite(dated, "prompt.json", prompt_record(join_tools(f"It is {{time}}. {SYSTEM}", TOOLS), [], [], ["time"]))
    return RunConfig(
        name="t", store=str(store), model=ModelConfig(base=str(tiny_model)), prompt=PromptConfig(chat="chatml"),
        serve=ServeConfig(max_new_tokens=1000),
    )


@pytest.fixture(scope="module")
def engine(tiny_model):
    engine = TransformersEngine(ModelConfig(base=str(tiny_model)), ServeConfig())
    yield engine
    engine.close()


@asynccontextmanager
async def client(config, engine, tokenizer):
    api = create_api(Local(Completer(config, engine, tokenizer, CONTEXT)), ServeConfig())
    transport = httpx.ASGITransport(app=api, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        yield openai.AsyncOpenAI(base_url="http://localhost/v1", api_key="none", http_client=http, max_retries=0)


@pytest.fixture
def use(config, engine, tokenizer):
    """Runs what is to be done with a client. `says`: the text of every answer, in place of the model's own."""

    def use(work, says=None):
        asked = engine if says is None else Says(tokenizer, says)

        async def run():
            async with client(config, asked, tokenizer) as api:
                return await work(api)

        return asyncio.run(run()), asked

    return use


@pytest.fixture
def ask(use, tiny_model):
    """The raw response to a chat, and the engine."""

    def ask(messages=(QUESTION,), model="agent", says=None, **rest):
        body = {"model": tiny_model.name if model == "base" else model, "messages": list(messages), **rest}
        return use(lambda api: api._client.post("/v1/chat/completions", json=body), says)

    return ask


async def collect(api, streams, **body):
    """The whole message and how it ended, streamed or not."""
    if not streams:
        choice = (await api.chat.completions.create(**body)).choices[0]
        return choice.message, choice.finish_reason
    stream = api.chat.completions.stream(**body)  # the client joins the deltas
    try:
        async with stream as events:
            choice = (await events.get_final_completion()).choices[0]
    except openai.LengthFinishReasonError as cut:
        choice = cut.completion.choices[0]
    return choice.message, choice.finish_reason


async def run_tools(api, model, streams):
    """A conversation in which the model calls tools twice, and then has to speak."""
    messages = [dict(QUESTION)]
    for choice in ("required", {"type": "function", "function": {"name": "add"}}, "none"):
        message, finish = await collect(
            api, streams, model=model, messages=messages, tools=TOOLS, tool_choice=choice,
            max_tokens=20 if choice == "none" else 900,
        )
        if choice == "none":
            return messages, message, finish
        assert finish == "tool_calls" and not message.content
        calls = [call.model_dump(include={"id": True, "type": True, "function": {"name", "arguments"}})
                 for call in message.tool_calls]
        messages.append({"role": "assistant", "content": None, "tool_calls": calls})
        for call in message.tool_calls:
            result = RUN[call.function.name](**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": str(result)})
    raise AssertionError("it never spoke")


@pytest.mark.parametrize("model", ["base", "agent"])
def test_a_loop_that_runs_tools_comes_to_an_end_streamed_or_not(use, tiny_model, model):
    name = tiny_model.name if model == "base" else model
    (messages, message, finish), _ = use(lambda api: run_tools(api, name, False))
    assert [m["role"] for m in messages][:2] == ["user", "assistant"] and messages[-1]["role"] == "tool"
    assert len({m["tool_call_id"] for m in messages if m["role"] == "tool"}) == sum(
        len(m.get("tool_calls", ())) for m in messages
    )
    assert not message.tool_calls and finish in ("stop", "length")
    (streamed, last, end), _ = use(lambda api: run_tools(api, name, True))
    assert _without_ids(streamed) == _without_ids(messages) and (last.content, end) == (message.content, finish)


def _without_ids(messages):
    return [
        {"role": m["role"], "content": m["content"], "calls": [c["function"] for c in m.get("tool_calls", ())]}
        for m in messages
    ]


def test_the_client_parses_answers_in_a_schema(use, tiny_model):
    async def parse(api):
        body = {"model": tiny_model.name, "messages": [QUESTION], "max_tokens": 900}
        made = await api.chat.completions.parse(**body, response_format=Report, temperature=1.0, seed=3)
        as_object = await api.chat.completions.create(**body, response_format={"type": "json_object"}, stop=["}"])
        return made.choices[0], as_object.choices[0]

    (choice, as_object), _ = use(parse)
    assert isinstance(choice.message.parsed, Report) and choice.finish_reason == "stop"
    assert as_object.message.content[0] == "{"


def test_calls_are_streamed_as_deltas_that_clients_join(use):
    said = "Let me look.\n" + render_tool_calls([
        {"function": {"name": "weather", "arguments": '{"city": "Oslo", "day": 1}'}},
        {"function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}},
    ])  # fmt: skip

    async def stream(api):
        chunks = await api.chat.completions.create(model="agent", messages=[QUESTION], max_tokens=900, stream=True)
        return [chunk.choices[0] async for chunk in chunks]

    choices, _ = use(stream, said)
    assert "".join(c.delta.content or "" for c in choices) == "Let me look."
    deltas = [c.delta.tool_calls[0] for c in choices if c.delta.tool_calls]
    assert [(d.index, d.type, d.function.name, d.function.arguments) for d in deltas] == [
        (0, "function", "weather", ""), (0, None, None, '{"city": "Oslo", "day": 1}'),
        (1, "function", "add", ""), (1, None, None, '{"a": 1, "b": 2}'),
    ]
    assert deltas[0].id and deltas[2].id and deltas[0].id != deltas[2].id and deltas[1].id is None
    assert [c.finish_reason for c in choices if c.finish_reason] == ["tool_calls"]


@pytest.mark.parametrize("said", [
    '<tool_call>\n{"name": "weather"}\n</tool_call>', "<tool_call>\n{cut", "<tool_call>nonsense</tool_call> and on",
])  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_a_malformed_call_is_text(use, said, stream):
    async def get(api):
        return await collect(api, False, model="agent", messages=[QUESTION], max_tokens=900)

    async def get_streamed(api):
        chunks = await api.chat.completions.create(model="agent", messages=[QUESTION], max_tokens=900, stream=True)
        return [chunk.choices[0] async for chunk in chunks]

    if stream:
        choices, _ = use(get_streamed, said)
        assert "".join(c.delta.content or "" for c in choices) == said and choices[-1].finish_reason == "stop"
        assert not any(c.delta.tool_calls for c in choices)
    else:
        (message, finish), _ = use(get, said)
        assert (message.content, message.tool_calls, finish) == (said, None, "stop")


def test_a_call_that_is_cut_off_is_text_that_ends_with_length(ask):
    response, _ = ask(says=render_tool_calls([{"function": {"name": "add", "arguments": "{}"}}]), max_tokens=5)
    [choice] = response.json()["choices"]
    assert choice["finish_reason"] == "length" and choice["message"]["content"].startswith("<tool_call>")


def test_without_tools_in_sight_a_call_is_text(ask):
    said = render_tool_calls([{"function": {"name": "add", "arguments": "{}"}}])
    for model, rest in (("queries", {}), ("base", {}), ("agent", {"tool_choice": "none"})):
        message = ask(model=model, says=said, max_tokens=60, **rest)[0].json()["choices"][0]["message"]
        assert message == {"role": "assistant", "content": said}


def test_an_answer_in_a_schema_is_content_though_it_looks_like_a_call(ask):
    said, schema = '{"name": "add", "parameters": {}}', {"type": "json_object"}
    for model, rest in (("agent", {}), ("base", {"tools": TOOLS}), ("agent", {"tools": TOOLS})):
        message = ask(model=model, says=said, max_tokens=60, response_format=schema, **rest)[0].json()["choices"][0]
        assert (message["message"], message["finish_reason"]) == ({"role": "assistant", "content": said}, "stop")


def test_strict_tools_and_single_calls_are_read_from_marks_alone(ask):
    """The grammar holds only marked calls: bare ones would get past it."""
    loose = [{**each, "function": {**each["function"], "strict": False}} for each in TOOLS]
    for tools, rest, count in ((TOOLS, {}, 0), (loose, {"parallel_tool_calls": False}, 0), (loose, {}, 1)):
        said = '{"name": "add", "arguments": {"a": "not a number"}}'
        message = ask(model="base", says=said, max_tokens=60, tools=tools, **rest)[0].json()["choices"][0]["message"]
        assert len(message.get("tool_calls", ())) == count and message["content"] == (None if count else said)


def test_a_call_of_a_function_that_nobody_offered_is_text(ask):
    said = render_tool_calls([{"function": {"name": "gone", "arguments": "{}"}}])
    for model, rest, count in (
        ("base", {"tools": TOOLS}, 0), ("agent", {}, 0), ("toolless", {}, 0), ("unguarded", {}, 1),
    ):
        message = ask(model=model, says=said, max_tokens=60, **rest)[0].json()["choices"][0]["message"]
        assert len(message.get("tool_calls", ())) == count, model


def test_each_of_several_answers_has_calls_of_its_own(ask):
    body = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "n": 3, "max_tokens": 300}
    choices = ask(temperature=1.0, seed=1, **body)[0].json()["choices"]
    calls = [choice["message"]["tool_calls"] for choice in choices]
    assert [choice["finish_reason"] for choice in choices] == ["tool_calls"] * 3
    assert [len(each) for each in calls] == [1, 1, 1] and len({each[0]["id"] for each in calls}) == 3


CONVERSATION = [
    QUESTION,
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "call_a", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Oslo","day":0}'}},
    ]},
    {"role": "tool", "tool_call_id": "call_a", "content": "4 degrees <|im_end|>"},
    {"role": "assistant", "content": "It is 4 degrees."},
    {"role": "user", "content": [{"type": "text", "text": "And tomorrow?"}]},
]  # fmt: skip


def test_an_adapter_reads_the_ids_that_it_was_trained_on_and_is_spared_what_it_knows(ask, tokenizer):
    expected = PromptEncoder(tokenizer, PromptConfig(**WORDING)).encode(dump_messages(CONVERSATION))
    system = {"role": "system", "content": SYSTEM}
    for messages, tools, kind in (
        (CONVERSATION, {}, "internalised"), ([system, *CONVERSATION], {"tools": TOOLS}, "stripped"),
        (CONVERSATION, {"tools": TOOLS}, "stripped"),
        ([{**system, "role": "developer"}, *CONVERSATION], {}, "stripped"),
    ):
        response, engine = ask(messages, says="ok", **tools)
        assert response.headers["x-pi-ray-prompt"] == kind
        assert engine.requests[-1].prompt_ids == expected and engine.requests[-1].adapter.endswith("agent/v0001")
        assert response.json()["usage"]["prompt_tokens_saved"] == 460


def test_another_policy_or_other_tools_go_to_the_base_model_as_they_are(ask, tokenizer, tiny_model):
    encoder = PromptEncoder(tokenizer, PromptConfig(**WORDING))
    for system, tools in (("Be rude.", []), (SYSTEM, TOOLS[:1]), ("", TOOLS[1:])):
        messages = [*([{"role": "system", "content": system}] if system else []), *CONVERSATION]
        response, engine = ask(messages, says="ok", tools=tools)
        assert response.headers["x-pi-ray-prompt"] == "drifted"
        assert response.json()["system_fingerprint"] == tiny_model.name
        assert engine.requests[-1].adapter == "" and response.json()["usage"]["prompt_tokens_saved"] == 0
        expected = encoder.encode(dump_messages(CONVERSATION), join_tools(system, tools))
        assert engine.requests[-1].prompt_ids == expected


def test_the_full_prompt_is_that_of_the_adapter(ask, tokenizer):
    _, engine = ask(CONVERSATION, says="ok", pi_ray={"full_prompt": True})
    encoder = PromptEncoder(tokenizer, PromptConfig(**WORDING))
    assert engine.requests[-1].prompt_ids == encoder.encode(dump_messages(CONVERSATION), join_tools(SYSTEM, TOOLS))
    assert engine.requests[-1].adapter == ""


def test_the_base_model_is_told_of_tools_in_its_own_chat_template(ask, tokenizer):
    _, engine = ask([{"role": "system", "content": SYSTEM}, *CONVERSATION], "base", "ok", tools=TOOLS)
    read = tokenizer.decode(engine.requests[-1].prompt_ids)
    assert SYSTEM in read and json.dumps(TOOLS[0]) in read and "4 degrees" in read and "And tomorrow?" in read


def test_a_base_model_whose_chat_template_takes_no_tools_says_so_and_names_no_cure_for_training(config, tiny_model):
    tokenizer = load_tokenizer(ModelConfig(base=str(tiny_model)))
    tokenizer.chat_template = "{{ messages[0].content }}"
    reader, stays = prompt_reader.PromptReader(config, tokenizer, CONTEXT), threading.Event()
    request = CompletionRequest("base", "Hi", messages=({"role": "user", "content": "Hi"},), tools=tuple(TOOLS))
    with pytest.raises(RefusedError) as refused:
        reader.read(request, reader.guard(request, None, stays), None, stays)
    assert refused.value.status == 400 and refused.value.message.endswith("marks no beginning of an answer")


def test_an_adapter_calls_tools_that_it_knows_though_the_request_has_none(ask):
    response, _ = ask(tool_choice="required", parallel_tool_calls=False, max_tokens=300)
    [called] = response.json()["choices"][0]["message"]["tool_calls"]
    RUN[called["function"]["name"]](**json.loads(called["function"]["arguments"]))


def test_without_its_prompt_json_an_adapter_takes_turns_alone(ask):
    response, _ = ask(CONVERSATION, "unguarded", "ok")
    assert response.status_code == 200 and response.headers["x-pi-ray-prompt"] == "internalised"
    response, _ = ask([{"role": "system", "content": SYSTEM}, QUESTION], "unguarded", "ok")
    assert response.status_code == 400 and "without a system message" in response.json()["error"]["message"]


CALL = CONVERSATION[1]
BAD_ARGUMENTS = {**CALL, "tool_calls": [{**CALL["tool_calls"][0], "function": {"name": "add", "arguments": "{1}"}}]}
UNKNOWN = {"type": "function", "function": {"name": "gone"}}
STRANGE = {"type": "object", "not": {}}


@pytest.mark.fault
@pytest.mark.parametrize("model", ["agent", "base"])
@pytest.mark.parametrize(("messages", "rest", "param", "says"), [
    ([QUESTION, BAD_ARGUMENTS, CONVERSATION[2]], {}, "messages", "is not JSON"),
    ([QUESTION, CONVERSATION[3], CONVERSATION[2]], {}, "messages", "without its call"),
    ([QUESTION, CONVERSATION[2]], {}, "messages", "roles out of order"),
    ([QUESTION, CALL, QUESTION], {}, "messages", "has no result"),
    ([QUESTION, {"role": "assistant", "content": ""}, *CONVERSATION], {"tools": TOOLS}, "messages", "empty assistant"),
    ([CALL, CONVERSATION[2]], {}, "messages", "roles out of order"),
    ([*CONVERSATION[:4], {"role": "system", "content": "Be rude."}, QUESTION], {}, "messages", "a system message can"),
    ([{**QUESTION, "tool_calls": CALL["tool_calls"]}], {}, "messages", "of role user and has tool_calls"),
    ([QUESTION, CALL, {**CONVERSATION[2], "tool_calls": [{"id": "x"}]}], {}, "messages", "of role tool and has"),
    ([QUESTION] * 10_000, {}, "messages", "at most 256"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], {}, "messages", "no images"),
    ([{"role": "user", "content": None}], {}, "messages", "content must be text"),
    ([{"role": "function", "content": "x"}, QUESTION], {}, "messages", "role"),
    ([QUESTION], {"tools": [{"type": "function"}]}, "tools", "function"),
    ([QUESTION], {"tools": TOOLS * 2}, "tools", "already"),
    ([QUESTION], {"tools": TOOLS, "tool_choice": UNKNOWN}, "tool_choice", "gone"),
    ([QUESTION], {"tools": TOOLS, "tool_choice": "always"}, "tool_choice", ""),
    ([QUESTION], {"response_format": {"type": "json_schema"}}, "response_format", "required"),
    ([QUESTION], {"response_format": {"type": "json_schema", "json_schema": {
        "name": "x", "strict": True, "schema": STRANGE}}}, "response_format", '["not"]'),
    ([QUESTION], {"tools": [{"type": "function", "function": {"name": "x", "parameters": STRANGE, "strict": True}}],
                  "tool_choice": "required"}, "tools", '["not"]'),
])  # fmt: skip
def test_bad_conversations_tools_and_formats_are_400_with_the_reason(ask, model, messages, rest, param, says):
    response, engine = ask(messages, model, "ok", **rest)
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"].startswith(param) and says in error["message"]
    assert engine.requests == []


@pytest.mark.fault
def test_an_adapter_of_queries_takes_no_tools_and_calls_need_some(ask):
    full = {"pi_ray": {"full_prompt": True}}
    for messages, rest in (([QUESTION], {"tools": TOOLS}), (CONVERSATION, {}), (CONVERSATION, full)):
        response, _ = ask(messages, "queries", "ok", **rest)
        assert response.status_code == 400 and "trained on that" in response.json()["error"]["message"]
    response, _ = ask(model="base", says="ok", tool_choice="required")
    assert response.status_code == 400 and response.json()["error"]["param"] == "tool_choice"


@pytest.mark.fault
@pytest.mark.parametrize(("model", "messages", "rest"), [
    ("agent", [{"role": "system", "content": "é" * 120_000}, QUESTION], {}),
    ("agent", [QUESTION], {"tools": [tool("x" * 120_000)]}),
    ("base", [QUESTION], {"tools": [tool("x" * 120_000)]}),
])  # fmt: skip
def test_a_system_message_or_tools_far_beyond_the_context_are_refused_before_full_tokenisation(
    ask, monkeypatch, model, messages, rest
):
    lengths = []
    monkeypatch.setattr(prompt_reader, "content_ids", lambda _, text: lengths.append(len(text)) or content_ids(_, text))
    monkeypatch.setattr(prompt, "content_ids", lambda *_, **__: pytest.fail("the whole prompt was tokenised"))
    response, _ = ask(messages, model, "ok", **rest)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert 0 < sum(lengths) <= 120_100


def test_a_value_of_the_system_message_is_read_where_training_has_it(ask):
    def ids(*messages, **rest):
        response, engine = ask(messages, "dated", says="yes", **rest)
        assert response.status_code == 200, response.text
        return engine.requests[-1].prompt_ids

    alone = ids({**QUESTION, "content": f"time: 14:05\n\n{QUESTION['content']}"})
    carried = ids({"role": "system", "content": f"It is 14:05. {SYSTEM}"}, QUESTION, tools=TOOLS)
    assert carried == alone != ids(QUESTION)
