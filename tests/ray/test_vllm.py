"""vLLM itself behind Ray Data, with its build for CPUs (`make test-vllm`): answers of an evaluation, of a teacher and
of the base are those of transformers. Elsewhere the skip says what is missing.
"""

import importlib.util

import openai
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pi_ray.answer.base_teacher import BaseTeacher
from pi_ray.answer.vllm_base import answer_items
from pi_ray.cluster.placement import cluster_nodes
from pi_ray.cluster.storage_sync import StorageSync
from pi_ray.config import PromptConfig, RunConfig
from pi_ray.evaluate.columns import AnswerLengths, Column
from pi_ray.evaluate.generation_workers import run_work, work_item
from pi_ray.evaluate.vllm_answers import engine_of_columns
from pi_ray.models import load_tokenizer
from pi_ray.prompt import PromptEncoder
from pi_ray.run.directory import RunDir
from pi_ray.run.object_storage import ObjectStorage
from pi_ray.serve import app
from pi_ray.train.generation import generate_greedy
from pi_ray.train.launch import fingerprint_of, is_trained
from pi_ray.train.teacher_workers import answer_in_actors
from pi_ray.train.trainer import train_worker
from pi_ray.train.vllm_batches import VllmPrompt, processor_arguments
from tests.answering import ANSWER, write_answering_model
from tests.conftest import tiny
from tests.faults.service import free_port
from tests.lora import TEMPLATE, put_in_store, write_adapter
from tests.prepared import tiny_config
from tests.unit.answer.test_vllm_base import VIEWS
from tests.unit.train.test_distill import rows_of
from tests.unit.train.test_teacher_workers import made
from tests.unit.train.test_train import settings

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM did not answer: make test-vllm has it do so, on CPUs"
    ),
]
PROMPT = {"chat": "none", "query": "Q: {query}\nA:"}
QUERY = "what is red?"
PROMPTS = [VllmPrompt([1], [2], "", {"max_tokens": 1})]
COLOURS = ("red", "dark blue", "what is green?", "a grey one", "yellow or white", "the violet")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model with heads of a width that vLLM has attention for on CPUs."""
    return tiny(tmp_path_factory.mktemp("tiny-llama"), "Llama", head_dim=32)


class Evaluation:
    """The base with a prompt, and two adapters of other ranks: their answers to COLOURS by either engine."""

    def __init__(self, model, folder, **settings):
        self.config = RunConfig(
            name="t", model={"base": str(model)}, prompt=PROMPT, run_dir=str(folder / "run"),
            evaluate={"engine": "vllm"},
        ).replace(**settings)
        adapters = [str(write_adapter(RunDir(self.config.root).root / name, model, seed, rank)) for seed, (name, rank)
            in enumerate([("a", 4), ("b", 12)])]
        self.columns = [Column("base", "", TEMPLATE, 0), *(Column(a, a, "", 0) for a in adapters)]
        encoder = PromptEncoder(load_tokenizer(self.config.model), self.config.prompt)
        prompts = {c.name: (encoder.prefix(c.template), [encoder.row(q) for q in COLOURS]) for c in self.columns}
        self.work = [work_item(c, prompts, rows) for c in self.columns for rows in (range(4), range(4, 6))]
        assert engine_of_columns(self.config, self.columns) == "vllm"

    def answers(self, engine):
        return dict(run_work(self.config, self.columns, self.work, AnswerLengths(8, 2), engine=engine))


def test_an_evaluation_on_object_storage_gets_the_answers_of_transformers(model, tmp_path, ray_local):
    (tmp_path / "bucket").mkdir()
    with StorageSync(tmp_path / "run", ObjectStorage((tmp_path / "bucket").as_uri())).attach_driver():
        evaluation = Evaluation(model, tmp_path)
        mine, theirs = (evaluation.answers(engine) for engine in ("vllm", "transformers"))
    assert mine == theirs, "greedy, in float32, each column with its own adapter"
    assert len({str(mine[i]) for i in (0, 2, 4)}) == 3


def test_a_copy_over_two_processes_answers_as_one(model, tmp_path, ray_local):
    evaluation = Evaluation(model, tmp_path, **{"cluster.gpus_per_replica": 2})
    assert processor_arguments(evaluation.config, PROMPTS, [{"CPU": 2}])["engine_kwargs"]["tensor_parallel_size"] == 2
    assert evaluation.answers("vllm") == evaluation.answers("transformers"), "each layer is split, and summed up again"


def test_a_server_whose_copies_are_split_over_two_processes_answers_as_transformers(model, tmp_path, ray_local):
    from ray import serve

    config = RunConfig(
        name="t", store=str(tmp_path), model={"base": str(model)}, cluster={"gpus_per_replica": 2},
        serve={"engine": "vllm", "port": free_port(), "min_replicas": 1, "max_replicas": 1},
    )
    folders = [put_in_store(tmp_path, name, model, seed) for seed, name in enumerate(("a", "b"))]
    encoder = PromptEncoder(load_tokenizer(config.model), PromptConfig(chat="chatml", query="Q: {query}"))
    client = openai.OpenAI(base_url=f"{app.run_server(config, blocking=False)}/v1", api_key="none", timeout=120)
    try:
        for folder in folders:
            base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
            adapted = PeftModel.from_pretrained(base, folder).eval()
            [expected] = generate_greedy(adapted, [], [encoder.encode(QUERY)], 6, encoder.tokenizer.eos_token_id)
            messages = [{"role": "user", "content": QUERY}]
            answer = client.chat.completions.create(model=folder.parent.name, messages=messages, max_tokens=6)
            assert answer.choices[0].message.content == encoder.decode(expected)
    finally:
        serve.shutdown()


def test_a_teachers_answers_are_those_of_the_training_workers(model, tmp_path, ray_local):
    inside = made(model, tmp_path / "in")
    outside = made(model, tmp_path / "out", **{"train.distill.actors": True, "evaluate.engine": "vllm"})
    for config in (inside, outside):
        train_worker(settings(config))
    answer_in_actors(outside, fingerprint_of(outside), 6, lambda entry: None)
    for a, b in zip(rows_of(outside), rows_of(inside), strict=True):
        assert (a["labelled"], a["number"], a["label_ids"]) == (b["labelled"], b["number"], b["label_ids"])
        assert a["confidence"] == pytest.approx(b["confidence"], abs=0.3), "64 tokens of a flat distribution are noted"
    train_worker(settings(outside))
    assert is_trained(outside)


def test_a_bases_answers_are_those_of_an_actor(model, tmp_path, ray_local):
    config = tiny_config(model, tmp_path, **{"prompt.chat": "chatml", "model.dtype": "float32"})
    items = [{"rows": [[query, []] for query in some]} for some in (COLOURS[:4], COLOURS[4:])]
    mine = dict(answer_items(config, items, VIEWS, 6, cluster_nodes()))
    actor = BaseTeacher(config.model, config.prompt, VIEWS, 6)
    assert mine == {place: actor(item) for place, item in enumerate(items)}, "random weights: none of them ends"
    answering = tiny_config(write_answering_model(tmp_path / "answering", model), tmp_path, **{"prompt.chat": "chatml"})
    ((_, found),) = answer_items(answering, items[:1], VIEWS, 8, cluster_nodes())
    assert [(answer["text"], answer["ended"], answer["agreement"]) for answer in found] == [(ANSWER, True, 1.0)] * 4
    assert all(-5 < answer["confidence"] < 0 for answer in found)
