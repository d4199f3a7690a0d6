"""Which beginning of a prompt is known, and what goes when there is no room."""

import torch

from pi_ray.serve.engine.prefix_cache import BLOCK_SIZE, PrefixCache

SIZE = 2 * 4 * BLOCK_SIZE  # bytes of a block of `copy`


def copy(start, stop):
    """Keys that name their positions."""
    positions = torch.arange(start, stop, dtype=torch.float32)[None, None, :, None]
    return positions, -positions


def prompt(*blocks, rest=1):
    """Tokens: whole blocks of one number each, then a rest."""
    return [b for b in blocks for _ in range(BLOCK_SIZE)] + [0] * rest


def known(cache, ids, adapter=""):
    return len(cache.find(adapter, ids).blocks)


def test_the_longest_common_prefix_is_found_in_whole_blocks():
    cache = PrefixCache(1 << 20)
    cache.add("", prompt(1, 2, 3), copy)
    assert [
        known(cache, p) for p in (prompt(1, 2, 3), prompt(1, 2, 9), prompt(1), prompt(2), prompt(1, 2, 3, 4, rest=5))
    ] == [3, 2, 1, 0, 3]
    keys = torch.cat([k for k, _ in cache.find("", prompt(1, 2, 3)).blocks], 2)
    assert keys.flatten().tolist() == list(range(3 * BLOCK_SIZE))


def test_a_found_prefix_never_holds_the_last_token():
    cache = PrefixCache(1 << 20)
    cache.add("", prompt(1, 2, rest=0), copy)
    assert cache.nbytes == 2 * SIZE
    assert known(cache, prompt(1, 2, rest=0)) == 1


def test_blocks_of_one_adapter_are_not_found_for_another():
    cache = PrefixCache(1 << 20)
    cache.add("a", prompt(1, 2), copy)
    assert (known(cache, prompt(1, 2), "a"), known(cache, prompt(1, 2), "b"), known(cache, prompt(1, 2))) == (2, 0, 0)


def test_cached_blocks_are_not_copied_again():
    cache, copied = PrefixCache(1 << 20), []
    for ids in (prompt(1, 2), prompt(1, 2), prompt(1, 3)):
        cache.add("", ids, lambda start, stop: copied.append(start) or copy(start, stop))
    assert copied == [0, BLOCK_SIZE, BLOCK_SIZE]
    assert cache.nbytes == 3 * SIZE


def test_the_least_recently_used_leaf_is_evicted_and_no_block_before_those_that_follow_it():
    cache = PrefixCache(4 * SIZE)
    cache.add("", prompt(1, 2), copy)
    cache.add("", prompt(1, 3), copy)
    cache.find("", prompt(1, 2))
    cache.add("", prompt(5, 6), copy)  # one too many: (1, 3) loses its end
    assert [known(cache, p) for p in (prompt(1, 2), prompt(1, 3), prompt(5, 6))] == [2, 1, 2]
    assert cache.nbytes == 4 * SIZE
    for i in range(50):
        cache.add("", prompt(1, 100 + i, 200 + i), copy)
        assert cache.nbytes <= 4 * SIZE and len(cache._blocks) == cache.nbytes // SIZE


def test_of_a_prompt_larger_than_the_limit_the_first_blocks_stay():
    cache = PrefixCache(2 * SIZE)
    cache.add("", prompt(1, 2, 3, 4), copy)
    assert known(cache, prompt(1, 2, 3, 4)) == 2


def test_a_limit_of_zero_caches_nothing():
    cache = PrefixCache(0)
    cache.add("", prompt(1, 2), lambda *_: 1 / 0)
    assert known(cache, prompt(1, 2)) == 0 and not cache._blocks


def states(number):
    return {"layer 0": torch.tensor([float(number)])}


def test_blocks_of_layers_that_keep_a_state_are_used_up_to_one_with_states_behind_it():
    cache = PrefixCache(1 << 20, needs_states=True)
    cache.add("", prompt(1, 2, 3, rest=0), copy)
    found = cache.find("", prompt(1, 2, 9))
    assert not found.blocks and found.states is None and found.known == 2 * BLOCK_SIZE
    cache.add("", prompt(1, 2, rest=0), copy, states(2))
    found = cache.find("", prompt(1, 2, 3, 4))
    assert len(found.blocks) == 2 and found.states["layer 0"].item() == 2 and found.known == 3 * BLOCK_SIZE
    assert cache.nbytes == 3 * SIZE + 4
    cache.add("", prompt(1, 2, rest=0), copy, states(7))
    assert cache.find("", prompt(1, 2, 9)).states["layer 0"].item() == 2, "what is there stays"
    assert cache.nbytes == 3 * SIZE + 4


def test_states_are_counted_and_go_with_their_block():
    cache = PrefixCache(2 * SIZE + 4, needs_states=True)
    cache.add("", prompt(1, rest=0), copy, states(1))
    cache.add("", prompt(2, rest=0), copy)
    assert cache.nbytes == 2 * SIZE + 4
    cache.add("", prompt(2, 3, rest=0), copy)
    assert cache.nbytes == 2 * SIZE and cache.find("", prompt(1)).known == 0
