"""Reading drills: variants of the whole prompt in which nothing but reading gives the answer.

Labels that repeat let a model learn facts by heart in the first phase; then nothing rewards reading, and it misreads
what no label repeats. In a drilled update the codes of each fact group are exchanged for fresh ones of the same shape,
in template and labels alike, the lines that hold them are shuffled, and lines that no row of the update needs may be
left out. Later phases have the real prompt, and teach its codes.

Lines that no label needs are of another kind: all through the phase they are wrong answers, so that a model learns to
pass them over, whatever a query says. With the kind `unused` the whole phase is without them.
"""

from __future__ import annotations

import math
import random
import re
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pi_ray.config import DrillsConfig, RunConfig
from pi_ray.models import load_tokenizer
from pi_ray.prompt import PromptEncoder, split_sections
from pi_ray.run.directory import RunDir
from pi_ray.run.fingerprint import wants_unlabelled
from pi_ray.run.phases import first_taught_phase
from pi_ray.run.row_store import read_range
from pi_ray.schedule import plan_phases
from pi_ray.train.batches import dataset_manifest
from pi_ray.train.facts import WORD, FactGroup, find_facts, is_heading, shape_of

LIST_LINE = re.compile(r"[-*+] |\||[^\s:|][^:|]{0,60}: ")  # a bullet, a row of a table, or "name: value"
FEWEST_LINES = 3  # of a list
ALPHABETS = {"0": string.digits, "a": string.ascii_lowercase, "A": string.ascii_uppercase}


@dataclass(frozen=True)
class Variant:
    """A template's text with some words exchanged, and the words: old -> new."""

    text: str
    words: dict[str, str]

    def apply(self, text: str) -> str:
        """A label as this variant of the template has it."""
        return exchange_words(text, self.words)


class Drills:
    """The variants of one template, each a function of seed and update number, so that a resumed run has the same.

    `encoder` and `answers`, the labels' texts by row number, are needed to `encode` them.
    """

    def __init__(
        self, template: str, groups: Sequence[FactGroup], config: DrillsConfig, seed: int,
        encoder: PromptEncoder | None = None, answers: Sequence[Any] | pa.ChunkedArray = (),
    ):
        self.template, self.groups, self.config, self.seed = template, groups, config, seed
        self.encoder, self.answers = encoder, answers
        self.taken = set(WORD.findall(template))
        used = {word for group in groups for word in group.used}
        self.shown = leave_out_lines(template, groups, used.isdisjoint) if "unused" in config.kinds else template

    def encode(self, variant: Variant, rows: Sequence[int]) -> tuple[list[int], dict[int, list[int]]]:
        """The variant's prefix ids, and row number -> the label ids that it asks for."""
        assert self.encoder
        labels = {n: self.encoder.answer(variant.apply(str(self.answers[n]))) for n in rows}
        return self.encoder.prefix(variant.text), labels

    def variant(self, step: int, rows: Sequence[int] = ()) -> Variant | None:
        """The variant of an update, which has these rows; None where it keeps the real prompt."""
        rng = random.Random(f"drill {self.seed} {step}")
        text, words = self.shown, dict[str, str]()
        if rng.random() >= self.config.share:
            return None if text == self.template else Variant(text, words)
        if "part" in self.config.kinds:
            text = keep_part(text, self.groups, {w for n in rows for w in WORD.findall(str(self.answers[n]))}, rng)
        if "order" in self.config.kinds:
            text = shuffle_lists(text, self.groups, rng)
        if "facts" in self.config.kinds:
            words = self._fresh_words(rng)
        return Variant(exchange_words(text, words), words)

    def _fresh_words(self, rng: random.Random) -> dict[str, str]:
        """A fresh word of its shape for each word of a group; none of them stands in the template."""
        fresh: dict[str, str] = {}
        for group in self.groups:
            possible = math.prod(len(ALPHABETS.get(kind, kind)) for kind in group.shape)
            taken = sum(shape_of(word) == group.shape for word in self.taken)
            if possible - taken < 2 * len(group.words):  # too few to draw from: these words among themselves
                fresh |= zip(group.words, rng.sample(group.words, len(group.words)), strict=True)
                continue
            for word in group.words:
                drawn = word
                while drawn in self.taken or drawn in fresh.values():
                    drawn = "".join(rng.choice(ALPHABETS.get(kind, kind)) for kind in group.shape)
                fresh[word] = drawn
        return fresh


def whole_template(config: RunConfig) -> str:
    """The template of a prepared run at rate 1, whatever its phases have."""
    run = RunDir(config.root)
    return dataset_manifest(run.phase(0))["template"] if first_taught_phase(config) else run.read_templates()[1.0]


def find_run_facts(config: RunConfig) -> list[FactGroup]:
    """The facts of a prepared run: of its whole template and its labelled rows."""
    run, drills = RunDir(config.root), config.train.drills
    pairs = ((row.query, row.answer) for row in run.rows_of("train"))
    return find_facts(whole_template(config), pairs, drills.words, drills.ignore)


def why_not_drilled(config: RunConfig) -> str:
    """The reason why a run's first phase has no drills, whatever its template holds; "" where there is none."""
    if not wants_unlabelled(config):
        return "no teacher is made"
    if config.train.distill.teacher_adapter:
        return "the teacher is that of another run"
    if config.train.drills.mode == "off":
        return "train.drills.mode is off"
    if first_taught_phase(config) == 0:
        return "no phase reads the whole template"
    return "the first phase has examples, which show the codes" if plan_phases(config.schedule)[0].shots else ""


def describe_drills(config: RunConfig, groups: Sequence[FactGroup]) -> str:
    """Say in words which facts the drills exchange, or why there are no drills."""
    reason = why_not_drilled(config)
    if not reason and groups:
        return f"{config.train.drills.share:.0%} of phase 0's updates: {'; '.join(map(str, groups))}"
    return f"none, since {reason or 'labels copy no codes from the template (train.drills.words adds words)'}"


def make_drills(config: RunConfig) -> Drills | None:
    """The drills of a prepared run's first phase; None where there are none."""
    train = config.train
    if why_not_drilled(config) or not (groups := find_run_facts(config)):
        return None
    run, encoder = RunDir(config.root), PromptEncoder(load_tokenizer(config.model), config.prompt)
    answers = read_range(run.rows_of("train").path, columns=["answer"])["answer"]
    return Drills(dataset_manifest(run.phase(0))["template"], groups, train.drills, train.seed, encoder, answers)


def exchange_words(text: str, words: dict[str, str]) -> str:
    """`text` with each whole word that `words` names replaced."""
    return WORD.sub(lambda found: words.get(found[0], found[0]), text)


def shuffle_lists(template: str, groups: Sequence[FactGroup], rng: random.Random) -> str:
    """The template with the lines of its lists in another order: those that hold facts, or all where there are none.

    Lines stay in their section, numbered lists and the order of sections as they are. A template without lists comes
    back unchanged.
    """
    sections = []
    for section in split_sections(template):
        lines = section.split("\n")
        for places in _fact_lines(lines, groups) if groups else _list_lines(lines):
            order = rng.sample(places, len(places))
            moved = [lines[place] for place in order]
            for place, line in zip(places, moved, strict=True):
                lines[place] = line
        sections.append("\n".join(lines))
    return "".join(sections).removesuffix("\n")


def keep_part(template: str, groups: Sequence[FactGroup], needed: set[str], rng: random.Random) -> str:
    """The template without some of the lines that hold facts. Those with a word of `needed` stay.

    The share of the others that stays is drawn as well, so that there are short lists, which are easy to read, and
    long ones.
    """
    share = rng.random()
    return leave_out_lines(template, groups, lambda words: rng.random() >= share and needed.isdisjoint(words))


def leave_out_lines(
    template: str, groups: Sequence[FactGroup], is_left_out: Callable[[Iterable[str]], bool]
) -> str:
    """The template without the lines that hold facts of which, by their words, `is_left_out` says so."""
    sections = []
    for section in split_sections(template):
        lines = section.split("\n")
        left_out = {
            place for places in _fact_lines(lines, groups) for place in places
            if is_left_out(WORD.findall(lines[place]))
        }
        sections.append("\n".join(line for place, line in enumerate(lines) if place not in left_out))
    return "".join(sections).removesuffix("\n")


def template_views(template: str, groups: Sequence[FactGroup], count: int, seed: int) -> list[str]:
    """The template in up to `count` different orders of its lists, the first one its own."""
    shuffled = (shuffle_lists(template, groups, random.Random(f"view {seed} {i}")) for i in range(1, count))
    return list(dict.fromkeys([template, *shuffled]))


def _fact_lines(lines: list[str], groups: Sequence[FactGroup]) -> list[list[int]]:
    """For each group of this section the numbers of the lines that hold its words."""
    heading = lines[0] if is_heading(lines[0]) else ""  # the text before the first one is a section of its own
    own = [set(group.words) for group in groups if (group.section if is_heading(group.section) else "") == heading]
    places = [i for i, line in enumerate(lines) if not is_heading(line)]
    return [[i for i in places if words.intersection(WORD.findall(lines[i]))] for words in own]


def _list_lines(lines: list[str]) -> list[list[int]]:
    """The numbers of the lines of each list: FEWEST_LINES or more in a row that begin alike."""
    lists: list[list[int]] = [[]]
    for i, line in enumerate(lines):
        beside_rule = any(near.startswith("|-") for near in lines[i : i + 2])  # a table's rule, or the head above it
        if LIST_LINE.match(line) and not beside_rule:
            lists[-1].append(i)
        elif lists[-1]:
            lists.append([])
    return [places for places in lists if len(places) >= FEWEST_LINES]
