"""The running batch: which requests join it, what is read next, who leaves. Called by the decoding thread alone.

    waiting ──> joining (prompt being read, so many tokens between two steps) ──> decoding (one token a step) ──> gone
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pi_ray.config import ServeConfig
from pi_ray.serve.engine.kv_cache import open_rows
from pi_ray.serve.engine.multi_lora import AdapterStack
from pi_ray.serve.engine.onednn_linear import pack
from pi_ray.serve.engine.prefix_cache import BLOCK, Prefixes
from pi_ray.serve.engine.sampling import pick
from pi_ray.serve.engine.sequence import Post, Row

MOST_LORAS = 16  # where serve.max_loras does not say
PREFILL = {"cpu": 256}  # prompt tokens between two steps, where serve.prefill_tokens does not say
IDLE_PREFILL = 2048  # the same on a GPU, and while nobody decodes
PATIENCE = 32  # steps that others may go first when an adapter finds no place


class Batch:
    """`rows` in the order of their slots: the first `decoding` of them decode, the others join."""

    def __init__(self, base: Any, tokenizer: Any, serve: ServeConfig, post: Post):
        self.tokenizer, self.post = tokenizer, post
        own = base.generation_config.eos_token_id
        self.ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
        self.most = serve.max_ongoing_requests
        self.prefill = serve.prefill_tokens or PREFILL.get(base.device.type, IDLE_PREFILL)
        self.stack = AdapterStack(base, serve.max_loras or MOST_LORAS)
        self.slots = open_rows(base, self.stack)
        pack(base)
        self.prefixes = Prefixes(serve.prefix_cache_mb << 20 if self.slots.splits else 0)
        self.rows: list[Row] = []
        self.decoding = 0
        self.failures = 0  # passes in a row that failed
        self.counts = {"prompt_tokens": 0, "prefix_hit_tokens": 0, "generated_tokens": 0}

    def admit(self, waiting: Sequence[Row]) -> set[Row]:
        """Let join, in order of arrival, as many as there are slots, adapters and tokens for. Returns those that wait no longer, failed ones among them."""
        done = {row for row in waiting if row.closed}
        if self.decoding < len(self.rows):
            return done
        joining: list[Row] = []
        for row in waiting:
            if row in done or len(self.rows) + len(joining) >= self.most:
                continue
            busy = {r.request.adapter for r in [*self.rows, *joining]}
            if not self.stack.fits(row.request.adapter, busy):
                row.waited += 1
                if row.waited > PATIENCE:
                    break
                continue
            row.known = self.prefixes.find(row.request.adapter, row.request.prompt_ids)
            if joining and not self._together([*joining, row]):
                break
            done.add(row)
            try:
                row.adapter = self.stack.load(row.request.adapter, busy)
            except Exception as error:
                self.post.put(row, error)
                continue
            joining.append(row)
        self._seat(sorted(joining, key=lambda r: r.adapter))
        return done

    def _together(self, joining: Sequence[Row]) -> bool:
        """Whether what is not known of their prompts can be read in one pass."""
        longest = max(len(r.request.prompt_ids) - BLOCK * len(r.known) for r in joining)
        return longest * len(joining) <= self._budget() and not any(r.alone for r in joining)

    def _budget(self) -> int:
        return self.prefill if self.decoding else max(self.prefill, IDLE_PREFILL)

    def _seat(self, joining: Sequence[Row]) -> None:
        first = len(self.rows)
        self.slots.add(len(joining))
        self.rows += joining
        for i, row in enumerate(joining):
            self.counts["prompt_tokens"] += len(row.request.prompt_ids)
            if row.known:
                self.slots.paste(first + i, row.known)
                self.counts["prefix_hit_tokens"] += BLOCK * len(row.known)
                row.known = []

    def advance(self) -> list[Row]:
        """Read the next piece of the prompts that join, then give every decoding row one token. Returns rows that have to join again, each alone."""
        for i in reversed(range(len(self.rows))):
            if self.rows[i].closed:
                self._leave(i)
        again = self._join() if self.decoding < len(self.rows) else []
        self.post.send()  # a first token need not wait for the others' next ones
        if self.decoding:
            self._step()
        return again

    def _join(self) -> list[Row]:
        first, rows = self.decoding, self.rows[self.decoding :]
        rest = [row.request.prompt_ids[have:] for row, have in zip(rows, self.slots.lengths[first:], strict=True)]
        chunks = [ids[: self._budget()] for ids in rest] if self.slots.splits else rest
        try:
            logits = self.slots.read(first, chunks, [row.adapter for row in rows])
            self.failures = 0
        except Exception as error:
            return self._split(rows, error)
        if len(chunks[0]) < len(rest[0]):  # only a row that joins by itself is read in pieces
            return []
        self.decoding = len(self.rows)
        for i, row in enumerate(rows, start=first):
            self.prefixes.add(row.request.adapter, row.request.prompt_ids, lambda start, stop, i=i: self.slots.copy(i, start, stop))
        self._give(first, logits)
        return []

    def _split(self, rows: Sequence[Row], error: Exception) -> list[Row]:
        """A pass over several prompts failed: one of them may be the cause. By itself, a row that fails is told."""
        self.failures += 1
        for i in reversed(range(self.decoding, len(self.rows))):
            self._leave(i)
        if len(rows) == 1:
            self.post.put(rows[0], error)
            return []
        for row in rows:
            row.alone = True
        return list(rows)

    def _step(self) -> None:
        rows = self.rows[: self.decoding]
        try:
            logits = self.slots.read(0, [row.tokens[-1:] for row in rows], [row.adapter for row in rows])
            self.failures = 0
        except Exception as error:
            self.failures += 1
            for i in reversed(range(self.decoding)):
                self.post.put(self.rows[i], error)
                self._leave(i)
            return
        self._give(0, logits)

    def _give(self, first: int, logits: torch.Tensor) -> None:
        """Hand the next token to the rows from `first` on; those that end leave."""
        rows = self.rows[first : first + len(logits)]
        ended = []
        for i, (row, token) in enumerate(zip(rows, pick(logits, [row.sampler for row in rows]), strict=True)):
            if token is None:
                self.post.put(row, RuntimeError("the model's output is not a number; with other requests it goes on"))
                ended.append(first + i)
                continue
            row.tokens.append(token.id)
            self.counts["generated_tokens"] += 1
            self.post.put(row, token)
            if token.id in self.ends or len(row.tokens) >= row.request.max_new_tokens or self._stops(row):
                self.post.put(row, None)
                ended.append(first + i)
        for i in reversed(ended):
            self._leave(i)

    def _stops(self, row: Row) -> bool:
        """Whether the text holds a stop string that the last token completed; a stop string is at most as many tokens as bytes."""
        stop = row.request.stop
        if not stop:
            return False
        reach = max(len(s.encode()) for s in stop) + 1
        tail = self.tokenizer.decode(row.tokens[-reach:], skip_special_tokens=True)
        return any(s in tail for s in stop)

    def _leave(self, i: int) -> None:
        """Free the slot of row i: the last decoding row moves there, and the last row of all where that one was."""
        if i < self.decoding:
            self.decoding -= 1
            self._move(self.decoding, i)
            i = self.decoding
        self._move(len(self.rows) - 1, i)
        self.slots.pop()
        self.rows.pop()

    def _move(self, source: int, target: int) -> None:
        if source != target:
            self.slots.move(source, target)
            self.rows[target] = self.rows[source]
