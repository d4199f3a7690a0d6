"""Progressive fine-tuning (paper Algorithm 1, lines 8 to 12) by a service: one job a phase, from the model before it.

A job is found again by its training file, whose id is written down before the job is created.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pi_ray.config import RunConfig
from pi_ray.errors import TrainingError
from pi_ray.hosted import price
from pi_ray.hosted.client import ENDED_BADLY, Service, UnknownError
from pi_ray.hosted.messages import file_name, write_training_files
from pi_ray.hosted.state import TuningState, tuning_lock
from pi_ray.run.artifact import digest, verify_artifact, write_atomic
from pi_ray.run.directory import RunDir
from pi_ray.run.prepared import prompts_of_columns
from pi_ray.schedule import plan_phases

COLUMNS = ("base", "base_full_prompt", "promptintern")
SLOWEST = 6  # times poll_s, while nothing happens
FILE_CHECKS = 30  # looks at an uploaded file before the job is created in any case
UNREAD = ("uploaded", "pending", "running", "processing")  # a file that the service has not read yet

Listener = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Stage:
    """A phase at the service. Its fingerprint covers the earlier phases, since it continues from their model."""

    index: int
    epochs: int
    file: Path
    fingerprint: str


def tuning_stages(config: RunConfig) -> list[Stage]:
    """The phases with their files. Raises CorruptArtifactError for a file that is not as it was written."""
    folder, closed = write_training_files(RunDir(config.root), config), config.closed
    files, earlier, stages = verify_artifact(folder)["files"], digest([closed.base_url, closed.model]), []
    for i, phase in enumerate(plan_phases(config.schedule)):
        settings = [phase.epochs, closed.batch_size, closed.lr_multiplier, config.train.seed]
        earlier = digest([earlier, files[file_name(i)]["sha256"], *settings])
        stages.append(Stage(i, phase.epochs, folder / file_name(i), earlier))
    return stages


def tuned_phases(config: RunConfig) -> list[dict[str, Any]]:
    """Each phase's known model, tokens, seconds, updates and status, without asking the service."""
    state = TuningState(config.root)
    return [state.get(s.fingerprint) for s in tuning_stages(config)]


def tune(
    config: RunConfig, watch: Listener = lambda entry: None, confirm: Callable[[str], bool] = lambda sentence: False,
    columns: Sequence[str] = COLUMNS, wait: Callable[[float], None] = time.sleep,
) -> str:
    """Fine-tune through the phases and return the last one's model id, at once when it is known. The same call resumes.

    `confirm` gets a sentence with the cost, the evaluation of `columns` included, and says whether to spend it; it is
    not called with closed.confirmed, nor when every job is there already. `watch` gets dicts with "phase" and
    "message", for jobs also "status", for updates "step" and "loss". Raises TrainingError when the cost is declined,
    when a job fails, or when the service cannot be reached.
    """
    stages = tuning_stages(config)
    with tuning_lock(config.root):
        state = TuningState(config.root)
        if not (model := state.get(stages[-1].fingerprint).get("model")):
            service = Service(config.closed, wait)
            _recover(service, state, stages)
            if todo := [s.index for s in stages if not state.get(s.fingerprint).get("job")]:
                prompts = prompts_of_columns(config)
                tell = lambda sentence: watch({"phase": todo[0], "message": sentence})  # noqa: E731
                price.confirm_cost(config, todo, [prompts[c] for c in columns], tell, confirm)
            model = config.closed.model
            for stage in stages:
                model = _Phase(config, service, state, stage, watch).tune_from(model)
    return model


def _recover(service: Service, state: TuningState, stages: Sequence[Stage]) -> None:
    """Find jobs that were created but not written down, and forget failed ones, so that they are created again."""
    for stage in stages:
        known = state.get(stage.fingerprint)
        if known.get("status") in ENDED_BADLY:
            state.put(stage.fingerprint, job=None, status=None)
        known = state.get(stage.fingerprint)
        if known.get("file") and not known.get("job") and (job := service.find_job(known["file"])):
            state.put(stage.fingerprint, job=job.id, status=job.status)


class _Phase:
    """One phase on its way: upload, job, events, model, each written down when it is done."""

    def __init__(self, config: RunConfig, service: Service, state: TuningState, stage: Stage, watch: Listener):
        self.config, self.service, self.state, self.stage, self.watch = config, service, state, stage, watch

    @property
    def known(self) -> dict[str, Any]:
        return self.state.get(self.stage.fingerprint)

    def tune_from(self, model: str) -> str:
        """The model after this phase, which continues from `model`."""
        if not self.known.get("model"):
            if not self.known.get("job"):
                self._create_job(model)
            self._follow_job()
        return self.known["model"]

    def _create_job(self, model: str) -> None:
        stage, closed = self.stage, self.config.closed
        chosen = {"batch_size": closed.batch_size, "learning_rate_multiplier": closed.lr_multiplier}
        hyperparameters = {"n_epochs": stage.epochs, **{name: value for name, value in chosen.items() if value}}
        suffix = f"{closed.suffix}-p{stage.index}-{stage.fingerprint[:8]}"
        job = self.service.create_job(self._upload(), model, suffix, self.config.train.seed, **hyperparameters)
        self._put(phase=stage.index, base=model, job=job.id, status=job.status)
        self._tell(f"job {job.id} fine-tunes {model}, {stage.epochs} passes over {stage.file.name}", status=job.status)

    def _upload(self) -> str:
        """The id of the phase's file at the service, which has read it."""
        file = self.known.get("file")
        status = self.service.file_status(file) if file else ""
        if not file or status in ("", "error"):
            file = self.service.upload(self.stage.file)
            self._put(file=file)
            self._tell(f"uploaded {self.stage.file.name} as {file}")
            status = self.service.file_status(file)
        for _ in range(FILE_CHECKS):
            if status not in UNREAD:
                break
            self.service.wait(self.config.closed.poll_s)
            status = self.service.file_status(file)
        if status == "error":
            raise TrainingError(f"phase {self.stage.index}: the service cannot read {self.stage.file} as training rows")
        return file

    def _follow_job(self) -> None:
        """Watch the job until it has ended. Raises TrainingError with the service's reason when it failed."""
        seen: set[str] = set()
        losses: dict[int, float] = {}
        pause = poll = self.config.closed.poll_s
        while True:
            job = self._find_job()
            news = self.service.events(job.id, seen)  # after the job, so that its last events are among them
            for event in news:
                seen.add(event.id)
                self._hear(event, losses)
            if job.status in ENDED_BADLY:
                self._put(status=job.status)
                reason = job.error.message if job.error and job.error.message else "the service gives no reason"
                raise TrainingError(
                    f"phase {self.stage.index}: job {job.id} {job.status}: {reason.rstrip('.')}. "
                    "The same command tries the phase again with a new job"
                )
            if job.status == "succeeded":
                return self._finish(job, losses)
            if job.status != self.known["status"]:
                self._put(status=job.status)
                self._tell(f"job {job.id} is {job.status.replace('_', ' ')}", status=job.status)
                news = [job]
            pause = poll if news else min(pause * 1.5, SLOWEST * poll)
            self.service.wait(pause)

    def _find_job(self) -> Any:
        try:
            return self.service.job(self.known["job"])
        except UnknownError as error:
            raise TrainingError(
                f"phase {self.stage.index}: {error}. If it is gone for good, delete {self.state.path} to train again, "
                "which pays for every phase again"
            ) from None

    def _hear(self, event: Any, losses: dict[int, float]) -> None:
        data = event.data if isinstance(event.data, dict) else {}
        step, loss = data.get("step"), data.get("train_loss")
        facts = {}
        if isinstance(step, int) and isinstance(loss, int | float):
            losses[step] = loss
            facts = {"step": step, "loss": loss, "total": data.get("total_steps")}
        self._tell(event.message, **facts)

    def _finish(self, job: Any, losses: dict[int, float]) -> None:
        if not job.fine_tuned_model:
            raise TrainingError(f"phase {self.stage.index}: job {job.id} succeeded, but the service names no model")
        self._log(losses)
        tokens = job.trained_tokens or price.phase_tokens(self.config, self.stage.index, self.stage.epochs)
        seconds = job.finished_at - job.created_at if job.finished_at else 0
        facts = {"tokens": tokens, "seconds": seconds, "updates": max(losses, default=0)}
        self._put(status=job.status, model=job.fine_tuned_model, **facts)
        self._tell(f"done, {tokens:,} tokens trained: {job.fine_tuned_model}", status=job.status)

    def _log(self, losses: dict[int, float]) -> None:
        """Put the phase's losses into train.jsonl, after those of earlier phases: `step` counts over the whole run."""
        log, phase = RunDir(self.config.root).train_log, self.stage.index
        lines = log.read_text().splitlines() if log.exists() and phase else []
        kept = [e for e in map(json.loads, lines) if e.get("phase", phase) < phase]
        first = max((e["step"] for e in kept), default=-1) + 1
        kept += [{"step": first + i, "phase": phase, "loss": losses[step]} for i, step in enumerate(sorted(losses))]
        write_atomic(log, "".join(json.dumps(e) + "\n" for e in kept))

    def _put(self, **facts: Any) -> None:
        self.state.put(self.stage.fingerprint, **facts)

    def _tell(self, message: str, **facts: Any) -> None:
        self.watch({"phase": self.stage.index, "message": message, **facts})
