"""Prefetching: the next item is made while the present one is used."""

import threading

import pytest
import torch

from pi_ray.train.dataloader import Prefetcher


def test_the_next_one_is_ready_before_it_is_asked_for():
    made, ready = [], threading.Event()

    def make(i):
        made.append((i, threading.current_thread() is threading.main_thread()))
        if i == 1:
            ready.set()
        return i * 10

    prefetcher = Prefetcher(make, 3)
    assert prefetcher[0] == 0 and ready.wait(5), "1 is made though nobody asked for it"
    assert prefetcher[1] == 10 and prefetcher[2] == 20 and made == [(0, False), (1, False), (2, False)]
    prefetcher.close()


def test_each_is_made_once_and_only_two_are_kept():
    made = []
    prefetcher = Prefetcher(lambda i: made.append(i) or i, 4)
    for i in (0, 0, 1, 1, 3):
        assert prefetcher[i] == i
    assert sorted(made)[:2] == [0, 1] and made.count(3) == 1 and set(prefetcher.futures) == {3}
    prefetcher.close()


def test_what_may_not_be_made_yet_is_made_when_it_is_asked_for():
    made, allowed = [], []
    prefetcher = Prefetcher(lambda i: made.append(i) or i, 3, lambda i: i in allowed)
    assert prefetcher[0] == 0 and prefetcher[1] == 1 and made == [0, 1] and 2 not in prefetcher.futures
    prefetcher.close()


def test_an_error_is_raised_where_the_thing_is_asked_for():
    def make(i):
        if i == 1:
            raise ValueError("broken")
        return i

    prefetcher = Prefetcher(make, 3)
    assert prefetcher[0] == 0
    with pytest.raises(ValueError, match="broken"):
        prefetcher[1]
    with pytest.raises(IndexError):
        prefetcher[3]
    prefetcher.close()


def test_its_thread_computes_alone_and_the_callers_keep_theirs():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert Prefetcher(lambda i: torch.get_num_threads(), 1)[0] == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
