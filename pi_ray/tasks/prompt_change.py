"""A changed prompt: which of its units are new, gone or others, and which labels still follow the old one."""

import re
from collections import Counter
from dataclasses import dataclass, replace
from difflib import SequenceMatcher

from pi_ray.protocols import Row
from pi_ray.units import Unit, find_units, words_of

TERM = re.compile(r"[^\W_](?:[\w./-]*[^\W_])?")  # a word of a label, such as r9 or QX-417
SIMILAR = 0.5  # share of words from which two units are the old and the new form of one
SAME_NAME = 2.0  # above any share


@dataclass(frozen=True)
class PromptChange:
    """The units that only one of two prompts has; `changed` are pairs of the old and the new form of one unit."""

    added: tuple[Unit, ...]
    removed: tuple[Unit, ...]
    changed: tuple[tuple[Unit, Unit], ...]

    def __str__(self) -> str:
        counts = {"changed": len(self.changed), "added": len(self.added), "removed": len(self.removed)}
        return f"of the prompt's units {', '.join(f'{n} {what}' for what, n in counts.items() if n) or 'none changed'}"

    @property
    def fresh(self) -> list[Unit]:
        """The new prompt's units that the old one has not."""
        return [*(new for _, new in self.changed), *self.added]

    @property
    def lines(self) -> list[str]:
        """A line for each unit: what it was and what it is."""
        return [
            *(f"~ {old}  ->  {new.text}" for old, new in self.changed), *(f"+ {unit}" for unit in self.added),
            *(f"- {unit}" for unit in self.removed),
        ]


def compare_prompts(old: str, new: str) -> PromptChange:
    """The change between two templates' texts. A unit that only moved is no change."""
    before, after = find_units(old), find_units(new)
    gone, fresh = ([u for u in ours if u not in set(theirs)] for ours, theirs in ((before, after), (after, before)))
    scores = [(_likeness(a, b), i, j) for i, a in enumerate(gone) for j, b in enumerate(fresh) if a.kind == b.kind]
    pairs: dict[int, int] = {}
    for score, i, j in sorted(scores, key=lambda found: (-found[0], found[1:])):
        if score >= SIMILAR and i not in pairs and j not in pairs.values():
            pairs[i] = j
    return PromptChange(
        tuple(unit for j, unit in enumerate(fresh) if j not in pairs.values()),
        tuple(unit for i, unit in enumerate(gone) if i not in pairs),
        tuple((gone[i], fresh[j]) for i, j in sorted(pairs.items())),
    )


def _likeness(old: Unit, new: Unit) -> float:
    """SAME_NAME for items of one section and one name, else the share of words in common, in their order."""
    if old.kind == "item" and old.section == new.section and _cells(old)[0] == _cells(new)[0] and len(_cells(old)) > 1:
        return SAME_NAME
    return SequenceMatcher(None, old.text.split(), new.text.split(), autojunk=False).ratio()


def _cells(unit: Unit) -> list[str]:
    return [cell.strip() for cell in re.split(r"[:|]", unit.text)]


class LabelCorrection:
    """Makes labels of the old prompt follow the new one, where the change says how, and drops them where it does not.

    A word of a label is stale when a changed or removed unit had it and has it no more, unless the query brings it.
    It is exchanged when it belongs to one unit, whose new form has one other word in its place. It belongs to the unit
    whose name the query has; without one, to the only unit that had the word, if it has no digit: a number may have
    been computed. A stale word of a unit that is not named, and that other units have too, stays. So does one that a
    new or changed unit has got, where the query names that unit alone: the label has been corrected already.
    """

    def __init__(self, old: str, change: PromptChange):
        self.units = Counter(term for unit in find_units(old) for term in set(TERM.findall(unit.text)))
        before = {now: was.text for was, now in change.changed}
        self.won = [(unit, _without(unit.text, before.get(unit, ""))) for unit in change.fresh]  # words it had not
        self.stale: dict[str, list[tuple[Unit, str]]] = {}  # word -> units that had it, with the word in its place
        for was, now in [*change.changed, *((unit, None) for unit in change.removed)]:
            lost = _without(was.text, now.text if now else "")
            won = _without(now.text, was.text) if now else []
            for term in lost:
                self.stale.setdefault(term, []).append((was, won[0] if len(lost) == len(won) == 1 else ""))

    def correct(self, row: Row) -> Row | None:
        """The row with a label that follows the new prompt; None where that cannot be known."""
        asked, words, exchanged = set(TERM.findall(row.query)), set(words_of(row.query)), dict[str, str]()
        for term in set(TERM.findall(row.answer)) & self.stale.keys() - asked:
            owners = self.stale[term]
            named = [owner for owner in owners if _is_named(owner[0], term, words)]
            follows = any(term in terms and _is_named(unit, term, words) for unit, terms in self.won)
            if not named and (follows or self.units[term] > len(owners)):
                continue
            if not named and not any(map(str.isdigit, term)):
                named = owners
            if follows or len(named) != 1 or not named[0][1]:
                return None
            exchanged[term] = named[0][1]
        return replace(row, answer=TERM.sub(lambda m: exchanged.get(m[0], m[0]), row.answer)) if exchanged else row


def _without(text: str, other: str) -> list[str]:
    """The words of a text that the other has not, each once, in their order."""
    return [term for term in dict.fromkeys(TERM.findall(text)) if term not in set(TERM.findall(other))]


def _is_named(unit: Unit, term: str, words: set[str]) -> bool:
    """Whether a query with these words names the unit: has all words of its first cell without the term."""
    name = next((cell for cell in _cells(unit) if term not in TERM.findall(cell)), "")
    return unit.kind == "item" and bool(name) and set(words_of(name)) <= words
