"""Progressive fine-tuning inside one worker: through all phases without a restart or a reload of the model.

Needs torch.distributed alone (or nothing, for one worker), so that it runs under Ray Train, torchrun and in a test.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pi_ray import models
from pi_ray.cluster import storage_sync
from pi_ray.config import RunConfig
from pi_ray.errors import TrainingError
from pi_ray.protocols import UNLABELLED
from pi_ray.registry import backends
from pi_ray.run.artifact import digest, read_manifest, sweep
from pi_ray.run.directory import RunDir
from pi_ray.run.fingerprint import learned_from
from pi_ray.schedule import plan_phases
from pi_ray.train import checkpoint, distill, gist, lora, shared_prefix, trackers
from pi_ray.train.backends import MOMENTS
from pi_ray.train.batches import Batch, PhaseRows, differs, longest_of, manifest_of, packed, plain, to_device
from pi_ray.train.dataloader import Feed, Pack
from pi_ray.train.distill import Targets
from pi_ray.train.distributed import Group
from pi_ray.train.early_stopping import EarlyStop
from pi_ray.train.objectives import distill_sum, loss_and_hits, sft_sum
from pi_ray.train.train_log import TrainLog
from pi_ray.train.updates import Update, all_updates


def train_worker(settings: dict[str, Any]) -> None:
    """One worker's whole training. `settings`: config (RunConfig as JSON), fingerprint, device; torch.distributed is up, or there is one worker."""
    worker = _Worker(RunConfig.model_validate(settings["config"]), settings["fingerprint"], settings["device"], settings.get("report"))
    try:
        worker.run()
    finally:
        worker.close()


class _Worker:
    def __init__(self, config: RunConfig, fingerprint: str, device: str, report: Callable[[dict[str, Any]], None] | None):
        self.config, self.fingerprint, self.device = config, fingerprint, device
        self.report = report or (lambda metrics: None)
        self.dir = RunDir(config.root)
        self.group = Group(device)
        self.rank, self.world = self.group.rank, self.group.world
        self.log = TrainLog(self.dir.train_log, writes=self.rank == 0)
        phases = plan_phases(config.schedule)
        self.manifests = [manifest_of(self.dir.phase(i)) for i in range(len(phases))]
        self.dev = PhaseRows(self.dir.phase("dev"))
        self.own_dev = [PhaseRows(self.dir.phase(f"dev-{i}")) if config.train.early_stop else self.dev for i in range(len(phases))]
        self.updates = all_updates([m["rows"] for m in self.manifests], phases, config.train)
        self.ends = {u.phase: u.step + 1 for u in self.updates}  # how many updates are done with when a phase is
        self.optimised = 0  # updates that Adam's moments have seen
        self.early = EarlyStop(config.train.early_stop)
        self.micro = config.train.micro_batch or config.rows_per_worker
        self.backend = self._build()
        self.pack = self._packing()
        self.feed = Feed(config, fingerprint, self.updates, self.pack, self.rank, self.world)

    def run(self) -> None:
        done = self._resume()
        self.log.trim(done)
        self.log.follow(lambda: trackers.open_tracker(self.config, self.dir, done))
        while done < len(self.updates):
            update = self.updates[done]
            if update.index == 0 and update.phase and self.config.train.phase_transition == "reset":
                self._reset_optimizer()
            if update.phase and not self.feed.taught:
                self._teach(update)
            if self.feed.teaches and (update.phase, update.index) == (1, 0):
                manifest = read_manifest(self.dir.taught)
                self.log.add({"event": "taught", "step": update.step, **{key: manifest[key] for key in distill.SAID}})
            self._one(update)
            done = self._score(update)
            if (update.step + 1) % self.config.train.checkpoint_every == 0:
                self._checkpoint(update, done)
        self._finish()

    def close(self) -> None:
        self.feed.close()
        self.log.close()

    def _build(self) -> Any:
        """The backend, which calls `_model`."""
        backend, bf16 = backends[self.config.train.backend.name], models.dtype_of(self.config.model, self.device) == torch.bfloat16
        return backend(self._model, self.config.train, self.config.rows_per_worker // self.micro, bf16)

    def _model(self) -> Any:
        """The base with a fresh adapter, ready to train."""
        model = models.load_model(self.config.model, self.device)
        self.apart = shared_prefix.can_share_prefix(model, longest_of(self.dir.phases) + self.config.train.gist)
        model = lora.add_lora(model, self.config.train.lora, self.config.train.seed)
        self.started = lora.start(model, self.config.train.lora)
        if self.config.train.gist:
            gist.attach(model, self.config.train.gist)
        if self.config.train.gradient_checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.train()

    def _packing(self) -> Pack:
        """Rows behind one copy of their prefix where that is wanted and the model can, else plain batches, and the log says why."""
        train = self.config.train
        if not train.share_prefix:
            return plain
        reason = self.group.of_first(self.apart or differs(self.backend.model, self.device, shared_prefix.wants_flex(train.attention, self.device)))
        if train.gist and reason:
            raise TrainingError(f"model.base cannot be trained with gist tokens (train.gist), which need full attention in every layer: {reason}")
        if reason:
            self.log.add({"event": "plain_batches", "reason": reason})
        return plain if reason else packed

    def _one(self, update: Update) -> None:
        """One update over all workers."""
        started = time.monotonic()
        ready, train = self.feed[update], self.config.train
        torch.manual_seed(int(digest([train.seed, update.step, self.rank])[:15], 16))  # for dropout, the base model's own too
        counts = torch.zeros(3, dtype=torch.float64)
        for i, (batch, targets) in enumerate(ready.parts):
            loss = self._loss(to_device(batch, self.device), targets) / ready.answer_tokens
            counts += torch.tensor([float(loss.detach()), batch.tokens, batch.plain_tokens], dtype=torch.float64)
            self.backend.backward(loss, last=i + 1 == len(ready.parts))
        counts = self.group.sum(counts)
        if not torch.isfinite(counts[0]):  # summed over workers, so that all of them stop together
            raise TrainingError(f"loss is {counts[0]:.3g} at update {update.step} (phase {update.phase}); lower train.lr, and look for empty or broken rows")
        self.backend.step(update.lr)
        self.optimised += 1
        self.log.add({
            "step": update.step, "phase": update.phase, "epoch": update.epoch, "loss": round(counts[0].item(), 6), "lr": update.lr,
            "tokens": int(counts[1]), "plain_tokens": int(counts[2]), "seconds": round(time.monotonic() - started, 4), "time": round(time.time(), 3),
        })

    def _loss(self, batch: Batch, targets: Targets | None) -> torch.Tensor:
        """Summed over answer tokens."""
        if targets is None:
            return sft_sum(self.backend.model, batch)
        train = self.config.train
        return distill_sum(self.backend.model, batch, targets.to(self.device), 1.0 if train.objective == "distill" else train.distill.share)

    def _score(self, update: Update) -> int:
        """Take a dev score where one is due, and end the phase where it is over or gains no more. Returns how many updates are done with.

        With early stop a phase is scored under its own prompt: what it learns need not show under the last one's yet.
        """
        done, end, train = update.step + 1, self.ends[update.phase], self.config.train
        if done < end and not (train.dev_every and (update.index + 1) % train.dev_every == 0):
            return done
        if done < end or train.early_stop:
            loss, accuracy = self.dev_scores(self.own_dev[update.phase])
            stops = self.early.take((accuracy, loss), update.step, self.optimised, self._state)
            if done < end:
                self.log.add({"event": "dev", "phase": update.phase, "step": update.step, "dev_loss": round(loss, 6), "dev_accuracy": round(accuracy, 6)})
                if not stops:
                    return done
        self._end_phase(update)
        return end

    def _end_phase(self, update: Update) -> None:
        """Leave an adapter behind: the present one, or with early stop the one of the phase's best score, from which the next phase then goes on.

        Its card has dev scores under the last phase's prompt, by which phases are compared.
        """
        best = {}
        if self.early.state is not None:
            if self.early.step != update.step:
                self.backend.load_state(self.early.state, self.early.optimised)
                self.optimised = self.early.optimised
            best = {"best_step": self.early.step, "early": update.step + 1 < self.ends[update.phase]}
            self.early.forget()
        loss, accuracy = self.dev_scores(self.dev)
        weights = {name: value for name, value in self._state().items() if "/" not in name}
        if self.rank == 0:
            model = getattr(self.backend.model, "module", self.backend.model)
            card = lora.adapter_card(self.config, self.manifests, fingerprint=self.fingerprint, phase=update.phase, dev_loss=loss, dev_accuracy=accuracy)
            lora.save_adapter(self.dir.adapter(update.phase), model, weights, card, self.started)
        self.log.add({"event": "phase_end", "phase": update.phase, "step": update.step, "dev_loss": round(loss, 6), "dev_accuracy": round(accuracy, 6), **best})
        self.report({"phase": update.phase, "step": update.step, "dev_loss": loss})

    def _teach(self, update: Update) -> None:
        """At the border after the first phase: the teacher answers, each worker for its share of the rows."""
        train, started = self.config.train, time.monotonic()
        if train.distill.teacher == "adapter" and (update.phase, update.index) != (1, 0):
            raise TrainingError(
                f"{self.dir.taught}: what the teacher answered is missing or of another run, and the teacher has been trained on since; "
                f"delete {self.dir.checkpoints} to train again"
            )
        labelled, unlabelled = PhaseRows(self.dir.phase(0)), PhaseRows(self.dir.phase(f"{UNLABELLED}-0"))
        model, end = getattr(self.backend.model, "module", self.backend.model), models.load_tokenizer(self.config.model).eos_token_id
        view = lambda rows: to_device(self.pack(labelled.prefix, rows), self.device)  # noqa: E731
        shares = self.group.at_first(distill.lesson(model, labelled, unlabelled, train.distill, end, view, self.micro, self.rank, self.world))
        if self.rank == 0:
            distill.write(self.dir.taught, shares, train.distill, self.fingerprint, len(unlabelled), round(time.monotonic() - started, 1))
        self.group.wait()
        storage_sync.refresh(self.dir.root)
        self.feed.taught = True

    @torch.no_grad()
    def dev_scores(self, dev: PhaseRows) -> tuple[float, float]:
        """Mean cross-entropy (nats a token), and the share of tokens that are the likeliest one, of the answers of `dev` under its prompt."""
        self.backend.model.eval()
        mine, total = range(self.rank, len(dev), self.world), torch.zeros(2, dtype=torch.float64)
        rounds = -(-len(dev) // self.world)  # equal on every worker: sharded models need all of them in each forward
        for start in range(0, rounds, 8):
            numbers = list(mine[start : start + 8])
            batch = self.pack(dev.prefix + gist.ids(self.config.train.gist), dev.take(numbers or [0]))
            found = loss_and_hits(self.backend.model, to_device(batch, self.device))
            if numbers:
                total += torch.tensor(found, dtype=torch.float64)
        self.backend.model.train()
        loss, accuracy = (self.group.sum(total) / dev.label_lengths.sum()).tolist()
        return loss, accuracy

    def _state(self) -> checkpoint.State:
        """The backend's state, equal on every worker. Raises TrainingError, on all of them, where it holds no numbers any more: such a state is never written."""
        state = self.backend.state()
        if broken := [name for name, value in state.items() if not torch.isfinite(value).all()]:
            raise TrainingError(f"{broken[0]} (and {len(broken) - 1} more) became infinite or no number; lower train.lr or train.grad_clip")
        return state

    def _checkpoint(self, update: Update, done: int) -> None:
        state = self._state()
        if self.rank == 0:
            facts = {"optimised": self.optimised, "early": self.early.facts(), "learned_from": learned_from(self.config)}
            checkpoint.save(self.dir.checkpoints, state, done, self.fingerprint, self.config.train.keep_checkpoints, self.early.state, **facts)
        self.report({"phase": update.phase, "step": update.step})

    def _resume(self) -> int:
        """Updates already in the newest whole checkpoint, which is loaded; 0 when there is none. Rank 0 decides for all."""
        found = ""
        if self.rank == 0:
            sweep(self.dir.checkpoints)
            sweep(self.dir.adapters)
            warn = lambda text: self.log.add({"event": "warning", "text": text})  # noqa: E731
            found = str(checkpoint.newest(self.dir.checkpoints, self.fingerprint, learned_from(self.config), warn) or "")
        found = self.group.of_first(found)
        if not found:
            if self.config.train.init_adapter:
                self._start_from(Path(self.config.train.init_adapter))
            return 0
        state, manifest = checkpoint.load(Path(found))
        self.optimised = manifest.get("optimised", manifest["done"])
        self.backend.load_state(state, self.optimised)
        self.early.restore(manifest.get("early", {}), checkpoint.load_best(Path(found)))
        return manifest["done"]

    def _start_from(self, folder: Path) -> None:
        """An adapter's weights in place of fresh ones; the optimiser knows nothing of how they came about."""
        model = self.backend.model
        weights = lora.weights_of(folder, getattr(model, "module", model), self.config.model.base)
        self.backend.load_state({**weights, **{f"{key}/{name}": torch.zeros_like(value) for name, value in weights.items() for key in MOMENTS}}, 0)

    def _reset_optimizer(self) -> None:
        state = {name: torch.zeros_like(value) if "/" in name else value for name, value in self.backend.state().items()}
        self.backend.load_state(state, 0)
        self.optimised = 0

    def _finish(self) -> None:
        """Mark the best adapter; what a resume needs is needed no more."""
        if self.rank == 0:
            best, accuracy = lora.mark_best(self.dir, len(self.manifests))
            self.log.add({"event": "best", "phase": best, "step": len(self.updates) - 1, "dev_accuracy": round(accuracy, 6)})
            checkpoint.clear(self.dir.checkpoints)
