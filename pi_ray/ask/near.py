"""Near duplicates: texts whose one- and two-word sequences are nearly the same, found without comparing all pairs."""

from collections import defaultdict
from collections.abc import Hashable, Iterable
from hashlib import blake2b
from itertools import pairwise
from math import ceil

from pi_ray.units import WORD


def word_sequences(text: str) -> frozenset[str]:
    """The words and pairs of neighbouring words of a text, in lower case."""
    words = WORD.findall(text.casefold())
    return frozenset([*words, *map(" ".join, pairwise(words))])


class NearDuplicates:
    """Texts by `key`; `finds` one of the same key whose Jaccard similarity is `least` or more.

    Exact, by prefix filtering (Chaudhuri et al. 2006): in any one order of all sequences, two sets that are this
    similar share one of their first |set| - ceil(least |set|) + 1 sequences, so that only these are looked up.
    """

    def __init__(self, least: float):
        self.least = least
        self._by_sequence: dict[tuple[Hashable, str], list[frozenset[str]]] = defaultdict(list)

    def add(self, text: str, key: Hashable = None) -> None:
        found = word_sequences(text)
        for sequence in self._first(found):
            self._by_sequence[key, sequence].append(found)

    def finds(self, text: str, key: Hashable = None) -> bool:
        """Whether a text that was added is the same or nearly so."""
        found = word_sequences(text)
        others = (other for sequence in self._first(found) for other in self._by_sequence.get((key, sequence), ()))
        return any(_jaccard(found, other) >= self.least for other in others)

    def _first(self, found: frozenset[str]) -> Iterable[str]:
        """The first sequences by their hash, which is about random, so that no list of them grows long."""
        return sorted(found, key=_hash)[: len(found) - ceil(self.least * len(found)) + 1]


def _hash(sequence: str) -> bytes:
    return blake2b(sequence.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other)
