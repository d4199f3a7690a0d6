"""vLLM writes answers behind prompts or judges given ones, and notes the likeliest tokens at each place of them.

No process here sees a whole distribution, so that `noted_tokens` of each are taken; what they leave of the probability
is spread over the other tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pi_ray.config import RunConfig
from pi_ray.models import load_model_config, load_tokenizer
from pi_ray.train.answer_scores import Likeliest, noted_tokens
from pi_ray.train.vllm_batches import VllmPrompt, answer_prompts


@dataclass(frozen=True)
class GivenAnswer:
    """An answer behind `ids` behind `prefix`, for the base with the adapter in this folder ("": the base alone)."""

    prefix: Sequence[int]
    ids: Sequence[int]
    adapter: str
    label: Sequence[int]


class VllmReader:
    """The run's base in vLLM, on `nodes` with these resources. vLLM starts at each call of `write` and of `judge`."""

    def __init__(self, config: RunConfig, nodes: Sequence[Mapping[str, float]]):
        self.config, self.nodes = config, nodes
        self.end = load_tokenizer(config.model).eos_token_id
        self.vocabulary = load_model_config(config.model).get_text_config().vocab_size
        self.most = noted_tokens(config.train.distill.top_k)

    def write(
        self, prefix: Sequence[int], prompts: Sequence[Sequence[int]], adapter: str, limit: int
    ) -> Iterator[tuple[int, list[int], Likeliest]]:
        """Yield (place in `prompts`, the greedy answer, the likeliest tokens along it) as they are done.

        Its last token is the end, but where `limit` tokens were too few.
        """
        sampling = self._sampling(limit)
        asked = [VllmPrompt(prefix, ids, adapter, sampling) for ids in prompts]
        for place, answer in answer_prompts(self.config, asked, self.nodes) if asked else ():
            yield place, list(map(int, answer["generated_tokens"])), self._likeliest(answer["logprobs"])

    def judge(self, answers: Sequence[GivenAnswer]) -> Iterator[tuple[int, Likeliest]]:
        """Yield (place in `answers`, the likeliest tokens along it) as they are done.

        A place of an answer is a prompt of its own, of which vLLM writes one token: all but its end is in the cache.
        vLLM's log-probabilities of a prompt would need every token computed anew, and fail beside LoRA on CPUs.
        """
        sampling = self._sampling(1)
        places = [(n, at) for n, a in enumerate(answers) for at in range(len(a.label))]
        prompts = [
            VllmPrompt(a.prefix, [*a.ids, *a.label[:at]], a.adapter, sampling)
            for a in answers for at in range(len(a.label))
        ]
        noted: dict[int, dict[int, Any]] = {}
        for place, answer in answer_prompts(self.config, prompts, self.nodes) if prompts else ():
            n, at = places[place]
            along = noted.setdefault(n, {})
            along[at] = answer["logprobs"][0]
            if len(along) == len(answers[n].label):
                yield n, self._likeliest([along[i] for i in sorted(along)])
                del noted[n]

    def _sampling(self, max_tokens: int) -> dict[str, Any]:
        """The likeliest token at each place, and those that are noted."""
        return {
            "temperature": 0.0, "max_tokens": max_tokens, "stop_token_ids": [self.end], "ignore_eos": True,
            "detokenize": False, "logprobs": self.most,
        }

    def _likeliest(self, logprobs: Sequence[Mapping[Any, Mapping[str, Any]]]) -> Likeliest:
        """Take the same number of tokens from each place of vLLM's answer, which may add the token that it chose."""
        ranked = [sorted(((v["logprob"], int(k)) for k, v in p.items()), reverse=True)[: self.most] for p in logprobs]
        ids = torch.tensor([[token for _, token in place] for place in ranked], dtype=torch.int32)
        return Likeliest(ids, torch.tensor([[value for value, _ in place] for place in ranked]), self.vocabulary)
