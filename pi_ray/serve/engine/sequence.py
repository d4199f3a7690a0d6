"""A request while the engine generates for it, and the queue that carries its tokens to the caller."""

import asyncio
from collections.abc import Sequence
from typing import Any

from pi_ray.protocols import GenerationRequest, Token
from pi_ray.serve.engine.prefix_cache import Prefix
from pi_ray.train.sampling import Sampler

Output = Token | Exception | None  # an exception ends the request with an error, None ends it


class GenerationSequence:
    """A request while the engine generates for it (vLLM's Sequence). Created in the caller's event loop."""

    def __init__(self, request: GenerationRequest, matcher: Any = None):
        self.request, self.matcher = request, matcher  # matcher: of request.grammar, None without one
        self.sampler = Sampler(request)
        self.prefix_namespace = f"{request.cache_salt}/{request.adapter_key}"  # within which it shares cached prefixes
        self.output_ids: list[int] = []
        self.max_length = len(request.prompt_ids) + request.max_new_tokens
        self.adapter_slot = 0  # in MultiLora
        self.prefix = Prefix()  # what the prefix cache has of its prompt
        self.states_at = 0  # position where the states of its layers are to be cached, since another prompt parts there
        self.skipped_steps = 0  # how often later requests went first, since there was no adapter slot or memory for it
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
