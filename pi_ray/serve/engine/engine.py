"""Generation for serving. `TransformersEngine` decodes with transformers in one background thread, all requests in one running batch (batch.py).

Requests join and leave at any step, whatever their adapters. Only the decoding thread touches the model, from its loading on: a second thread that
computes would have OpenMP threads of its own, and with more of these than cores libgomp no longer spins between operations, which here doubles the time of a step.
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
from pi_ray.serve.engine.scheduler import Batch
from pi_ray.serve.engine.sequence import Post, Row

MAX_FAILURES = 3  # failed passes in a row before the engine calls itself broken, so that Serve replaces the replica


class TransformersEngine:
    """Implements protocols.Engine. Loads the base model once, adapters on demand, at most `serve.max_loras` at a time."""

    def __init__(self, model: ModelConfig, serve: ServeConfig):
        self.tokenizer = load_tokenizer(model)
        self._post = Post()
        self._waiting: list[Row] = []
        self._calls: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._wake = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._decode, name="decode", daemon=True)
        self._batch: Batch | None = None
        self._thread.start()
        try:
            self._batch = self._call(lambda: Batch(load_model(model, "cuda" if torch.cuda.is_available() else "cpu"), self.tokenizer, serve, self._post))
        except BaseException:
            self.close()
            raise

    @property
    def active(self) -> int:
        """Requests in the engine, waiting or decoding."""
        return len(self._waiting) + len(self._batch.rows)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Token]:
        """Tokens as they come. Raises AdapterError when the adapter does not fit the base model. Closing the iterator frees the slot."""
        row = Row(request)
        with self._wake:
            if self._stopped:
                raise RuntimeError("the engine was closed")
            self._waiting.append(row)
            self._wake.notify()
        try:
            while (item := await row.queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            row.closed = True

    def merge(self, folder: str) -> None:
        """Before the first request: add this adapter into the base weights; no other one is served then. Raises AdapterError where it cannot be."""
        self._call(lambda: self._batch.stack.merge(folder))

    def stats(self) -> dict[str, Any]:
        """What is there now, and counts since the start."""
        batch, stack = self._batch, self._batch.stack
        return {
            "active": len(batch.rows), "waiting": len(self._waiting), "adapters": len(stack),
            "adapter_hits": stack.hits, "adapter_misses": stack.misses, "adapter_evictions": stack.evictions, **batch.counts,
            "adapter_bytes": stack.nbytes, "slot_bytes": batch.slots.nbytes, "prefix_bytes": batch.prefixes.nbytes,
        }  # fmt: skip

    def check(self) -> None:
        """Raise RuntimeError when no answer can be expected any more."""
        if self._stopped or self._batch.failures >= MAX_FAILURES:
            raise RuntimeError("the engine no longer generates")

    def close(self) -> None:
        """Stop decoding; requests under way end with an error."""
        with self._wake:
            self._stopped = True
            self._wake.notify()
        self._thread.join(timeout=10)

    def _call(self, work: Callable[[], Any]) -> Any:
        """What `work` returns or raises in the decoding thread, between two steps."""
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
                self._answer_calls()
                if not self._batch:
                    continue
                done = self._batch.admit(list(self._waiting))
                with self._wake:
                    self._waiting = [row for row in self._waiting if row not in done]
                again = self._batch.advance()
                with self._wake:
                    self._waiting[:0] = again
                self._post.send()
        finally:  # closed, or a bug: nobody is left waiting
            with self._wake:
                self._stopped = True
                for _, future in self._calls:
                    future.set_exception(RuntimeError("the engine was closed"))
            for row in [*self._waiting, *(self._batch.rows if self._batch else ())]:
                self._post.put(row, RuntimeError("the engine was closed"))
            self._post.send()

    def _answer_calls(self) -> None:
        with self._wake:
            calls, self._calls = self._calls, []
        for work, future in calls:
            try:
                future.set_result(work())
            except BaseException as error:  # the caller's to handle
                future.set_exception(error)

    def _has_work(self) -> bool:
        """Wait for a request; False once the engine is closed."""
        with self._wake:
            self._wake.wait_for(lambda: self._stopped or self._calls or self._waiting or (self._batch and self._batch.rows))
            return not self._stopped
