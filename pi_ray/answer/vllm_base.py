"""The base model as teacher by vLLM, which writes answers behind the prompt and judges them behind its other orders.

It answers as BaseTeacher does (base_teacher.py), all queries of one start of vLLM at once.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pi_ray.answer.teacher_answer import TeacherAnswer
from pi_ray.config import RunConfig
from pi_ray.models import load_tokenizer
from pi_ray.prompt import PromptEncoder
from pi_ray.train.answer_scores import Likeliest, score_views
from pi_ray.train.vllm_reader import GivenAnswer, VllmReader

ITEMS = 256  # batches of queries between two starts of vLLM, after which their answers are kept


def answer_items(
    config: RunConfig, items: Sequence[Mapping[str, Any]], views: Sequence[str], limit: int,
    nodes: Sequence[Mapping[str, float]],
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Yield (place in `items`, a TeacherAnswer as JSON for each of its `rows`, pairs of query and documents)."""
    encoder, reader = PromptEncoder(load_tokenizer(config.model), config.prompt), VllmReader(config, nodes)
    prefixes = [encoder.prefix(view) for view in views]
    for start in range(0, len(items), ITEMS):
        some = items[start : start + ITEMS]
        rows = [encoder.row(query, (), documents) for item in some for query, documents in item["rows"]]
        answers = iter(_answer(encoder, reader, prefixes, rows, limit))
        for place, item in enumerate(some, start):
            yield place, [asdict(next(answers)) for _ in item["rows"]]


def _answer(
    encoder: PromptEncoder, reader: VllmReader, prefixes: Sequence[list[int]], rows: Sequence[list[int]], limit: int
) -> list[TeacherAnswer]:
    """One answer for each of `rows`, with the views' agreement and confidence where it ended and says something."""
    written = {n: (label, along) for n, label, along in reader.write(prefixes[0], rows, "", limit)}
    texts = {n: encoder.decode(label) for n, (label, _) in written.items()}
    labels = {n: label for n, (label, _) in written.items() if label[-1:] == [reader.end] and texts[n]}
    views: list[dict[int, Likeliest]] = [{n: written[n][1] for n in labels}, *({} for _ in prefixes[1:])]
    places = [(view, n) for view in range(1, len(prefixes)) for n in labels]
    given = [GivenAnswer(prefixes[view], rows[n], "", labels[n]) for view, n in places]
    for place, along in reader.judge(given):
        view, n = places[place]
        views[view][n] = along
    scores = score_views(views, labels)
    answers = []
    for n in range(len(rows)):
        ended = written[n][0][-1:] == [reader.end]
        agreement, confidence = scores.get(n, (1.0, 0.0))
        answers.append(TeacherAnswer(texts[n], ended, agreement, min(0.0, confidence)))
    return answers
