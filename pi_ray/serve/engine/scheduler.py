"""Continuous batching: which requests join the batch, which tokens the next step reads, which sequences finish.

    waiting --admit--> prefill (so many prompt tokens between two steps) --> decode (one token a step) --> finished

Only the engine's decoding thread calls it.
"""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from pi_ray.config import ServeConfig
from pi_ray.serve.engine.cache_choice import create_kv_cache
from pi_ray.serve.engine.kv_cache import kv_cache_limit, prefix_cache_limit
from pi_ray.serve.engine.matcher import mask_logits, take_token
from pi_ray.serve.engine.multi_lora import MultiLora, NoRoomError
from pi_ray.serve.engine.multi_lora_layer import BASE_SLOT
from pi_ray.serve.engine.onednn_linear import use_onednn_linears
from pi_ray.serve.engine.prefix_cache import BLOCK_SIZE, Prefix, PrefixCache
from pi_ray.serve.engine.refusal import RefusedError
from pi_ray.serve.engine.replica_options import DEFAULT_MAX_LORAS
from pi_ray.serve.engine.sequence import GenerationSequence, OutputQueue
from pi_ray.train.sampling import sample_tokens

log = logging.getLogger("ray.serve")
DEFAULT_PREFILL_TOKENS = {"cpu": 256}  # prompt tokens between two decoding steps, when serve.prefill_tokens is not set
IDLE_PREFILL_TOKENS = 2048  # the same on a GPU, and while no sequence decodes
MAX_SKIPPED_STEPS = 32  # how often later requests may go first while there is no adapter slot or memory for a request


class Scheduler:
    """`running` is in the order of the KV cache's rows: the first `num_decoding` decode, the others are in prefill."""

    def __init__(self, base: Any, tokenizer: Any, serve: ServeConfig):
        self.tokenizer, self.outputs = tokenizer, OutputQueue()
        eos = base.generation_config.eos_token_id
        self.eos_ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])}
        self.max_num_seqs = serve.max_ongoing_requests
        self.prefill_tokens = serve.prefill_tokens or DEFAULT_PREFILL_TOKENS.get(base.device.type, IDLE_PREFILL_TOKENS)
        max_loras, max_bytes = serve.max_loras or DEFAULT_MAX_LORAS, serve.max_lora_mb << 20
        self.multi_lora = MultiLora(base, max_loras, serve.max_lora_rank, max_bytes)
        self.kv_cache = create_kv_cache(base, self.multi_lora)
        use_onednn_linears(base)
        self.kv_cache_limit = kv_cache_limit(serve, base.device)  # bytes
        log.info("the KV cache may take %s MiB (serve.kv_cache_mb)", f"{self.kv_cache_limit / 2**20:,.1f}")
        limit = prefix_cache_limit(serve, base.device) if self.kv_cache.keeps_blocks else 0
        self.prefix_cache = PrefixCache(limit, self.kv_cache.needs_states)
        self.running: list[GenerationSequence] = []
        self.num_decoding = 0
        self.failures = 0  # forward passes in a row that failed by the engine's own fault
        self.counts = {"prompt_tokens": 0, "prefix_hit_tokens": 0, "generated_tokens": 0}

    def admit(self, waiting: Sequence[GenerationSequence]) -> set[GenerationSequence]:
        """Start prefills, first come first served, as far as rows, adapter slots and tokens go -> the sequences that no
        longer wait: admitted, closed by their caller, or failed because their adapter cannot be loaded.
        """
        done = {seq for seq in waiting if seq.closed}
        if self.num_decoding < len(self.running):  # a prefill is under way
            return done
        admitted: list[GenerationSequence] = []
        for seq in waiting:
            if seq in done or len(self.running) + len(admitted) >= self.max_num_seqs:
                continue
            if (size := self.kv_cache.bytes_alone(seq.max_length)) > self.kv_cache_limit:
                self.outputs.put(seq, self._too_large(seq, size))
                done.add(seq)
                continue
            if not self._has_kv_cache_for(seq, len(self.running) + len(admitted) + 1):
                if self._is_overdue(seq):
                    break
                continue
            in_use = {s.request.adapter_key for s in [*self.running, *admitted]}
            if not self.multi_lora.has_room_for(seq.request.adapter_key, in_use):
                if self._is_overdue(seq):
                    break
                continue
            self._find_prefix(seq)
            if admitted and not self._fit_in_one_pass([*admitted, seq]):
                break
            try:
                seq.adapter_slot = self.multi_lora.load(seq.request.adapter, in_use, seq.request.adapter_hash)
            except NoRoomError:
                continue  # has_room_for knows now how much it needs
            except Exception as error:
                self.outputs.put(seq, error)
            else:
                admitted.append(seq)
                self.kv_cache.planned = max(self.kv_cache.planned, seq.max_length)
            done.add(seq)
        self._start(sorted(admitted, key=lambda seq: seq.adapter_slot))
        return done

    def step(self) -> list[GenerationSequence]:
        """Prefill the next chunk of admitted prompts, then decode one token of every decoding sequence.

        Returns sequences that wait again: the prefill of several failed, and each is now to be tried alone.
        """
        self._finish([i for i, seq in enumerate(self.running) if seq.closed])
        retry = self._prefill() if self.num_decoding < len(self.running) else []
        self.outputs.flush()  # a first token need not wait for the other sequences' next ones
        if self.num_decoding:
            self._decode()
        return retry

    def _is_overdue(self, seq: GenerationSequence) -> bool:
        """Count that later requests may go first; after MAX_SKIPPED_STEPS times they may not."""
        seq.skipped_steps += 1
        return seq.skipped_steps > MAX_SKIPPED_STEPS

    def _has_kv_cache_for(self, seq: GenerationSequence, rows: int) -> bool:
        if self.kv_cache.bytes_for(rows, seq.max_length) <= self.kv_cache_limit:
            return True
        if self.kv_cache.bytes_for(rows, seq.max_length, True) > self.kv_cache_limit:
            return False
        self.kv_cache.compact()  # sequences that have left were longer or more
        return True

    def _too_large(self, seq: GenerationSequence, size: int) -> RefusedError:
        needs = f"{seq.max_length} tokens of prompt and answer need {size / 2**20:,.1f} MiB of KV cache"
        message = f"{needs}; this server has {self.kv_cache_limit / 2**20:,.1f} MiB (serve.kv_cache_mb)"
        return RefusedError(400, message, code="context_length_exceeded", param="max_tokens")

    def _fit_in_one_pass(self, admitted: Sequence[GenerationSequence]) -> bool:
        """Whether the uncached parts of these prompts, padded to the longest, fit in the token budget, and behind the
        longest cached part in the planned positions.
        """
        cached = [BLOCK_SIZE * len(seq.prefix.blocks) for seq in admitted]
        longest = max(len(seq.request.prompt_ids) - length for seq, length in zip(admitted, cached, strict=True))
        alone = any(seq.prefill_alone or seq.states_at for seq in admitted)
        if alone or longest * len(admitted) > self._token_budget():
            return False
        return max(cached) + longest <= max(self.kv_cache.planned, *(seq.max_length for seq in admitted))

    def _token_budget(self) -> int:
        return self.prefill_tokens if self.num_decoding else max(self.prefill_tokens, IDLE_PREFILL_TOKENS)

    def _start(self, admitted: Sequence[GenerationSequence]) -> None:
        """Give each sequence a row of the KV cache that begins with its cached blocks."""
        first = len(self.running)
        self.kv_cache.add_rows(len(admitted))
        self.running += admitted
        for row, seq in enumerate(admitted, start=first):
            self.counts["prompt_tokens"] += len(seq.request.prompt_ids)
            if seq.prefix.blocks:
                self.kv_cache.load_blocks(row, seq.prefix.blocks, seq.prefix.states)
                self.counts["prefix_hit_tokens"] += BLOCK_SIZE * len(seq.prefix.blocks)
            seq.prefix = Prefix()

    def _prefill(self) -> list[GenerationSequence]:
        first, sequences = self.num_decoding, self.running[self.num_decoding :]
        lengths = self.kv_cache.lengths[first:]
        rest = [seq.request.prompt_ids[length:] for seq, length in zip(sequences, lengths, strict=True)]
        chunks = [ids[: self._token_budget()] for ids in rest] if self.kv_cache.chunked_prefill else rest
        if (before := sequences[0].states_at - lengths[0]) > 0:  # alone
            chunks = [chunks[0][:before]]
        try:
            logits = self.kv_cache.forward(first, chunks, [seq.adapter_slot for seq in sequences])
            self.failures = 0
        except Exception as error:
            return self._fail_prefill(sequences, error)
        if len(chunks[0]) < len(rest[0]):  # only a sequence that was admitted alone is read in chunks
            self._cache_states(first, sequences[0])
            return []
        self.num_decoding = len(self.running)
        for row, seq in enumerate(sequences, start=first):
            copy_block = partial(self.kv_cache.copy_block, row)
            self.prefix_cache.add(seq.prefix_namespace, seq.request.prompt_ids, copy_block)
        self._append_tokens(first, logits)
        return []

    def _find_prefix(self, seq: GenerationSequence) -> None:
        seq.prefix = self.prefix_cache.find(seq.prefix_namespace, seq.request.prompt_ids)
        usable = BLOCK_SIZE * len(seq.prefix.blocks)
        seq.states_at = seq.prefix.known if seq.prefix.known > usable else 0

    def _cache_states(self, row: int, seq: GenerationSequence) -> None:
        """Cache the states of a prompt that was read so far, where its layers keep some and a block ends."""
        length = self.kv_cache.lengths[row]
        if self.prefix_cache.limit and self.prefix_cache.needs_states and length % BLOCK_SIZE == 0:
            copy_block, states = partial(self.kv_cache.copy_block, row), self.kv_cache.copy_states(row)
            self.prefix_cache.add(seq.prefix_namespace, seq.request.prompt_ids[:length], copy_block, states)

    def _fail_prefill(self, sequences: Sequence[GenerationSequence], error: Exception) -> list[GenerationSequence]:
        """One of several prompts may be the cause: each is tried again alone. One that was alone fails."""
        self._finish(range(self.num_decoding, len(self.running)))
        self._count_failure()
        if len(sequences) == 1:
            self.outputs.put(sequences[0], error)
            return []
        for seq in sequences:
            seq.prefill_alone = True
        return list(sequences)

    def _count_failure(self) -> None:
        """After a failed pass: a request's fault, unless a pass of one token by the bare base fails as well."""
        row = len(self.running)
        try:
            self.kv_cache.add_rows(1)
            try:
                self.kv_cache.forward(row, [[0]], [BASE_SLOT])
            finally:
                self.kv_cache.pop_row()
            self.failures = 0
        except Exception:
            self.failures += 1

    def _decode(self) -> None:
        decoding = self.running[: self.num_decoding]
        try:
            slots = [seq.adapter_slot for seq in decoding]
            logits = self.kv_cache.forward(0, [seq.output_ids[-1:] for seq in decoding], slots)
            self.failures = 0
        except Exception as error:
            for seq in decoding:
                self.outputs.put(seq, error)
            self._finish(range(len(decoding)))
            self._count_failure()
            return
        self._append_tokens(0, logits)

    def _append_tokens(self, first: int, logits: torch.Tensor) -> None:
        """Sample the next token of the sequences from `first` on, from `logits` (sequences, vocabulary)."""
        sequences = self.running[first : first + len(logits)]
        finished = []
        masked = mask_logits(logits, [seq.matcher for seq in sequences])
        tokens = sample_tokens(masked, [seq.sampler for seq in sequences], logits)
        for i, (seq, token) in enumerate(zip(sequences, tokens, strict=True), start=first):
            if token is None:
                self.outputs.put(seq, RuntimeError("the model's output is not a number; other requests go on"))
                finished.append(i)
                continue
            if seq.matcher and (error := take_token(seq.matcher, token.id)):
                self.outputs.put(seq, error)
                finished.append(i)
                continue
            seq.output_ids.append(token.id)
            self.counts["generated_tokens"] += 1
            self.outputs.put(seq, token)
            full = len(seq.output_ids) >= seq.request.max_new_tokens
            if token.id in self.eos_ids or full or self._ends_with_stop_string(seq):
                self.outputs.put(seq, None)
                finished.append(i)
        self._finish(finished)

    def _ends_with_stop_string(self, seq: GenerationSequence) -> bool:
        """Whether the last token completed a stop string, which has at most as many tokens as bytes."""
        stop = seq.request.stop
        if not stop:
            return False
        num_tokens = max(len(s.encode()) for s in stop) + 1
        tail = self.tokenizer.decode(seq.output_ids[-num_tokens:], skip_special_tokens=True)
        return any(s in tail for s in stop)

    def _finish(self, rows: Sequence[int]) -> None:
        """Free rows, given in order: the last decoding sequence moves there, and the last of all to where that was."""
        for i in reversed(rows):
            if i < self.num_decoding:
                self.num_decoding -= 1
                self._move(self.num_decoding, i)
                i = self.num_decoding
            self._move(len(self.running) - 1, i)
            self.kv_cache.pop_row()
            self.running.pop()
        self.kv_cache.planned = max((seq.max_length for seq in self.running), default=0)

    def _move(self, source: int, target: int) -> None:
        if source != target:
            self.kv_cache.move_row(source, target)
            self.running[target] = self.running[source]
