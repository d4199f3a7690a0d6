"""The guard of an adapter that was trained on conversations: which system messages and tools it has taken in."""

import copy

import pytest

from pi_ray.conversation import join_tools
from pi_ray.conversation.tools import AFTER, BEFORE
from pi_ray.store.conversation_guard import ConversationGuard
from pi_ray.store.prompt_guard import prompt_record

SYSTEM = "You are an agent of an airline.\n\nRefunds take five days.\nBe brief."
SHORT = "agent of an airline. Refunds five days."


def tool(name, description, **parameters):
    properties = {key: {"type": "string", "description": text} for key, text in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


TOOLS = [tool("book", "Books a flight.", flight="its number"), tool("refund", "Refunds a ticket.", ticket="its id")]
SHORT_TOOLS = [tool("book", "Books.", flight="")]


@pytest.fixture(scope="module")
def guard():
    compressed = [{"rate": 0.5, "text": join_tools(SHORT, SHORT_TOOLS)}]
    return ConversationGuard(prompt_record(join_tools(SYSTEM, TOOLS), compressed, []))


def changed(**function):
    tools = copy.deepcopy(TOOLS)
    tools[0]["function"].update(function)
    return tools


@pytest.mark.parametrize(("system", "tools", "kind"), [
    ("", [], "internalised"),
    (SYSTEM, TOOLS, "stripped"),
    (SYSTEM, [], "stripped"),
    ("", TOOLS, "stripped"),
    (SHORT, SHORT_TOOLS, "stripped"),
    (SYSTEM.replace("\n", "  \n "), TOOLS, "stripped"),
    ("You are a helpful assistant.", TOOLS, "stripped"),
    ("You are a helpful assistant.", [], "stripped"),
    (SYSTEM, TOOLS[::-1], "stripped"),
    (SYSTEM, changed(strict=True), "stripped"),
    (SYSTEM, changed(strict=None), "stripped"),
    (SYSTEM.replace("five", "six"), TOOLS, "drifted"),
    (SYSTEM + " And polite.", [], "drifted"),
    ("Translate to Dutch.", [], "drifted"),
    (SYSTEM, TOOLS[:1], "drifted"),
    (SYSTEM, [*TOOLS, tool("pay", "Pays.")], "drifted"),
    (SYSTEM, changed(description="Books a train."), "drifted"),
    ("", changed(parameters={"type": "object"}), "drifted"),
])  # fmt: skip
def test_the_trained_prompt_is_recognised_and_no_other(guard, system, tools, kind):
    assert guard.inspect(system, tools) == (kind, "")


def test_the_order_of_keys_does_not_count(guard):
    turned = [{"function": dict(reversed(t["function"].items())), "type": "function"} for t in TOOLS]
    assert guard.inspect("", turned) == ("stripped", "")


def test_the_tools_that_it_knows_are_those_of_the_template(guard):
    assert list(guard.tools) == TOOLS and guard.template == join_tools(SYSTEM, TOOLS)


@pytest.mark.parametrize("lines", ["1", "{}", '{"function": 1}', "[" * 100_000])
def test_tools_that_are_none_are_text_of_the_system_message(lines):
    text = f"{SYSTEM}\n\n{BEFORE}{lines}{AFTER}"
    guard = ConversationGuard(prompt_record(text, [], []))
    assert guard.tools == () and guard.inspect(text, [])[0] == "stripped" and guard.inspect(SYSTEM, [])[0] == "drifted"


def test_a_template_without_tools_knows_none():
    guard = ConversationGuard(prompt_record(SYSTEM, [], []))
    assert guard.tools == () and [guard.inspect(SYSTEM, tools)[0] for tools in ([], TOOLS)] == ["stripped", "drifted"]


def test_values_that_vary_are_told_for_the_users_first_text():
    text = f"It is {{time}} now. {SYSTEM}"
    dated = ConversationGuard(prompt_record(join_tools(text, TOOLS), [], [], ["time"]))
    assert dated.inspect(text.replace("{time}", "14:05"), TOOLS) == ("stripped", "time: 14:05")
    assert dated.inspect(text.replace("{time}", "14:05"), TOOLS[:1]) == ("drifted", "")
    assert dated.inspect("", TOOLS) == ("stripped", "")
