"""What is thrown away of generated queries, and what is not."""

from pi_ray.ask.filters import QueryFilter
from pi_ray.units import UnitIndex, find_units

TEMPLATE = """Route alerts by the lists.

## Services

checkout: r9
search: r5
login: f9

## Metrics

ram: memory or memory use, in megabytes
cpu: processor load, in percent
"""
INDEX = UnitIndex(find_units(TEMPLATE))
CHECKOUT, SEARCH, RAM = (next(i for i, u in enumerate(INDEX.units) if u.text.startswith(w))
                         for w in ("checkout", "search", "ram"))


LABELLED = "tell us if login has a processor load that is high for more than an hour"


def made(held_out=(), log=()):
    return QueryFilter(INDEX, 0.85, held_out, [LABELLED], log)


def test_each_reason_is_counted_and_a_kept_query_is_not_kept_twice():
    tried = made(held_out=["Memory use of checkout is high"], log=["checkout is slow to load"])
    queries = [
        "memory use of checkout is too high", "Memory use of  CHECKOUT is high", "memory use of checkout is high!",
        LABELLED.upper(), "checkout is slow to load", "memory use of checkout is TOO high",
        "memory use of checkout is too high.", "memory of search is too high", "x", "checkout " * 50,
    ]
    kept = [tried.keep(query, (CHECKOUT,), "direct") for query in queries]
    assert kept == [True] + [False] * 9
    assert tried.counts == {
        "kept": 1, "evaluated": 1, "near evaluated": 1, "labelled": 1, "log": 1, "duplicate": 1, "near duplicate": 1,
        "about another unit": 1, "too short or too long": 2,
    }


def test_queries_about_different_units_are_no_near_duplicates():
    tried, text = made(), "please tell everybody in the team at once whenever {} has been slow for more than an hour"
    assert tried.keep(text.format("checkout"), (CHECKOUT,), "direct")
    assert tried.keep(text.format("search"), (SEARCH,), "direct"), "one word of seventeen differs, and tells them apart"
    assert not tried.keep(text.format("checkout") + " or so", (CHECKOUT,), "direct")


def test_the_best_unit_of_its_section_must_be_the_one_it_came_from():
    tried = made()
    a_lot = "checkout uses too much memory, many megabytes of it"
    assert tried.keep(a_lot, (CHECKOUT,), "direct"), "a metric is no rival of a service"
    assert tried.keep("search uses much memory, many megabytes of it", (SEARCH, RAM), "two")
    assert not tried.keep("search has a load that is far too high", (SEARCH, RAM), "two"), "nothing about memory"
    assert not tried.keep("everything is slow since this morning", (CHECKOUT,), "direct")


def test_a_reworded_query_needs_no_word_of_its_unit_but_none_of_another():
    tried = made()
    assert tried.keep("people cannot pay for what lies in their baskets", (CHECKOUT,), "reworded")
    assert not tried.keep("people cannot find the search box on any of the pages", (CHECKOUT,), "reworded")
