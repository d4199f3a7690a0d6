"""Progressive fine-tuning inside one worker: all phases in a row, without a restart or a reload of the base model.

It needs torch.distributed alone, or nothing with one worker, so it runs under Ray Train, torchrun and in a test.
"""

import math
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from pi_ray import models
from pi_ray.config import RunConfig
from pi_ray.errors import TrainingError
from pi_ray.registry import backends
from pi_ray.run.artifact import digest, remove_leftovers
from pi_ray.run.directory import RunDir
from pi_ray.run.fingerprint import learning_settings
from pi_ray.schedule import plan_phases
from pi_ray.train import batches, checkpoint, distill, gist, lora, shared_prefix, trackers
from pi_ray.train.backends import MOMENTS
from pi_ray.train.batches import Batch, PhaseDataset, to_device
from pi_ray.train.dataloader import TrainDataLoader, UpdateBatches
from pi_ray.train.dev_scores import DevScorer, DevScores
from pi_ray.train.distilled_rows import Targets
from pi_ray.train.distributed import WorkerGroup
from pi_ray.train.early_stopping import EarlyStop
from pi_ray.train.objectives import distill_loss, loss_and_correct, sft_loss
from pi_ray.train.packing import choose_packing
from pi_ray.train.teacher_adapter import adopt_teacher
from pi_ray.train.teaching import Teaching
from pi_ray.train.train_log import TrainLog
from pi_ray.train.updates import Update, plan_updates

DEV_ROWS = 8  # dev rows of one forward pass


def train_worker(settings: dict[str, Any]) -> None:
    """Train in this process, as one worker. torch.distributed is initialised, or there is one worker alone.

    `settings`: config (RunConfig as JSON), fingerprint, device, and `report`, which gets metrics after each save.
    """
    config = RunConfig.model_validate(settings["config"])
    with closing(Trainer(config, settings["fingerprint"], settings["device"], settings.get("report"))) as trainer:
        trainer.train()


class Trainer:
    """The training of one run: base model, adapter, optimiser, data loader, log and checkpoints of one worker."""

    def __init__(self, config: RunConfig, fingerprint: str, device: str, report: Callable[..., Any] | None):
        self.config, self.fingerprint, self.device = config, fingerprint, device
        self.report = report or (lambda metrics: None)
        self.dir, self.group = RunDir(config.root), WorkerGroup(device)
        self.rank, self.world = self.group.rank, self.group.world
        self.group.refuse_other_versions(lora.PACKAGES)
        self.log = TrainLog(self.dir.train_log, writes=self.rank == 0)
        phases = plan_phases(config.schedule)
        self.manifests = [batches.dataset_manifest(self.dir.phase(i)) for i in range(len(phases))]
        self.dev = PhaseDataset(self.dir.phase("dev"))  # under the last phase's prompt
        self.phase_dev = [self.dev] * len(phases)
        if config.train.early_stop:  # under each phase's own prompt: the last one's need not show its gain yet
            self.phase_dev = [PhaseDataset(self.dir.phase(f"dev-{i}")) for i in range(len(phases))]
        self.updates = plan_updates([m["rows"] for m in self.manifests], phases, config.train)
        self.ends = {u.phase: u.step + 1 for u in self.updates}  # phase -> the first step after it
        self.adam_updates = 0  # updates that Adam's moments have seen
        self.early = EarlyStop(config.train.early_stop)
        self.scorer = DevScorer(config)
        rows = config.train.rows_of_worker(self.world)
        micro_batches = -(-rows // (config.train.micro_batch or rows))
        bf16 = models.model_dtype(config.model, device) == torch.bfloat16
        self.backend = backends[config.train.backend.name](self.build_model, config.train, micro_batches, bf16)
        self.pack, why_not_packed = choose_packing(
            self.backend.model, config.train, device, self.longest_row, self.plain_batch_reason,
            self.group.broadcast_from_rank0,
        )
        if why_not_packed:
            self.log.add(why_not_packed)
        self.dataloader = TrainDataLoader(config, fingerprint, self.updates, self.pack, self.rank, self.world)
        self.teaching = Teaching(config, fingerprint, self.group, self.pack, self.dataloader, self.log)

    @property
    def model(self) -> Any:
        """The peft model, without the wrapper of a backend."""
        return getattr(self.backend.model, "module", self.backend.model)

    def train(self) -> None:
        """Go on after the newest checkpoint, through all updates that are left, or to where others have to answer."""
        done = self.resume()
        self.log.trim(done)
        if self.config.train.min_workers:
            self.log.add({"event": "workers", "step": done, "workers": self.world})
        if self.dataloader.drills and not done:
            groups = self.dataloader.drills.groups
            self.log.add({"event": "drills", "step": 0, "facts": [str(group) for group in groups]})
        if self.config.train.adopts_teacher and not done:
            adopt_teacher(self)
        self.log.follow(lambda: trackers.open_tracker(self.config, self.dir, done))
        while done < len(self.updates):
            update = self.updates[done]
            if self.teaching.awaits_actors(update):
                return self.save_checkpoint(update, done)  # training goes on from it once they have answered
            self.phase_transition(update)
            self.train_step(update)
            done = self.evaluate(update)
            if (update.step + 1) % self.config.train.checkpoint_every == 0:
                self.save_checkpoint(update, done)
        self.finish()

    def close(self) -> None:
        self.dataloader.close()
        self.log.close()

    def build_model(self) -> Any:
        """The base model with a fresh adapter, ready to train; called by the backend, which may shard it."""
        train = self.config.train
        model = models.load_model(self.config.model, self.device)
        self.longest_row = distill.longest_row_tokens(self.config) + train.gist
        self.plain_batch_reason = shared_prefix.why_prefix_cannot_be_shared(model)
        if train.gist and not self.plain_batch_reason:  # rows see the gists alone, however far before them these stand
            self.plain_batch_reason = shared_prefix.why_not_all_is_seen(model, self.longest_row)
        model = lora.add_lora(model, train.lora, train.seed)
        self.pissa_start = lora.pissa_start(model, train.lora)
        if train.gist:
            gist.add_gist_embeddings(model, train.gist)
        if train.gradient_checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.train()

    def phase_transition(self, update: Update) -> None:
        """Before an update: reset the optimiser, and have the teacher answer, where due."""
        if update.phase and update.index == 0 and self.config.train.phase_transition == "reset":
            self.restart_optimizer({k: v for k, v in self.backend.state().items() if "/" not in k})
        self.teaching.prepare(update, self.model)

    def restart_optimizer(self, weights: checkpoint.State) -> None:
        """Go on from these weights with Adam's moments at zero."""
        moments = {f"{key}/{name}": torch.zeros_like(value) for name, value in weights.items() for key in MOMENTS}
        self.backend.load_state({**weights, **moments}, 0)
        self.adam_updates = 0

    def train_step(self, update: Update) -> None:
        """One optimiser update over all workers, and its line in the log."""
        started = time.monotonic()
        mine = self.dataloader[update]
        # dropout's random numbers, in the base model too, depend on seed, update and rank alone
        torch.manual_seed(int(digest([self.config.train.seed, update.step, self.rank])[:15], 16))
        loss, tokens, plain_tokens = self.group.all_reduce_sum(self.forward_backward(mine)).tolist()
        if not math.isfinite(loss):  # the same sum on every worker, so that all of them stop together
            raise TrainingError(
                f"loss is {loss:.3g} at update {update.step} (phase {update.phase}); "
                "lower train.lr, and look for empty or broken rows"
            )
        self.backend.step(update.lr)
        self.adam_updates += 1
        self.log.add({
            "step": update.step, "phase": update.phase, "epoch": update.epoch, "loss": round(loss, 6), "lr": update.lr,
            "tokens": int(tokens), "plain_tokens": int(plain_tokens),
            "seconds": round(time.monotonic() - started, 4), "time": round(time.time(), 3),
        })

    def forward_backward(self, update: UpdateBatches) -> torch.Tensor:
        """This worker's part of an update: its gradients, and (loss, tokens, plain tokens) as (3,) float64."""
        found: list[torch.Tensor] = []  # left on the device until the end: a micro-batch does not wait for the last one
        batches = [batch for part in update.parts for batch, _ in part]
        for i, part in enumerate(update.parts):
            losses = [self.summed_loss(to_device(batch, self.device), targets) for batch, targets in part]
            loss = sum(losses[1:], losses[0]) / update.answer_tokens
            found.append(loss.detach())
            self.backend.backward(loss, last=i + 1 == len(update.parts))
        counts = (sum(batch.tokens for batch in batches), sum(batch.plain_tokens for batch in batches))
        return torch.tensor([sum(map(float, found)), *counts], dtype=torch.float64)

    def summed_loss(self, batch: Batch, targets: Targets | None) -> torch.Tensor:
        """The loss of one forward pass by `train.objective`, summed over answer tokens."""
        if targets is None:
            return sft_loss(self.backend.model, batch)
        return distill_loss(self.backend.model, batch, targets.to(self.device))

    def evaluate(self, update: Update) -> int:
        """Score dev rows and end the phase, each where it is due; returns how many updates are done."""
        done, end, train = update.step + 1, self.ends[update.phase], self.config.train
        if done < end and not (train.dev_every and (update.index + 1) % train.dev_every == 0):
            return done
        if done < end or train.early_stop:
            dev = self.phase_dev[update.phase]
            loss, accuracy = self.evaluate_dev(dev)
            by_metric = self.score_answers(dev) if train.early_stop else None
            score = by_metric.first if by_metric else accuracy
            stops = self.early.add_score((score, loss), update.step, self.adam_updates, self.finite_state)
            if done < end:
                self.log_dev("dev", update, loss, accuracy, **(by_metric.means if by_metric else {}))
                if not stops:
                    return done
        self.end_phase(update)
        return end

    @torch.no_grad()
    def evaluate_dev(self, dev: PhaseDataset) -> tuple[float, float]:
        """(mean cross-entropy in nats a token, share of tokens that are the likeliest) on the answers of `dev`."""
        self.backend.model.eval()
        mine, total = range(self.rank, len(dev), self.world), torch.zeros(2, dtype=torch.float64)
        # as many forward passes on every worker: sharded models need all workers in each
        for start in range(0, -(-len(dev) // self.world), DEV_ROWS):
            numbers = list(mine[start : start + DEV_ROWS])
            batch = self.pack(dev.prefix + gist.gist_ids(self.config.train.gist), dev.take(numbers or [0]))
            found = loss_and_correct(self.backend.model, to_device(batch, self.device))
            if numbers:
                total += torch.tensor(found, dtype=torch.float64)
        self.backend.model.train()
        loss, accuracy = (self.group.all_reduce_sum(total) / dev.label_lengths.sum()).tolist()
        return loss, accuracy

    def score_answers(self, dev: PhaseDataset) -> DevScores | None:
        """The scores of answers to `dev` by task.metric, on every worker; None where it does not decide in training."""
        if not self.config.training_metric:
            return None
        return self.scorer.score_answers(self.backend.model, self.pack, self.group, dev)

    def end_phase(self, update: Update) -> None:
        """Save the adapter from which the next phase goes on: the present one, or with early stop the best one.

        Its card has dev scores under the last phase's prompt, by which phases are compared.
        """
        best = {}
        if self.early.state is not None:
            if self.early.step != update.step:
                self.backend.load_state(self.early.state, self.early.adam_updates)
                self.adam_updates = self.early.adam_updates
            best = {"best_step": self.early.step, "early": update.step + 1 < self.ends[update.phase]}
            self.early = EarlyStop(self.config.train.early_stop)
        loss, accuracy = self.evaluate_dev(self.dev)
        if self.config.schedule.floor:
            scores = self.scorer.score_phase(self.backend.model, self.pack, self.group, update.phase)
        else:
            scores = self.score_answers(self.dev)
        weights = {name: value for name, value in self.finite_state().items() if "/" not in name}
        if self.rank == 0:
            facts = {"fingerprint": self.fingerprint, "phase": update.phase, "dev_loss": loss, "dev_accuracy": accuracy}
            card = lora.adapter_card(self.config, self.manifests, **facts)
            lora.save_adapter(self.dir.adapter(update.phase), self.model, weights, card, self.pissa_start, scores)
        self.log_dev("phase_end", update, loss, accuracy, **best, **(scores.means if scores else {}))
        self.report({"phase": update.phase, "step": update.step, "dev_loss": loss})

    def log_dev(self, event: str, update: Update, loss: float, accuracy: float, **facts: Any) -> None:
        scores = {"dev_loss": round(loss, 6), "dev_accuracy": round(accuracy, 6)}
        self.log.add({"event": event, "phase": update.phase, "step": update.step, **scores, **facts})

    def finite_state(self) -> checkpoint.State:
        """The backend's state, equal on every worker. Raises TrainingError on all where it holds inf or NaN."""
        state = self.backend.state()
        if broken := [name for name, value in state.items() if not torch.isfinite(value).all()]:
            raise TrainingError(
                f"{broken[0]} (and {len(broken) - 1} more) became infinite or no number; "
                "lower train.lr or train.grad_clip"
            )
        return state

    def save_checkpoint(self, update: Update, done: int) -> None:
        state = self.finite_state()
        if self.rank == 0:
            checkpoint.save_checkpoint(
                self.dir.checkpoints, state, done, self.fingerprint, self.config.train.keep_checkpoints,
                self.early.state, early=self.early.facts(), adam_updates=self.adam_updates,
                learned_from=learning_settings(self.config, models.base_digest(self.config.model)),
            )
        self.report({"phase": update.phase, "step": update.step})

    def resume(self) -> int:
        """Load the newest whole checkpoint, or else `train.init_adapter`; returns how many updates are done."""
        found = None
        if self.rank == 0:
            for written in (self.dir.root, self.dir.checkpoints, self.dir.adapters):
                remove_leftovers(written)
            learned_from = learning_settings(self.config, models.base_digest(self.config.model))
            found = checkpoint.newest_checkpoint(self.dir.checkpoints, self.fingerprint, learned_from, self.log.warn)
        found = self.group.broadcast_from_rank0(found)
        if found:
            state, best_state, manifest = checkpoint.load_checkpoint(found)
            self.adam_updates = manifest["adam_updates"]
            self.backend.load_state(state, self.adam_updates)
            self.early = EarlyStop(self.config.train.early_stop, **manifest["early"], state=best_state)
            return manifest["done"]
        if folder := self.config.train.init_adapter:
            self.restart_optimizer(lora.load_init_adapter(Path(folder), self.model, self.config.model.base))
        return 0

    def finish(self) -> None:
        """Choose the best adapter and remove the checkpoints, which nothing needs any more."""
        if self.rank == 0:
            self.log.add({"event": "best", "step": self.updates[-1].step, **lora.choose_best_adapter(self.config)})
            checkpoint.remove_checkpoints(self.dir.checkpoints)
