"""Tokens of keys in a month: kept over a restart, shared among replicas, and forgotten when the month is over."""

import pytest

from pi_ray.serve.http.token_usage import TokenUsage
from tests.unit.fake_bucket import Clock

NOVEMBER = 1_795_996_800.0  # 30 November 2026, 00:00 UTC


@pytest.fixture
def clock():
    clock = Clock()
    clock.now = NOVEMBER
    return clock


def test_tokens_are_kept_over_a_restart_and_seen_by_other_replicas(tmp_path, clock):
    first, second = TokenUsage(tmp_path, clock), TokenUsage(tmp_path, clock)
    first.add("a", 5)
    second.add("a", 7)
    second.add("b", 1)
    assert (first.used("a"), second.used("a")) == (5, 7), "not told yet"
    for each in (first, second, first):
        each.sync()
    for each in (first, second, TokenUsage(tmp_path, clock)):
        assert (each.used("a"), each.used("b"), each.used("c")) == (12, 1, 0)


def test_a_new_month_begins_at_nothing_and_removes_the_files_of_the_old_one(tmp_path, clock):
    left, usage = TokenUsage(tmp_path, clock), TokenUsage(tmp_path, clock)
    for each in (left, usage):
        each.add("a", 5)
        each.sync()
    clock.now += 86_400
    assert usage.used("a") == 0 and TokenUsage(tmp_path, clock).used("a") == 0
    usage.add("a", 2)
    usage.sync()
    assert TokenUsage(tmp_path, clock).used("a") == 2 and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_logged_and_broken_files_count_nothing(tmp_path, clock, caplog):
    (tmp_path / "file").write_text("")
    usage = TokenUsage(tmp_path / "file" / "folder", clock)
    usage.add("a", 5)
    usage.sync()
    assert usage.used("a") == 5 and "cannot be kept" in caplog.text
    for name, content in (("x", b"{"), ("y", b"[]"), ("z", b'{"month": "2026-11", "tokens": {"a": "b"}}')):
        (tmp_path / f"{name}.json").write_bytes(content)
    assert TokenUsage(tmp_path, clock).used("a") == 0
