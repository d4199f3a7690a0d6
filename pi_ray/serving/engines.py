"""Generation for serving. `TransformersEngine` decodes with transformers and peft in one background thread.

Requests for the same adapter that wait at the same moment form a batch; batches of different adapters take turns, one token each.
Rows leave a batch as they finish. Only the decoding thread touches the model, so an adapter cannot leak into another one's step.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from pi_ray.config import ModelConfig, ServeConfig
from pi_ray.models import load_model, load_tokenizer
from pi_ray.protocols import GenerationRequest
from pi_ray.serving.loras import LoadedAdapters

MAX_FAILURES = 3  # failed steps in a row before the engine calls itself broken, so that Serve replaces the replica


class Slot:
    """One request in the engine: made in the caller's event loop, filled by the decoding thread."""

    def __init__(self, request: GenerationRequest):
        self.request = request
        self.tokens: list[int] = []
        self.closed = False  # the caller went away; the thread drops the row before its next step
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[int | Exception | None] = asyncio.Queue()
        self._generator: Any = None

    def put(self, item: int | Exception | None) -> None:
        """From the thread: a token, an error that ends the request, or None for the end."""
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
        except RuntimeError:  # the caller's event loop is gone
            self.closed = True

    async def get(self) -> int | Exception | None:
        return await self._queue.get()

    def pick(self, logits: Any) -> int:
        """The next token from one row of logits (vocabulary,). Its own random generator: a seed gives the same text in any batch."""
        import torch

        request = self.request
        if request.temperature <= 0:
            return int(logits.argmax())
        if self._generator is None:
            self._generator = torch.Generator()
            _ = self._generator.seed() if request.seed is None else self._generator.manual_seed(request.seed)
        probabilities, order = torch.softmax(logits.float().cpu() / request.temperature, -1).sort(descending=True)
        if request.top_p < 1:  # the smallest set of tokens that holds top_p, always with the first one
            probabilities = probabilities * (probabilities.cumsum(-1) - probabilities < request.top_p)
        return int(order[torch.multinomial(probabilities, 1, generator=self._generator)])


class Batch:
    """Rows that decode together with one adapter. `mask` (rows, length so far) hides the left padding."""

    def __init__(self, adapter: str, slots: list[Slot]):
        self.adapter = adapter
        self.slots = slots
        self.cache: Any = None
        self.mask: Any = None
        self.inputs: Any = None

    def logits(self, model: Any, pad: int) -> Any:
        """One forward pass -> the logits after each row's last token, (rows, vocabulary). The first pass reads the prompts."""
        import torch

        if self.cache is None:
            from transformers import DynamicCache

            self.cache = DynamicCache()
            width = max(len(s.request.prompt_ids) for s in self.slots)
            rows = [(width - len(s.request.prompt_ids), s.request.prompt_ids) for s in self.slots]
            self.inputs = torch.tensor([[pad] * gap + ids for gap, ids in rows], device=model.device)
            self.mask = torch.tensor([[0] * gap + [1] * len(ids) for gap, ids in rows], device=model.device)
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -self.inputs.shape[1] :]
        out = model(input_ids=self.inputs, attention_mask=self.mask, position_ids=positions, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1]

    def keep(self, rows: list[int]) -> None:
        """Drop every other row and feed the last tokens of the kept ones next."""
        import torch

        if len(rows) < len(self.slots):
            index = torch.tensor(rows, device=self.mask.device)
            self.cache.batch_select_indices(index)
            self.mask = self.mask[index]
            self.slots = [self.slots[i] for i in rows]
        self.inputs = torch.tensor([[s.tokens[-1]] for s in self.slots], device=self.mask.device)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(rows), 1)], -1)


class TransformersEngine:
    """Implements protocols.Engine. Loads the base model once, adapters on demand, at most `serve.max_loras` at a time."""

    def __init__(self, model: ModelConfig, serve: ServeConfig):
        import torch

        self.tokenizer = load_tokenizer(model)
        base = load_model(model, "cuda" if torch.cuda.is_available() else "cpu")
        own = base.generation_config.eos_token_id
        self._ends = {self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
        self._capacity = serve.max_ongoing_requests
        self._adapters = LoadedAdapters(base, serve.max_loras)
        self._waiting: deque[Slot] = deque()
        self._batches: list[Batch] = []
        self._wake = threading.Condition()
        self._stopped = False
        self._failures = 0
        self._thread = threading.Thread(target=self._decode, name="decode", daemon=True)
        self._thread.start()

    @property
    def active(self) -> int:
        """Requests in the engine, waiting or decoding."""
        return len(self._waiting) + sum(len(b.slots) for b in self._batches)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[int]:
        """Token ids as they come. Raises AdapterError when the adapter does not fit the base model. Closing the iterator frees the slot."""
        slot = Slot(request)
        with self._wake:
            self._waiting.append(slot)
            self._wake.notify()
        try:
            while (item := await slot.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            slot.closed = True

    def check(self) -> None:
        """Raise RuntimeError when no answer can be expected any more."""
        if not self._thread.is_alive() or self._failures >= MAX_FAILURES:
            raise RuntimeError("the engine no longer generates")

    def close(self) -> None:
        """Stop decoding; requests under way end with an error."""
        with self._wake:
            self._stopped = True
            self._wake.notify()
        self._thread.join(timeout=10)

    def _decode(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._stopped or self._waiting or self._batches)
                if self._stopped:
                    break
            self._admit()
            for batch in list(self._batches):
                self._step(batch)
        for slot in [*self._waiting, *(s for b in self._batches for s in b.slots)]:
            slot.put(RuntimeError("the engine was closed"))

    def _admit(self) -> None:
        """Make a batch of the requests that wait for one adapter: that of the first one that can be in memory now."""
        busy = {b.adapter for b in self._batches}
        free = self._capacity - sum(len(b.slots) for b in self._batches)
        with self._wake:
            self._waiting = deque(s for s in self._waiting if not s.closed)
            adapter = next((s.request.adapter for s in self._waiting if self._adapters.fits(s.request.adapter, busy)), None)
            slots = [s for s in self._waiting if s.request.adapter == adapter][: max(free, 0)]
            self._waiting = deque(s for s in self._waiting if s not in slots)
            if not slots:
                return
            batch = Batch(adapter, slots)
            self._batches.append(batch)
        try:
            self._adapters.load(adapter, busy)
        except Exception as error:
            self._fail(batch, error)

    def _step(self, batch: Batch) -> None:
        """One token for every row of the batch whose caller is still there."""
        import torch

        try:
            if all(s.closed for s in batch.slots):
                self._batches.remove(batch)
                return
            with torch.inference_mode():
                self._adapters.activate(batch.adapter)
                logits = batch.logits(self._adapters.model, self.tokenizer.pad_token_id or 0)
                rows = [i for i, slot in enumerate(batch.slots) if not self._give(slot, logits[i])]
                if rows:
                    batch.keep(rows)
                else:
                    self._batches.remove(batch)
            self._failures = 0
        except Exception as error:
            self._failures += 1
            self._fail(batch, error)

    def _give(self, slot: Slot, logits: Any) -> bool:
        """Hand the row's next token over; True when the row has ended."""
        if slot.closed:
            return True
        slot.tokens.append(slot.pick(logits))
        slot.put(slot.tokens[-1])
        ended = slot.tokens[-1] in self._ends or len(slot.tokens) >= slot.request.max_new_tokens or self._stops(slot)
        if ended:
            slot.put(None)
        return ended

    def _stops(self, slot: Slot) -> bool:
        """Whether the text holds a stop string that the last token completed; a stop string is at most as many tokens as bytes."""
        if not slot.request.stop:
            return False
        reach = max(len(s.encode()) for s in slot.request.stop) + 1
        tail = self.tokenizer.decode(slot.tokens[-reach:], skip_special_tokens=True)
        return any(s in tail for s in slot.request.stop)

    def _fail(self, batch: Batch, error: Exception) -> None:
        if batch in self._batches:
            self._batches.remove(batch)
        for slot in batch.slots:
            slot.put(error)
