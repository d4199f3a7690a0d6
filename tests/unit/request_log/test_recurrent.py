"""What recurs is found without being told, prompts are told apart, and nothing of a request is lost."""

import pytest

from pi_ray.request_log.recurrent import find_prompts
from pi_ray.request_log.request import parse_request
from tests.unit.request_log.logs import SYSTEM, TOOLS, agent_turns, grown_requests, query, single_turn, turn

SHOTS = [turn("user", "Is it late?"), turn("assistant", "card"), turn("user", "What rate?"), turn("assistant", "loan")]
HEAD = "Sort the message below under card or loan. Today is {day}.\n\nMessage: "


def prompts_of(lines):
    return find_prompts([parse_request(line) for line in lines])


def test_a_system_message_with_a_time_is_the_template_and_the_time_stands_before_the_query():
    (prompt,) = prompts_of([single_turn(i, time=f"{i}:00") for i in range(20)])
    assert prompt.text == SYSTEM.format(time="{current_time}") and prompt.value_names == ["current_time"]
    first, answer = prompt.strip(parse_request(single_turn(7, time="7:00"))).turns
    assert first == turn("user", f"current_time: 7:00\n\n{query(7)}") and answer == turn("assistant", "card")
    assert prompt.describe().endswith("values that vary: {current_time}")


def test_a_common_head_and_tail_of_the_users_text_are_found_with_a_date_in_them():
    def line(i):
        text = HEAD.format(day=f"2025-01-{10 + i}") + query(i) + "\n\nAnswer with the label alone."
        return {"messages": [turn("user", text), turn("assistant", "card")]}

    (prompt,) = prompts_of([line(i) for i in range(20)])
    assert prompt.text == (
        "Sort the message below under card or loan. Today is {today}.\n\nMessage:\n\nAnswer with the label alone."
    )
    assert prompt.strip(parse_request(line(3))).turns[0]["content"] == f"today: 2025-01-13\n\n{query(3)}"


def test_the_question_behind_a_passage_is_the_query_and_the_passage_a_value():
    def line(i):
        passage = " ".join(f"{(i * 7919 + j) % 997} is the" for j in range(i % 5 + 20)) + f" {i}"
        return {"messages": [turn("user", f"Answer by the passage if it is there.\n\nPassage:\n{passage}\n\n"
                                          f"Question: {query(i)} is the {i}\nAnswer:"), turn("assistant", "x")]}

    (prompt,) = prompts_of([line(i) for i in range(40)])
    assert prompt.text == "Answer by the passage if it is there.\n\nPassage:\n{passage}\n\nQuestion:\n\nAnswer:"
    content = prompt.strip(parse_request(line(3))).turns[0]["content"]
    assert content.startswith("passage: 826 is the ") and content.endswith(f"\n\n{query(3)} is the 3")


def test_few_shot_turns_recur_and_become_examples():
    lines = [{"messages": [turn("system", "Sort the mail."), *SHOTS, turn("user", query(i)), turn("assistant", "x")]}
             for i in range(10)]
    (prompt,) = prompts_of(lines)
    assert len(prompt.shots) == 4 and prompt.strip(parse_request(lines[2])).turns[0] == turn("user", query(2))
    assert prompt.text.endswith("## Examples\n\nUser: Is it late?\nAssistant: card\nUser: What rate?\nAssistant: loan")


def test_the_turns_of_growing_conversations_are_no_few_shot_turns():
    (prompt,) = prompts_of([request for i in range(3) for request in grown_requests(i)])
    assert prompt.shots == () and prompt.user is None and prompt.conversations == 3
    assert prompt.value_names == ["current_time"]


def test_tools_in_another_order_are_the_same_tools_and_others_are_another_prompt():
    def line(i, tools):
        return {"messages": [turn("user", query(i)), turn("assistant", "x")], "tools": tools}

    lines = [line(i, TOOLS if i % 2 else TOOLS[::-1]) for i in range(10)] + [line(i, TOOLS[:1]) for i in range(4)]
    first, second = prompts_of(lines)
    assert (first.conversations, second.conversations) == (10, 4)
    assert first.strip(parse_request(lines[0])) and first.strip(parse_request(lines[-1])) is None


def test_several_prompts_come_with_the_largest_first():
    def translate(i):
        system = turn("system", "Translate into French what the user writes.")
        return {"messages": [system, turn("user", query(i)), turn("assistant", "oui")]}

    lines = [single_turn(i) for i in range(6)] + [translate(i) for i in range(14)]
    prompts = prompts_of(lines)
    assert [p.begins[:9] for p in prompts] == ["Translate", "You sort "]
    assert [p.conversations for p in prompts] == [14, 6], "the same users' texts go to both"


def test_users_texts_that_differ_have_no_common_head():
    lines = [{"messages": [turn("system", "Sort the mail."), turn("user", query(i) + " I would like to know")]}
             for i in range(30)]
    assert [p.user for p in prompts_of(lines)] == [None]


@pytest.mark.parametrize("texts", [["Where is it?"] * 9, ["yes", "no"] * 5])
def test_queries_that_repeat_are_no_template(texts):
    lines = [{"messages": [turn("system", "Sort the mail."), turn("user", text)]} for text in texts]
    assert [p.user for p in prompts_of(lines)] == [None]


def test_two_values_of_one_name_are_told_apart():
    def line(i):
        system = f"User: {i}\nWrite a letter on this fine morning, and another one.\nUser: {i * 7}\nBest regards."
        return {"messages": [turn("system", system), turn("user", query(i))]}

    (prompt,) = prompts_of([line(i) for i in range(12)])
    assert prompt.strip(parse_request(line(5))).turns[0]["content"] == f"user: 5\nuser_2: 35\n\n{query(5)}"
    assert prompt.text.startswith("User: {user}\n") and "User: {user_2}\n" in prompt.text


def test_a_request_with_nothing_of_its_own_is_refused():
    lines = [{"messages": [turn("user", HEAD.format(day="now") + query(i))]} for i in range(9)]
    (prompt,) = prompts_of(lines)
    with pytest.raises(ValueError, match="nothing beside"):
        prompt.strip(parse_request({"messages": [turn("user", HEAD.format(day="now"))]}))


def test_a_conversation_keeps_its_later_turns_as_they_are():
    system = turn("system", SYSTEM.format(time="now"))
    lines = [{"messages": [system, *agent_turns(i)], "tools": TOOLS} for i in range(4)]
    (prompt,) = prompts_of(lines)
    assert list(prompt.strip(parse_request(lines[1])).turns) == agent_turns(1)


def test_text_that_the_grammar_of_templates_drops_is_noticed():
    texts = ("Sort the mail.", "# Instruction\n\nSort it.", "<!-- v2 --> Sort it.", "## A\n\n# Documents\n\n## B\n\nb")
    prompts = [prompts_of([{"messages": [turn("system", text), turn("user", "a")]}])[0] for text in texts]
    assert [prompt.loses_text for prompt in prompts] == [False, False, True, True]
