"""Progressive fine-tuning inside one worker: through all phases without a restart or a reload of the model.

Needs torch.distributed alone (or nothing, for one worker), so that it runs under Ray Train, torchrun and in a test.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pi_ray import models
from pi_ray.artifact import digest, is_current
from pi_ray.config import RunConfig
from pi_ray.errors import TrainingError
from pi_ray.protocols import UNLABELLED
from pi_ray.registry import backends
from pi_ray.rundir import RunDir, wants_unlabelled
from pi_ray.schedule import plan_phases
from pi_ray.train import attention, checkpoint, gist, lora, teach
from pi_ray.train.batches import Batch, PhaseRows, packed, plain, to_device
from pi_ray.train.objectives import distill_sum, loss_and_hits, sft_sum
from pi_ray.train.teach import Taught
from pi_ray.train.updates import Update, all_updates, batch_rows


def train_worker(settings: dict[str, Any]) -> None:
    """One worker's whole training. `settings`: config (RunConfig as JSON), fingerprint, device; torch.distributed is up, or there is one worker."""
    worker = _Worker(RunConfig.model_validate(settings["config"]), settings["fingerprint"], settings["device"], settings.get("report"))
    worker.run()


class _Worker:
    def __init__(self, config: RunConfig, fingerprint: str, device: str, report: Callable[[dict[str, Any]], None] | None):
        self.config, self.fingerprint, self.device = config, fingerprint, device
        self.report = report or (lambda metrics: None)
        self.dir = RunDir(config.root)
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.phases = plan_phases(config.schedule)
        self.data = [PhaseRows(self.dir.phase(i)) for i in range(len(self.phases))]  # memory-mapped now, so that no border waits for its rows
        self.teaches = wants_unlabelled(config)
        self.unlabelled = [PhaseRows(self.dir.phase(f"{UNLABELLED}-{i}")) for i in range(len(self.phases))] if self.teaches else []
        self.dev = PhaseRows(self.dir.phase("dev"))
        self.updates = all_updates([len(d) for d in self.data], self.phases, config.train)
        self.taught: dict[int, Taught] = {}  # of the phase that is going on
        self.micro = config.train.micro_batch or config.rows_per_worker
        self.pack = packed if config.train.share_prefix else plain
        self.backend = self._build()

    def run(self) -> None:
        done = self._resume()
        self._trim_log(done)
        for update in self.updates[done:]:
            if update.index == 0 and update.phase and self.config.train.border == "reset":
                self._reset_optimizer()
            if self.teaches and update.phase and not is_current(self.dir.taught, self.fingerprint):
                self._teach(update)
            self._one(update)
            if update.step + 1 == len(self.updates) or self.updates[update.step + 1].phase != update.phase:
                self._end_phase(update)
            if (update.step + 1) % self.config.train.checkpoint_every == 0:
                self._checkpoint(update)
        self._finish()

    def _build(self) -> Any:
        """The backend, which calls `_model`."""
        backend, bf16 = backends[self.config.train.backend.name], models.dtype_of(self.config.model, self.device) == torch.bfloat16
        return backend(self._model, self.config.train, self.config.rows_per_worker // self.micro, bf16)

    def _model(self) -> Any:
        """The base with a fresh adapter, ready to train."""
        model = models.load_model(self.config.model, self.device)
        reason = attention.can_share_prefix(model.config)
        if self.config.train.gist and reason:
            raise TrainingError(f"model.base cannot be trained with gist tokens (train.gist), which need full attention in every layer: {reason}")
        if self.pack is packed and reason:
            self._log({"event": "plain_batches", "reason": reason})
            self.pack = plain
        if self.pack is packed:
            attention.enable(model)
        model = lora.add_lora(model, self.config.train.lora, self.config.train.seed)
        self.started = lora.start(model, self.config.train.lora)
        if self.config.train.gist:
            gist.attach(model, self.config.train.gist)
        if self.config.train.gradient_checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.train()

    def _one(self, update: Update) -> None:
        """One update over all workers."""
        started = time.monotonic()
        data, train = self._rows(update.phase), self.config.train
        rows = batch_rows(update, len(data), train)
        answer_tokens = int(data.label_lengths[rows].sum())
        if train.lora.dropout:
            torch.manual_seed(int(digest([train.seed, update.step, self.rank])[:15], 16))
        mine, counts = rows[self.rank :: self.world], torch.zeros(3, dtype=torch.float64)
        for start in range(0, len(mine), self.micro):
            batch, loss = self._loss(data, mine[start : start + self.micro])
            loss = loss / answer_tokens
            counts += torch.tensor([float(loss.detach()), batch.tokens, batch.plain_tokens], dtype=torch.float64)
            self.backend.backward(loss, last=start + self.micro >= len(mine))
        counts = self._sum(counts)
        if not torch.isfinite(counts[0]):  # summed over workers, so that all of them stop together
            raise TrainingError(f"loss is {counts[0]:.3g} at update {update.step} (phase {update.phase}); lower train.lr, and look for empty or broken rows")
        self.backend.step(update.lr)
        self._log({
            "step": update.step, "phase": update.phase, "epoch": update.epoch, "loss": round(counts[0].item(), 6), "lr": update.lr,
            "tokens": int(counts[1]), "plain_tokens": int(counts[2]), "seconds": round(time.monotonic() - started, 4), "time": round(time.time(), 3),
        })

    def _rows(self, phase: int) -> PhaseRows | Taught:
        """The rows of a phase; after the first one with what the teacher answered, if there is one."""
        if not self.teaches or not phase:
            return self.data[phase]
        if self.taught.get(phase) is None:
            self.taught = {phase: Taught(self.dir.taught, self.data[phase], self.unlabelled[phase], self.config.train.distill.confidence)}
        return self.taught[phase]

    def _loss(self, data: PhaseRows | Taught, numbers: list[int]) -> tuple[Batch, torch.Tensor]:
        """The batch of these rows, and its loss summed over answer tokens."""
        batch = self._batch(data, numbers)
        if not isinstance(data, Taught):
            return batch, sft_sum(self.backend.model, batch)
        train = self.config.train
        return batch, distill_sum(self.backend.model, batch, data.targets(numbers).to(self.device), 1.0 if train.objective == "distill" else train.distill.share)

    def _teach(self, update: Update) -> None:
        """At the border after the first phase: the teacher answers, each worker for its share of the rows."""
        train, started = self.config.train, time.monotonic()
        if train.distill.teacher == "adapter" and (update.phase, update.index) != (1, 0):
            raise TrainingError(
                f"{self.dir.taught}: what the teacher answered is missing or of another run, and the teacher has been trained on since; "
                f"delete {self.dir.checkpoints} to train again"
            )
        model, labelled, unlabelled = getattr(self.backend.model, "module", self.backend.model), self.data[0], self.unlabelled[0]
        limit, end = math.ceil(labelled.tokens["label_max"] * 1.25), models.load_tokenizer(self.config.model).eos_token_id
        view = lambda rows: to_device(self.pack(labelled.prefix, rows), self.device)  # noqa: E731
        model.eval()
        with model.disable_adapter() if train.distill.teacher == "base" else nullcontext():
            with attention.ordinary(model.get_base_model()) if self.pack is packed else nullcontext():
                answers = teach.answer(model, unlabelled, range(self.rank, len(unlabelled), self.world), limit, end)
            mine = [
                *teach.judge(model, view, labelled, teach.labels(labelled, range(self.rank, len(labelled), self.world)), train.distill.top_k, self.micro),
                *teach.judge(model, view, unlabelled, answers, train.distill.top_k, self.micro),
            ]
        model.train()
        entries = self._gathered(mine)
        if self.rank == 0:
            kept = teach.write(self.dir.taught, entries, train.distill, self.fingerprint)
            facts = {"queries": len(unlabelled), "answered": len(entries) - len(labelled), "kept": kept}
            self._log({"event": "taught", "step": update.step, **facts, "seconds_teaching": round(time.monotonic() - started, 1)})
        if self.world > 1:
            dist.barrier()

    def _gathered(self, mine: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The entries of all workers, on each."""
        if self.world == 1:
            return mine
        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, mine)
        return [entry for part in parts for entry in part]

    def _batch(self, data: PhaseRows | Taught, numbers: list[int]) -> Batch:
        return to_device(self.pack(data.prefix + gist.ids(self.config.train.gist), data.take(numbers)), self.device)

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        if self.world > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values.cpu()

    @torch.no_grad()
    def dev_scores(self) -> tuple[float, float]:
        """Mean cross-entropy (nats a token), and the share of tokens that are the likeliest one, of dev answers under the last phase's prompt."""
        self.backend.model.eval()
        mine, total = range(self.rank, len(self.dev), self.world), torch.zeros(2, dtype=torch.float64)
        rounds = -(-len(self.dev) // self.world)  # equal on every worker: sharded models need all of them in each forward
        for start in range(0, rounds, 8):
            numbers = list(mine[start : start + 8])
            found = loss_and_hits(self.backend.model, self._batch(self.dev, numbers or [0]))
            if numbers:
                total += torch.tensor(found, dtype=torch.float64)
        self.backend.model.train()
        loss, accuracy = (self._sum(total) / self.dev.label_lengths.sum()).tolist()
        return loss, accuracy

    def _end_phase(self, update: Update) -> None:
        loss, accuracy = self.dev_scores()
        weights = {name: value for name, value in self.backend.state().items() if "/" not in name}
        if self.rank == 0:
            first, last, gists = self.data[0].tokens, self.data[-1].tokens, self.config.train.gist
            card = lora.adapter_card(
                self.config, fingerprint=self.fingerprint, phase=update.phase, rate=self.data[-1].rate, shots=self.data[-1].shots, template=self.data[-1].template,
                full_template_sha256=digest(self.data[0].template), full_prompt_tokens=round(first["prefix"] + first["row_mean"]),
                query_prompt_tokens=round((gists or last["prefix"]) + last["row_mean"]), max_answer_tokens=int(last["label_max"]), dev_loss=loss, dev_accuracy=accuracy,
                **({"gist": gists} if gists else {}),
            )
            model = self.backend.model
            lora.save_adapter(self.dir.adapter(update.phase), getattr(model, "module", model), weights, card, self.started)
        self._log({"event": "phase_end", "phase": update.phase, "step": update.step, "dev_loss": round(loss, 6), "dev_accuracy": round(accuracy, 6)})
        self.report({"phase": update.phase, "step": update.step, "dev_loss": loss})

    def _checkpoint(self, update: Update) -> None:
        state = self.backend.state()
        if self.rank == 0:
            checkpoint.save(self.dir.checkpoints, state, update.step + 1, self.fingerprint, self.config.train.keep_checkpoints)
        self.report({"phase": update.phase, "step": update.step})

    def _resume(self) -> int:
        """Updates already in the newest whole checkpoint, which is loaded; 0 when there is none. Rank 0 decides for all."""
        found = [str(checkpoint.newest(self.dir.checkpoints, self.fingerprint) or "") if self.rank == 0 else ""]
        if self.world > 1:
            dist.broadcast_object_list(found, device=torch.device(self.device))
        if not found[0]:
            return 0
        state, done = checkpoint.load(Path(found[0]))
        self.backend.load_state(state, done)
        return done

    def _reset_optimizer(self) -> None:
        state = {name: torch.zeros_like(value) if "/" in name else value for name, value in self.backend.state().items()}
        self.backend.load_state(state, 0)

    def _finish(self) -> None:
        """Link `best` to the phase adapter with the highest dev accuracy (the later one of equals); what a resume needs is needed no more.

        Not the lowest loss: an adapter that has learned more is surer of what it cannot know, and a few such answers outweigh all the others.
        """
        if self.rank:
            return
        cards = [json.loads((self.dir.adapter(i) / lora.CARD).read_text()) for i in range(len(self.phases))]
        best = max(range(len(cards)), key=lambda i: (cards[i]["dev_accuracy"], i))
        link = self.dir.adapters / ".best.tmp"
        link.unlink(missing_ok=True)
        link.symlink_to(self.dir.adapter(best).name)
        os.replace(link, self.dir.best)
        checkpoint.clear(self.dir.checkpoints)

    def _trim_log(self, done: int) -> None:
        """Drop what the log says of updates that will be done again."""
        if self.rank == 0 and self.dir.train_log.exists():
            kept = [line for line in self.dir.train_log.read_text().splitlines() if line and json.loads(line).get("step", -1) < done]
            self.dir.train_log.write_text("".join(line + "\n" for line in kept))

    def _log(self, entry: dict[str, Any]) -> None:
        if self.rank == 0:
            with open(self.dir.train_log, "a") as f:
                f.write(json.dumps(entry) + "\n")
