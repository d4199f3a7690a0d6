"""TransformersEngine: generates with transformers, all requests in one continuous batch that a thread decodes.

Requests come at any time and for many adapters; train/generation.py decodes whole data sets with one model. Only the
decoding thread touches the model, even to load it: a second one would have OpenMP threads of its own, and with more of
these than cores libgomp stops spinning between operations, which doubles the time of a step.
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from pi_ray.config import ModelConfig, ServeConfig
from pi_ray.models import load_model, load_tokenizer
from pi_ray.models.device import best_device
from pi_ray.protocols import GenerationRequest, Token
from pi_ray.serve.engine.matcher import MatcherFactory
from pi_ray.serve.engine.scheduler import Scheduler
from pi_ray.serve.engine.sequence import GenerationSequence

log = logging.getLogger("ray.serve")
MAX_FAILURES = 3  # faults of the engine itself in a row, after which check() raises and Serve replaces the replica


class TransformersEngine:
    """Implements protocols.Engine. Loads the base model once, adapters on demand, at most `serve.max_loras` of them."""

    def __init__(self, model: ModelConfig, serve: ServeConfig):
        self.tokenizer = load_tokenizer(model)
        self._matchers = MatcherFactory(self.tokenizer)
        self._grammar_thread = ThreadPoolExecutor(1, "grammar")
        self._lock = threading.Lock()  # of the three that follow
        self._waiting: list[GenerationSequence] = []
        self._stepping = False  # a step runs or is submitted
        self._stopped = False
        self._step_timeout, self._stepped_at = serve.step_timeout_s, time.monotonic()
        # OpenMP keeps its number of threads by thread, and this is a new one.
        self._thread = ThreadPoolExecutor(1, "decode", torch.set_num_threads, (torch.get_num_threads(),))
        def load_scheduler() -> Scheduler:
            device = best_device()
            # oneDNN's packed layers, which decode fastest on CPUs, are float32
            dtype = "float32" if device == "cpu" and model.dtype == "auto" else model.dtype
            return Scheduler(load_model(model.model_copy(update={"dtype": dtype}), device), self.tokenizer, serve)

        try:
            self._scheduler: Scheduler = self._call(load_scheduler)
        except BaseException:
            self.close()
            raise

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Token]:
        """Tokens as they come. Raises AdapterError where the adapter does not fit. Closing it frees the row."""
        matcher = None
        if request.grammar:
            in_thread = asyncio.get_running_loop().run_in_executor
            matcher = await in_thread(self._grammar_thread, self._matchers.matcher, request.grammar)
        sequence = GenerationSequence(request, matcher)
        with self._lock:
            if self._stopped:
                raise RuntimeError("the engine was closed")
            self._waiting.append(sequence)
            if not self._stepping:
                self._stepped_at = time.monotonic()
                self._thread.submit(self._step)
                self._stepping = True
        try:
            while (output := await sequence.queue.get()) is not None:
                if isinstance(output, Exception):
                    raise output
                yield output
        finally:
            sequence.closed = True

    def merge(self, folder: str) -> None:
        """Before the first request: merge this adapter into the base; it alone is served then. Raises AdapterError."""
        self._call(self._scheduler.multi_lora.merge, folder)

    def stats(self) -> dict[str, Any]:
        """Gauges of the present state, and counts since the start."""
        scheduler, lora = self._scheduler, self._scheduler.multi_lora
        return {
            "active": len(scheduler.running), "waiting": len(self._waiting), "adapters": len(lora),
            "adapter_hits": lora.hits, "adapter_misses": lora.misses, "adapter_evictions": lora.evictions,
            **scheduler.counts, "adapter_bytes": lora.nbytes, "kv_cache_bytes": scheduler.kv_cache.nbytes,
            "prefix_cache_bytes": scheduler.prefix_cache.nbytes,
        }

    def check(self) -> None:
        """Raise RuntimeError when no answer can be expected any more: faults in a row, or a step that does not end."""
        if self._stepping and time.monotonic() - self._stepped_at > self._step_timeout:
            raise RuntimeError(f"a decoding step has taken more than {self._step_timeout:g} s (serve.step_timeout_s)")
        if self._stopped or self._scheduler.failures >= MAX_FAILURES:
            raise RuntimeError("the engine no longer generates")

    def close(self) -> None:
        """Stop decoding; requests under way end with an error."""
        with self._lock:
            self._stopped = True
        self._grammar_thread.shutdown(wait=False, cancel_futures=True)
        self._thread.shutdown()

    def _call(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Return or raise what `work` does in the decoding thread, between two steps."""
        return self._thread.submit(torch.inference_mode()(work), *arguments).result()

    @torch.inference_mode()
    def _step(self) -> None:
        """Decode one step and submit the next, behind calls that came meanwhile."""
        self._stepped_at = time.monotonic()
        try:
            done = self._scheduler.admit(list(self._waiting))
            with self._lock:
                self._waiting = [sequence for sequence in self._waiting if sequence not in done]
            retry = self._scheduler.step()
            with self._lock:
                self._waiting[:0] = retry
                self._stepping = bool(self._waiting or self._scheduler.running)
                if self._stepping:
                    self._thread.submit(self._step)
        except BaseException:  # closed, which takes no further step, or a bug: nobody is left waiting
            with self._lock:
                if not self._stopped:
                    log.exception("decoding failed; the engine answers no more")
                self._stopped = True
            for sequence in [*self._waiting, *self._scheduler.running]:
                self._scheduler.outputs.put(sequence, RuntimeError("the engine was closed"))
        self._scheduler.outputs.flush()
