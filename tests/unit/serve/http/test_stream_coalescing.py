"""Pieces of text leave a replica no faster than they can be sent, and none is lost or late at the end."""

import asyncio

import pytest

from pi_ray.serve.http.streaming import EVENTS_PER_S, MAX_DELAY_S, StreamCoalescer, UsageCounter


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def played(coalescer, step, texts, **more):
    """What comes of an answer whose pieces come `step` seconds apart, with the time of each."""

    async def events():
        yield {"fingerprint": "a"}
        for text in texts:
            await asyncio.sleep(0)  # a step of the decoding thread
            await asyncio.sleep(0)
            coalescer.clock.now += step
            yield {"text": text, **{key: [value] for key, value in more.items()}}
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        yield {"finish": "stop"}

    async def run():
        return [(round(coalescer.clock.now, 3), event) async for event in coalescer.coalesce(events())]

    return asyncio.run(run())


def test_pieces_of_a_single_stream_are_not_joined():
    found = played(StreamCoalescer(Clock()), 2 / EVENTS_PER_S, "abc")
    assert [event for _, event in found] == [
        {"fingerprint": "a"}, {"text": "a"}, {"text": "b"}, {"text": "c"}, {"finish": "stop"},
    ]


def test_with_many_streams_the_first_piece_leaves_at_once_and_later_ones_are_joined():
    coalescer = StreamCoalescer(Clock())
    coalescer.streams = 15
    found = played(coalescer, 0.05, "abcdefgh")
    assert [event.get("text", "") for _, event in found] == ["", "a", "bcde", "fgh"] and found[-1][1][
        "finish"
    ] == "stop"
    assert [at for at, _ in found][:3] == [0, 0.05, 0.25] and coalescer.streams == 15


def test_pieces_that_are_ready_together_are_joined():
    async def events():
        for event in ({"text": "a"}, {"text": "b"}, {"finish": "length"}):
            yield event

    async def run():
        return [event async for event in StreamCoalescer().coalesce(events())]

    assert asyncio.run(run()) == [{"text": "ab", "finish": "length"}]


def test_closing_the_coalescer_closes_its_source():
    closed = []

    async def events():
        try:
            yield {"text": "a"}
            await asyncio.sleep(60)
        finally:
            closed.append(True)

    async def run():
        kept = coalescer.coalesce(events())
        assert await anext(kept) == {"text": "a"}
        await kept.aclose()

    coalescer = StreamCoalescer()
    asyncio.run(run())
    assert closed == [True] and coalescer.streams == 0


def test_a_piece_waits_at_most_max_delay():
    coalescer = StreamCoalescer(Clock())
    coalescer.streams = 10_000
    assert [event.get("text", "") for _, event in played(coalescer, MAX_DELAY_S, "abc")] == ["", "a", "b", "c", ""]


def test_logprobs_are_joined_with_their_text():
    coalescer = StreamCoalescer(Clock())
    coalescer.streams = 99
    assert [event for _, event in played(coalescer, 0.01, "abc", logprobs=1)][1:] == [
        {"text": "a", "logprobs": [1]}, {"text": "bc", "logprobs": [1, 1], "finish": "stop"},
    ]


def test_tokens_of_joined_pieces_are_counted_though_the_answer_is_broken_off():
    coalescer, usage = StreamCoalescer(Clock()), UsageCounter(1)
    coalescer.streams = 99
    found = played(coalescer, 0.01, "abcdefgh", tokens=3)
    assert len(found) < 8
    for _, event in found:
        event = {key: sum(value) if key == "tokens" else value for key, value in event.items() if key != "finish"}
        usage.add({**event, "index": 0})
    assert usage.spent == 24


def test_an_error_is_raised_and_its_stream_no_longer_counted():
    coalescer = StreamCoalescer(Clock())
    coalescer.streams = 99

    async def events():
        yield {"text": "a"}
        await asyncio.sleep(0.01)
        yield {"text": "b"}
        await asyncio.sleep(0.01)
        raise ValueError

    async def run(found):
        async for event in coalescer.coalesce(events()):
            found.append(event)

    found = []
    with pytest.raises(ValueError):
        asyncio.run(run(found))
    assert found == [{"text": "a"}] and coalescer.streams == 99
