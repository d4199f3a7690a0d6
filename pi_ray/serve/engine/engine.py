"""TransformersEngine: generates for serving with transformers, all requests in one continuous batch (scheduler.py) that
a background thread decodes.

It is made for requests that arrive at any time and for many adapters at once; train/generation.py decodes whole data
sets with one model, for evaluation and teacher answers. Only the decoding thread touches the model, even to load it:
another thread that computes would have its own OpenMP threads, and with more of these than cores libgomp stops spinning
between operations, which doubles the time of a step.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import Any

import torch

from pi_ray.config import ModelConfig, ServeConfig
from pi_ray.models import load_model, load_tokenizer
from pi_ray.protocols import GenerationRequest, Token
from pi_ray.serve.engine.scheduler import Scheduler
from pi_ray.serve.engine.sequence import GenerationSequence, OutputQueue

# failed forward passes in a row before the engine calls itself broken, so that Serve replaces the replica
MAX_FAILURES = 3


class TransformersEngine:
    """Implements protocols.Engine. Loads the base model once, adapters on demand, at most `serve.max_loras` of them."""

    def __init__(self, model: ModelConfig, serve: ServeConfig):
        self.tokenizer = load_tokenizer(model)
        self._outputs = OutputQueue()
        self._waiting: list[GenerationSequence] = []
        self._calls: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._wake = threading.Condition()
        self._stopped = False
        self._loaded: Scheduler | None = None
        self._thread = threading.Thread(target=self._decode, name="decode", daemon=True)
        self._thread.start()

        def load_scheduler() -> Scheduler:
            base = load_model(model, "cuda" if torch.cuda.is_available() else "cpu")
            return Scheduler(base, self.tokenizer, serve, self._outputs)

        try:
            self._loaded = self._call(load_scheduler)
        except BaseException:
            self.close()
            raise

    @property
    def _scheduler(self) -> Scheduler:
        assert self._loaded, "the base model is not loaded yet"
        return self._loaded

    @property
    def active(self) -> int:
        """Requests in the engine, waiting or running."""
        return len(self._waiting) + len(self._scheduler.running)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Token]:
        """Tokens as they come. Raises AdapterError where the adapter does not fit. Closing it frees the row."""
        sequence = GenerationSequence(request)
        with self._wake:
            if self._stopped:
                raise RuntimeError("the engine was closed")
            self._waiting.append(sequence)
            self._wake.notify()
        try:
            while (output := await sequence.queue.get()) is not None:
                if isinstance(output, Exception):
                    raise output
                yield output
        finally:
            sequence.closed = True

    def merge(self, folder: str) -> None:
        """Before the first request: merge this adapter into the base; it alone is served then. Raises AdapterError."""
        self._call(lambda: self._scheduler.multi_lora.merge(folder))

    def stats(self) -> dict[str, Any]:
        """Gauges of the present state, and counts since the start."""
        scheduler, lora = self._scheduler, self._scheduler.multi_lora
        return {
            "active": len(scheduler.running), "waiting": len(self._waiting), "adapters": len(lora),
            "adapter_hits": lora.hits, "adapter_misses": lora.misses, "adapter_evictions": lora.evictions,
            **scheduler.counts, "adapter_bytes": lora.nbytes, "kv_cache_bytes": scheduler.kv_cache.nbytes,
            "prefix_cache_bytes": scheduler.prefix_cache.nbytes,
        }  # fmt: skip

    def check(self) -> None:
        """Raise RuntimeError when no answer can be expected any more."""
        if self._stopped or self._scheduler.failures >= MAX_FAILURES:
            raise RuntimeError("the engine no longer generates")

    def close(self) -> None:
        """Stop decoding; requests under way end with an error."""
        with self._wake:
            self._stopped = True
            self._wake.notify()
        self._thread.join(timeout=10)

    def _call(self, work: Callable[[], Any]) -> Any:
        """Return or raise what `work` does in the decoding thread, between two steps."""
        future: Future[Any] = Future()
        with self._wake:
            if self._stopped:
                raise RuntimeError("the engine was closed")
            self._calls.append((work, future))
            self._wake.notify()
        return future.result()

    @torch.inference_mode()
    def _decode(self) -> None:
        torch.set_num_threads(torch.get_num_threads())  # OpenMP keeps the number by thread, and this is a new one
        try:
            while self._has_work():
                self._run_calls()
                if not self._loaded:
                    continue
                done = self._loaded.admit(list(self._waiting))
                with self._wake:
                    self._waiting = [sequence for sequence in self._waiting if sequence not in done]
                retry = self._loaded.step()
                with self._wake:
                    self._waiting[:0] = retry
                self._outputs.flush()
        finally:  # closed, or a bug: nobody is left waiting
            with self._wake:
                self._stopped = True
                for _, future in self._calls:
                    future.set_exception(RuntimeError("the engine was closed"))
            for sequence in [*self._waiting, *(self._loaded.running if self._loaded else ())]:
                self._outputs.put(sequence, RuntimeError("the engine was closed"))
            self._outputs.flush()

    def _run_calls(self) -> None:
        with self._wake:
            calls, self._calls = self._calls, []
        for work, future in calls:
            try:
                future.set_result(work())
            except BaseException as error:  # raised again in the calling thread
                future.set_exception(error)

    def _has_work(self) -> bool:
        """Wait for work; False once the engine is closed."""

        def ready() -> bool:
            return bool(self._stopped or self._calls or self._waiting or (self._loaded and self._loaded.running))

        with self._wake:
            self._wake.wait_for(ready)
            return not self._stopped
