"""A teacher's answers by vLLM: generated in the first view of the prompt, then judged in the others.

As pi_ray/train/distill.py has it, but of every view the likeliest tokens along an answer are known alone (VllmReader).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pi_ray.config import RunConfig
from pi_ray.protocols import UNLABELLED
from pi_ray.train.anchor import AnchorRows
from pi_ray.train.answer_scores import Answers, Likeliest, as_certain, score_noted
from pi_ray.train.batches import PhaseDataset
from pi_ray.train.distill import longest_answer_tokens, view_prefixes
from pi_ray.train.teacher_rows import TeacherRows, open_teacher_rows
from pi_ray.train.vllm_reader import GivenAnswer, VllmReader

Rows = PhaseDataset | TeacherRows | AnchorRows


class VllmTeacher:
    """The base with the adapter in `folder`, "" for the base alone, on `nodes` with these resources."""

    def __init__(self, config: RunConfig, folder: str, nodes: Sequence[Mapping[str, float]]):
        self.config, self.folder, self.reader = config, folder, VllmReader(config, nodes)
        self.top_k = config.train.distill.top_k
        self.prefixes = view_prefixes(config)

    def answer_parts(self, parts: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """Yield (place in `parts`, rows of SCHEMA); vLLM starts once to write, and once to judge."""
        anchor = AnchorRows(self.config)
        rows: dict[str, Rows] = {
            "queries": open_teacher_rows(self.config, UNLABELLED), "labels": open_teacher_rows(self.config, "train"),
            "anchor": anchor,
        }
        numbers = [range(p["begin"], p["end"] or len(rows[p["kind"]])) for p in parts]  # an anchor is one part
        asked: dict[str, list[int]] = {kind: [] for kind in rows}
        for part, own in zip(parts, numbers, strict=True):
            asked[part["kind"]] += own
        written = self._write(rows["queries"], asked["queries"])
        answers: dict[str, Answers] = {"queries": {n: label for n, (label, _) in written.items()}}
        for kind in ("labels", "anchor"):
            taken = rows[kind].take(asked[kind])
            answers[kind] = {n: label for n, (_, label) in zip(asked[kind], taken, strict=True)}
        views: dict[str, list[Mapping[int, Likeliest]]] = {
            "queries": [{n: likeliest for n, (_, likeliest) in written.items()}], "labels": [], "anchor": [],
        }
        todo = [("queries", prefix, self.folder) for prefix in self.prefixes[1:]]
        if self.config.train.judges_labels:
            todo += [("labels", prefix, self.folder) for prefix in self.prefixes]
        todo.append(("anchor", anchor.prefix, ""))
        for (kind, _, _), found in zip(todo, self._judge(todo, rows, answers), strict=True):
            views[kind].append(found)
        for place, (part, own) in enumerate(zip(parts, numbers, strict=True)):
            kind = part["kind"]
            mine = {n: answers[kind][n] for n in own if n in answers[kind]}
            scored = score_noted(views[kind], rows[kind], mine, self.top_k) if views[kind] else None
            yield place, list(scored or as_certain(mine, self.top_k))

    def _write(self, data: Rows, numbers: Sequence[int]) -> dict[int, tuple[list[int], Likeliest]]:
        """Row number -> (its answer, with the end; the likeliest tokens along it), of answers that end in time."""
        prompts = [ids for ids, _ in data.take(numbers)]
        answers = self.reader.write(self.prefixes[0], prompts, self.folder, longest_answer_tokens(self.config))
        written = {numbers[place]: (label, along) for place, label, along in answers}
        return {n: written[n] for n in numbers if written[n][0][-1:] == [self.reader.end]}

    def _judge(
        self, todo: Sequence[tuple[str, list[int], str]], rows: Mapping[str, Rows], answers: Mapping[str, Answers]
    ) -> list[dict[int, Likeliest]]:
        """For each (kind of rows, prefix, adapter) the likeliest tokens along the answers of that kind."""
        found: list[dict[int, Likeliest]] = [{} for _ in todo]
        places, given = [], []
        for view, (kind, prefix, adapter) in enumerate(todo):
            taken = rows[kind].take(list(answers[kind]))
            for (n, label), (ids, _) in zip(answers[kind].items(), taken, strict=True):
                places.append((view, n))
                given.append(GivenAnswer(prefix, ids, adapter, label))
        for place, along in self.reader.judge(given):
            view, n = places[place]
            found[view][n] = along
        return found
