"""Growth: of the requests of one conversation the longest stays."""

from pi_ray.request_log.growth import longest
from pi_ray.request_log.request import parse_request
from tests.unit.request_log.logs import agent_turns, grown_requests, single_turn, turn


def without_values(requests):
    return longest((request, ()) for request in requests)


def test_requests_that_grow_turn_by_turn_are_one_conversation_in_any_order():
    requests = [parse_request(line) for i in range(3) for line in grown_requests(i)]
    assert sorted(len(request.turns) for request in without_values(requests[::-1])) == [8, 8, 8]
    assert [list(request.turns) for request in without_values(requests)] == [agent_turns(i) for i in range(3)]


def test_conversations_that_part_after_some_turns_both_stay():
    begin = [turn("user", "a"), turn("assistant", "b")]
    lines = [{"messages": begin}, *({"messages": [*begin, turn("user", text)]} for text in "cd")]
    assert [request.turns[-1]["content"] for request in without_values(map(parse_request, lines))] == ["c", "d"]


def test_a_request_that_was_sent_twice_is_kept_once():
    assert len(longest((parse_request(single_turn(1)), ("noon",)) for _ in range(3))) == 1


def test_one_query_about_several_passages_is_several_conversations_also_where_one_goes_on():
    asked, said = turn("user", "Summarise it"), [turn("assistant", text) for text in "abc"]
    lines = [[asked, said[0]], [asked, said[1]], [asked, said[2], turn("user", "Shorter"), said[0]]]
    requests = [parse_request({"messages": messages}) for messages in lines]
    assert len(longest(zip(requests, [("A",), ("B",), ("C",)], strict=True))) == 3
    assert len(without_values(requests)) == 1, "without passages they are one query"


def test_a_time_that_changes_with_each_turn_does_not_part_a_conversation():
    requests = [parse_request(line) for line in grown_requests(1)]
    assert len(longest((request, (f"10:{i}",)) for i, request in enumerate(requests))) == 1
