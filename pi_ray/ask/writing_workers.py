"""Writing on this cluster: Ray Data actors that load the base once, with the writer's adapter, and sample replies."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from pi_ray.ask.requests import WriteRequest
from pi_ray.cluster import placement, session, storage_sync
from pi_ray.config import ModelConfig, PromptConfig, RunConfig
from pi_ray.data.ray_map import stream
from pi_ray.models import line_break_ids, load_tokenizer
from pi_ray.prompt import PromptEncoder
from pi_ray.protocols import GenerationRequest
from pi_ray.train.generation import compute_prefix_cache, generate
from pi_ray.train.lora import load_adapter
from pi_ray.train.replicas import generation_workers, load_for_generation
from pi_ray.train.sampling import Sampler, choose_sampled

BATCH_ROWS = 32  # replies written at once


def write_locally(
    config: RunConfig, requests: Sequence[WriteRequest], prompt: PromptConfig, prefix: str, adapter: str, limit: int,
    one_line: bool = False,
) -> Iterator[tuple[int, str]]:
    """Yield (place in `requests`, reply) as they are written, each of `limit` tokens for each of its queries.

    `prefix` is a text that stands before every prompt; `adapter` a folder, or "" for the base alone; with `one_line` a
    reply goes on where the prompt ends, and is one line.
    """
    session.connect()
    actors, options = generation_workers(config, placement.cluster_nodes())
    batches = [range(len(requests))[i : i + BATCH_ROWS] for i in range(0, len(requests), BATCH_ROWS)]
    items = [{
        "prompts": [requests[i].prompt for i in batch], "seeds": [requests[i].seed for i in batch],
        "limit": limit * max(requests[i].count for i in batch),
    } for batch in batches]
    for place, replies in stream(
        items, WritingWorker, config.model, prompt, prefix, adapter, config.ask.temperature, config.ask.top_p,
        one_line, actors=actors, sync=storage_sync.sync_for(config.root), **options,
    ):
        yield from zip(batches[place], replies, strict=True)


class WritingWorker:
    """A Ray Data actor. Called with prompts and the seeds of their replies, and the most tokens of one."""

    def __init__(
        self, settings: ModelConfig, prompt: PromptConfig, prefix: str, adapter: str, temperature: float, top_p: float,
        one_line: bool = False,
    ):
        self.encoder = PromptEncoder(load_tokenizer(settings), prompt)
        self.request = GenerationRequest([], 0, temperature=temperature, top_p=top_p)
        self.model = load_for_generation(settings)
        if adapter:
            self.model = load_adapter(self.model, adapter).eval()
            if not settings.quantize:  # merged, it takes no time of its own
                self.model = self.model.merge_and_unload()
        self.breaks = line_break_ids(self.encoder.tokenizer) if one_line else frozenset()
        self.prefix = self.encoder.prefix(prefix)
        self.cache = compute_prefix_cache(self.model, self.prefix)

    def __call__(self, work: dict[str, Any]) -> list[str]:
        samplers = [Sampler(replace(self.request, seed=seed)) for seed in work["seeds"]]
        end = self.encoder.tokenizer.eos_token_id
        choose = choose_sampled(samplers, end)
        rows = [self.encoder.row(prompt) for prompt in work["prompts"]]
        if self.breaks:
            rows = [row[: len(row) - len(self.encoder.tail_ids)] for row in rows]
        replies = generate(self.model, self.prefix, rows, work["limit"], end, self.cache, self.breaks, choose)
        return [self.encoder.decode(ids) for ids in replies]
