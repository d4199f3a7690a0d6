"""Small logs of requests, made by hand for the tests."""

import json
from pathlib import Path

SYSTEM = (
    "You sort the messages that customers of a bank send us. The current time is {time}.\n\n## Labels\n\n"
    "card: all about cards\nloan: all about loans\nother: everything else\n\nAnswer with one label and nothing else."
)
TOOLS = [
    {"type": "function", "function": {
        "name": name, "description": f"{name.capitalize()} a booking.",
        "parameters": {"type": "object", "properties": {"id": {"type": "string"}}, "required": ["id"]},
    }}
    for name in ("find", "cancel")
]  # fmt: skip
THINGS = ("card", "loan", "account", "transfer", "statement", "password", "branch", "insurance", "fee", "address")
VERBS = ("lost", "blocked", "want", "cannot find", "would like to change", "need help with", "am charged for", "closed")


def query(number: int) -> str:
    """One of 80 short messages that are not near each other."""
    verb, thing = VERBS[number % 8], THINGS[number // 8 % 10]
    return f"{verb[::-1]} {number * number}, since {number} days I {verb} my {thing}, {thing[::-1]}"


def turn(role: str, content: str | None, **more: object) -> dict:
    return {"role": role, "content": content, **more}


def single_turn(number: int, time: str = "noon", answered: bool = True) -> dict:
    """A request with a response beside it."""
    messages = [turn("system", SYSTEM.format(time=time)), turn("user", query(number))]
    answer = {"choices": [{"finish_reason": "stop", "message": turn("assistant", THINGS[number // 8 % 10])}]}
    return {"request": {"model": "m", "messages": messages}, "response": answer if answered else None}


def call(number: int, name: str = "find") -> dict:
    return {"id": f"c{number}", "type": "function", "function": {"name": name, "arguments": '{"id": "A1"}'}}


def agent_turns(number: int) -> list[dict]:
    """A conversation of four requests, with a tool call."""
    return [
        turn("user", query(number)), turn("assistant", f"Which one of {number}?"),
        turn("user", f"That of {number} o'clock"), turn("assistant", None, tool_calls=[call(number)]),
        turn("tool", "{}", tool_call_id=f"c{number}"), turn("assistant", f"There is none, {number}."),
        turn("user", "Thank you"), turn("assistant", "You are welcome."),
    ]


def grown_requests(number: int) -> list[dict]:
    """The requests of such a conversation as a client sends them, each with the time at which it was sent."""
    turns = agent_turns(number)
    return [
        {"messages": [turn("system", SYSTEM.format(time=f"{number}:{i}0")), *turns[:i]], "tools": TOOLS,
         "response": {"choices": [{"message": answer}]}}
        for i, answer in enumerate(turns) if answer["role"] == "assistant"
    ]  # fmt: skip


def write_log(path: Path, lines: list) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
