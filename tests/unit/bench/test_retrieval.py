"""The benchmarks of retrieval and preparation: what their data is and what a number means. Sizes that take time are run
by the benchmarks alone.
"""

import bz2
import json

import numpy as np
import pytest

from pi_ray.config import ModelConfig, RunConfig
from pi_ray.models import load_tokenizer
from pi_ray.protocols import Row
from pi_ray.tasks.jsonl import JsonlTask
from tests.bench import prepare, retrieval


@pytest.fixture
def data(tmp_path):
    (tmp_path / "nl2bash").mkdir()
    (tmp_path / "nl2bash" / "train.cm").write_text(
        "".join(f"find . -name '*.{i % 9}' | head -{i}\n" for i in range(220))
    )
    (tmp_path / "wikisql").mkdir()
    asked = [{"variables": {"var0": f"value {i}", "var1": str(i)}} for i in range(3)]
    entries = [
        {
            "sql": [
                'SELECT TABLEalias0.NOTES_FIELD FROM TABLE AS TABLEalias0 WHERE TABLEalias0.A_FIELD = "var0" AND '
                'TABLEalias0.B_FIELD > var1 ;'
            ],
            "sentences": asked,
        }
    ]
    (tmp_path / "wikisql" / "text2sql-data.wikisql.json.bz2").write_bytes(bz2.compress(json.dumps(entries).encode()))
    return tmp_path


def test_an_answer_of_wikisql_is_the_sql_with_the_values_of_its_question(data):
    assert retrieval.wikisql(data, 2) == [
        'SELECT NOTES FROM TABLE WHERE A = "value 0" AND B > 0 ;',
        'SELECT NOTES FROM TABLE WHERE A = "value 1" AND B > 1 ;',
    ]
    assert len(retrieval.nl2bash(data)) == 220


def test_missing_data_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"no nl2bash/train\.cm below it"):
        retrieval.nl2bash(tmp_path)


def test_exact_and_sacrebleu_agree_in_the_run_that_times_them(data, monkeypatch):
    texts = retrieval.nl2bash(data)
    monkeypatch.setattr(retrieval, "PAIRS", 500)
    assert retrieval.against_sacrebleu(texts, 2) > 0
    monkeypatch.setattr(retrieval.BleuIndex, "scores", lambda self, references, candidates: np.zeros(candidates.shape))
    with pytest.raises(SystemExit, match="a score differs from sacrebleu's"):
        retrieval.against_sacrebleu(texts, 2)


def test_faiss_is_measured_by_what_it_missed_of_the_exact_best(data, monkeypatch):
    texts = retrieval.nl2bash(data)
    bank, _ = retrieval.index(texts)
    rows = np.arange(0, 220, 7)
    best, (near, built) = retrieval.exact(bank, texts, rows, 1), retrieval.by_faiss(bank, texts, rows, 1)
    assert best.scores.shape == near.scores.shape == (len(rows), retrieval.K) and 0 < built < near.seconds
    assert (near.scores <= best.scores + 1e-9).all() and best.scores.max() < 100, "no row finds itself"
    assert 0.5 < retrieval.compared(texts, 1, rows)["share"] <= 1


def test_made_up_rows_are_rows_of_about_the_tokens_asked_for(tmp_path):
    prepare.write_rows(tmp_path, 60, 200)
    config = RunConfig.model_validate(prepare.config_of(tmp_path, "run", 0))
    rows = list(JsonlTask(config.task).rows("train"))
    assert len({r.query for r in rows if isinstance(r, Row)}) == 60
    tokenizer = load_tokenizer(ModelConfig())
    assert 170 < np.mean([len(tokenizer(r.query).input_ids) + len(tokenizer(r.answer).input_ids) for r in rows]) < 230
