"""A teacher's answers by vLLM: generated in the first view of the prompt, then judged in the others.

As pi_ray/train/distill.py has it, but every view notes its likeliest tokens along an answer (`noted_tokens`), since no
process here sees a whole distribution; what they leave of the probability is spread over the other tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from pi_ray.config import RunConfig
from pi_ray.models import load_model_config, load_tokenizer
from pi_ray.protocols import UNLABELLED
from pi_ray.train.anchor import AnchorRows
from pi_ray.train.answer_scores import Answers, Likeliest, as_certain, noted_tokens, score_noted
from pi_ray.train.batches import PhaseDataset
from pi_ray.train.distill import longest_answer_tokens, view_prefixes
from pi_ray.train.teacher_rows import TeacherRows, open_teacher_rows
from pi_ray.train.vllm_batches import VllmPrompt, answer_prompts

Rows = PhaseDataset | TeacherRows | AnchorRows


class VllmTeacher:
    """The base with the adapter in `folder`, "" for the base alone, on `nodes` with these resources."""

    def __init__(self, config: RunConfig, folder: str, nodes: Sequence[Mapping[str, float]]):
        self.config, self.folder, self.nodes = config, folder, nodes
        self.end = load_tokenizer(config.model).eos_token_id
        self.vocabulary = load_model_config(config.model).get_text_config().vocab_size
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
        if not numbers:
            return {}
        sampling = self._sampling(longest_answer_tokens(self.config))
        prompts = [VllmPrompt(self.prefixes[0], ids, self.folder, sampling) for ids, _ in data.take(numbers)]
        written = {}
        for place, answer in answer_prompts(self.config, prompts, self.nodes):
            label = list(map(int, answer["generated_tokens"]))
            if label and label[-1] == self.end:
                written[numbers[place]] = label, self._likeliest(answer["logprobs"])
        return {n: written[n] for n in numbers if n in written}

    def _judge(
        self, todo: Sequence[tuple[str, list[int], str]], rows: Mapping[str, Rows], answers: Mapping[str, Answers]
    ) -> list[dict[int, Likeliest]]:
        """For each (kind of rows, prefix, adapter) the likeliest tokens along the answers of that kind.

        A place of an answer is a prompt of its own, of which vLLM writes one token: all but its end is in the cache.
        vLLM's log-probabilities of a prompt would need every token computed anew, and fail beside LoRA on CPUs.
        """
        sampling = self._sampling(1)
        found: list[dict[int, Likeliest]] = [{} for _ in todo]
        places, prompts = [], []
        for view, (kind, prefix, adapter) in enumerate(todo):
            taken = rows[kind].take(list(answers[kind]))
            for (n, label), (ids, _) in zip(answers[kind].items(), taken, strict=True):
                places += [(view, n, at) for at in range(len(label))]
                prompts += [VllmPrompt(prefix, [*ids, *label[:at]], adapter, sampling) for at in range(len(label))]
        noted: dict[tuple[int, int], dict[int, Any]] = {}
        for place, answer in answer_prompts(self.config, prompts, self.nodes) if prompts else ():
            view, n, at = places[place]
            along = noted.setdefault((view, n), {})
            along[at] = answer["logprobs"][0]
            if len(along) == len(answers[todo[view][0]][n]):
                found[view][n] = self._likeliest([along[i] for i in sorted(along)])
                del noted[view, n]
        return found

    def _sampling(self, max_tokens: int) -> dict[str, Any]:
        """The likeliest token at each place, and those that are noted."""
        return {
            "temperature": 0.0, "max_tokens": max_tokens, "stop_token_ids": [self.end], "ignore_eos": True,
            "detokenize": False, "logprobs": noted_tokens(self.top_k),
        }

    def _likeliest(self, logprobs: Sequence[Mapping[Any, Mapping[str, Any]]]) -> Likeliest:
        """Take the same number of tokens from each place of vLLM's answer, which may add the token that it chose."""
        most = noted_tokens(self.top_k)
        ranked = [sorted(((v["logprob"], int(k)) for k, v in p.items()), reverse=True)[:most] for p in logprobs]
        ids = torch.tensor([[token for _, token in place] for place in ranked], dtype=torch.int32)
        return Likeliest(ids, torch.tensor([[value for value, _ in place] for place in ranked]), self.vocabulary)
