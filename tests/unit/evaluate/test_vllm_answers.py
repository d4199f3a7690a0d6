"""An evaluation that answers by vLLM (a stand-in of it) gets the answers of transformers."""

import pytest

from pi_ray.config import RunConfig
from pi_ray.evaluate import generation_workers, vllm_answers
from pi_ray.evaluate.columns import AnswerLengths, Column
from pi_ray.evaluate.generation_workers import Generator, run_work, work_item
from pi_ray.evaluate.vllm_answers import answer_by_vllm, engine_of_columns
from pi_ray.train.generation import cut_answer
from tests.fake_vllm import FakeVllm
from tests.lora import TEMPLATE, write_adapter

PROMPT = {"chat": "none", "query": "Q: {query}\nA:"}


@pytest.fixture
def run(tiny_model, tmp_path):
    """(config, columns, work of 2 x 3 rows and the timing of one, lengths)."""
    config = RunConfig(name="t", model={"base": str(tiny_model)}, prompt=PROMPT, run_dir=str(tmp_path / "run"))
    folder, lengths = str(write_adapter(tmp_path / "a", tiny_model)), AnswerLengths(4, 2, one_line=True)
    columns = [Column("base", "", TEMPLATE, 0), Column("promptintern", folder, "", 0)]
    encoder = Generator(config.model, config.prompt, [], lengths).encoder
    prompts = {c.name: (encoder.prefix(c.template), [encoder.row(q) for q in ("red", "blue", "no")]) for c in columns}
    work = [work_item(c, prompts, rows) for c in columns for rows in ([0, 1], [2])]
    return config, columns, [*work, work_item(columns[1], prompts, [0], timed=True)], lengths


def test_its_answers_are_those_of_transformers(run, monkeypatch):
    config, columns, work, lengths = run
    monkeypatch.setattr(vllm_answers.vllm_batches, "answer_prompts", FakeVllm())
    generator = Generator(config.model, config.prompt, [columns[1].adapter], lengths)
    found = dict(answer_by_vllm(config, work[:4], lengths, [{"CPU": 1.0}]))
    assert found == {i: generator(item) for i, item in enumerate(work[:4])}


def test_vllm_answers_first_and_actors_time_and_probe(run, monkeypatch):
    config, columns, work, lengths = run
    fake, streamed = FakeVllm(), []

    def stream(items, make, *args, **options):
        streamed.append((items, len(fake.asked)))
        yield from ((place, "timed") for place in range(len(items)))

    monkeypatch.setattr(vllm_answers.vllm_batches, "answer_prompts", fake)
    monkeypatch.setattr(generation_workers, "stream", stream)
    monkeypatch.setattr(generation_workers.session, "connect", lambda: None)
    monkeypatch.setattr(generation_workers.placement, "cluster_nodes", lambda: [{"CPU": 2.0}])
    found = dict(run_work(config, columns, work, lengths, engine="vllm"))
    assert sorted(found) == [0, 1, 2, 3, 4] and found[4] == "timed"
    assert streamed == [([work[4]], 1)] and len(fake.asked[0]) == 6
    assert dict(run_work(config, columns, work, lengths)).keys() == found.keys() and len(fake.asked) == 1


def test_a_template_in_gist_tokens_needs_transformers(run, monkeypatch):
    config, columns, _, _ = run
    monkeypatch.setattr(vllm_answers.vllm_batches.vllm_options, "is_installed", lambda: True)
    assert engine_of_columns(config, [Column("gist", columns[1].adapter, "", 0, gist=4)]) == "transformers"


def test_an_answer_ends_where_that_of_transformers_does():
    assert cut_answer([5, 6, 2, 7], end=2, breaks=()) == [5, 6]
    assert cut_answer([9, 5, 9, 6], end=2, breaks={9}) == [9, 5, 9], "a line break before the answer ends nothing"
    assert cut_answer([5, 6], end=None, breaks={9}) == [5, 6]
