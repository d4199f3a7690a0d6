"""The engine that generates an evaluation's answers: vLLM where it is installed and can, or transformers."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pi_ray.config import RunConfig
from pi_ray.evaluate.columns import AnswerLengths, Column
from pi_ray.models import line_break_ids, load_tokenizer
from pi_ray.train import vllm_batches
from pi_ray.train.generation import cut_answer
from pi_ray.train.vllm_batches import VllmPrompt


def engine_of_columns(config: RunConfig, columns: Sequence[Column]) -> str:
    """The engine that answers these columns: "vllm" or "transformers". Raises ConfigError for a vllm that cannot."""
    gist = any(c.gist for c in columns)
    reason = "gist tokens stand for a template, and vLLM has no place for their keys and values" if gist else ""
    return vllm_batches.choose_engine(config, list(dict.fromkeys(c.adapter for c in columns if c.adapter)), reason)


def answer_by_vllm(
    config: RunConfig, work: Sequence[dict[str, Any]], lengths: AnswerLengths, nodes: Sequence[Mapping[str, float]],
    actors: int = 0,
) -> Iterator[tuple[int, list[list[int]]]]:
    """As evaluation's Generator answers `work`: yield (place in it, output ids of its prompts)."""
    tokenizer = load_tokenizer(config.model)
    end, breaks = tokenizer.eos_token_id, line_break_ids(tokenizer) if lengths.one_line else frozenset[int]()
    sampling = {
        "temperature": 0.0, "max_tokens": lengths.limit, "stop_token_ids": [end], "ignore_eos": True,
        "detokenize": False,
    }
    places = [(i, n) for i, item in enumerate(work) for n in range(len(item["prompts"]))]
    prompts = [
        VllmPrompt(work[i]["prefix"], work[i]["prompts"][n], work[i]["adapter"], sampling) for i, n in places
    ]
    missing = [len(item["prompts"]) for item in work]
    outputs: list[list[list[int]]] = [[[]] * count for count in missing]
    for place, answer in vllm_batches.answer_prompts(config, prompts, nodes, actors):
        i, n = places[place]
        outputs[i][n] = cut_answer(answer["generated_tokens"], end, breaks)
        missing[i] -= 1
        if not missing[i]:
            yield i, outputs[i]
