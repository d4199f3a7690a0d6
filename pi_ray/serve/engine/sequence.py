"""A request while the engine generates for it (vLLM's Sequence), and the queue of its tokens to the caller."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from pi_ray.protocols import GenerationRequest, Token
from pi_ray.serve.engine.prefix_cache import Block
from pi_ray.serve.engine.sampling import Sampler

Output = Token | Exception | None  # an exception ends the request with an error, None ends it


class GenerationSequence:
    """Created in the caller's event loop; its output is filled in by the decoding thread."""

    def __init__(self, request: GenerationRequest):
        self.request = request
        self.sampler = Sampler.from_request(request)
        self.output_ids: list[int] = []
        self.adapter_slot = 0  # in MultiLora
        self.cached_blocks: list[Block] = []  # the blocks of its prompt that the prefix cache has
        self.skipped_steps = 0  # how often later requests went first because its adapter had no slot
        self.prefill_alone = False  # a prefill of several sequences, this one among them, failed
        self.closed = False  # the caller went away; the decoding thread drops the sequence before its next step
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[Output] = asyncio.Queue()


class OutputQueue:
    """Carries tokens from the decoding thread to the callers, with one call into each event loop a step."""

    def __init__(self) -> None:
        self._outputs: dict[Any, list[tuple[GenerationSequence, Output]]] = {}

    def put(self, sequence: GenerationSequence, output: Output) -> None:
        self._outputs.setdefault(sequence.loop, []).append((sequence, output))

    def flush(self) -> None:
        for loop, outputs in self._outputs.items():
            try:
                loop.call_soon_threadsafe(_deliver, outputs)
            except RuntimeError:  # the callers' event loop is closed
                for sequence, _ in outputs:
                    sequence.closed = True
        self._outputs = {}


def _deliver(outputs: Sequence[tuple[GenerationSequence, Output]]) -> None:
    for sequence, output in outputs:
        sequence.queue.put_nowait(output)
