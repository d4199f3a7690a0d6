"""Progressive fine-tuning (paper Algorithm 1, lines 8 to 12) by a service: one job for each phase, from the model of the phase before.

A job is found again by its training file: the file's id is written down before the job is created, and no other job has it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi_ray.errors import TrainingError
from pi_ray.hosted import price
from pi_ray.hosted.client import ENDED_BADLY, Service, UnknownError
from pi_ray.hosted.messages import file_name, files_of, prompts_of_columns
from pi_ray.hosted.state import State, only_one
from pi_ray.run.artifact import digest, verify, write_atomic
from pi_ray.run.directory import RunDir
from pi_ray.run.phases import phases_of

if TYPE_CHECKING:
    from pi_ray.config import RunConfig

COLUMNS = ("base", "base_full_prompt", "promptintern")
SLOWEST = 6  # times poll_s, while nothing happens
FILE_CHECKS = 30  # looks at an uploaded file before the job is created in any case
READING = ("uploaded", "pending", "running", "processing")  # a file that the service has not read yet

Watch = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Stage:
    """A phase as the service sees it. Its fingerprint covers the phases before it, since it continues from their model."""

    index: int
    epochs: int
    file: Path
    fingerprint: str


def stages_of(config: RunConfig) -> list[Stage]:
    """The phases with their files. Raises CorruptArtifactError for a file that is not what was written."""
    folder, closed = files_of(RunDir(config.root), config), config.closed
    files, before, stages = verify(folder)["files"], digest([closed.base_url, closed.model]), []
    for i, phase in phases_of(config):
        before = digest([before, files[file_name(i)]["sha256"], phase.epochs, closed.batch_size, closed.lr_multiplier, config.train.seed])
        stages.append(Stage(i, phase.epochs, folder / file_name(i), before))
    return stages


def is_tuned(config: RunConfig) -> bool:
    return bool(tuned(config)[-1].get("model"))


def tuned(config: RunConfig) -> list[dict[str, Any]]:
    """What is known of each phase: model, tokens, seconds, updates, status; less of one that is not done. Asks nobody."""
    state = State(config.root)
    return [state.of(s.fingerprint) for s in stages_of(config)]


def tune(
    config: RunConfig,
    watch: Watch = lambda entry: None,
    confirm: Callable[[str], bool] = lambda sentence: False,
    columns: Sequence[str] = COLUMNS,
    wait: Callable[[float], None] = time.sleep,
) -> str:
    """Fine-tune through the phases and return the last one's model id; at once when that is known. The same command resumes.

    `confirm` gets a sentence with the cost, of which the evaluation of `columns` is a part, and says whether to spend it; it is not called
    with closed.confirmed, nor when every job is there already. `watch` gets dicts with "phase" and "message", for jobs also "status", for
    updates "step" and "loss". Raises TrainingError when that is declined, when a job fails, or when the service cannot be reached.
    """
    stages = stages_of(config)
    with only_one(config.root):
        state = State(config.root)
        if not (model := state.of(stages[-1].fingerprint).get("model")):
            service = Service(config.closed, wait)
            _recover(service, state, stages)
            if todo := [s.index for s in stages if not state.of(s.fingerprint).get("job")]:
                prompts = prompts_of_columns(config)
                price.confirmed(config, todo, [prompts[c] for c in columns], lambda sentence: watch({"phase": todo[0], "message": sentence}), confirm)
            model = config.closed.model
            for stage in stages:
                model = _Phase(config, service, state, stage, watch).tuned(model)
    return model


def _recover(service: Service, state: State, stages: Sequence[Stage]) -> None:
    """Find jobs that were created but not written down, and forget those that ended badly, so that they are created again."""
    for stage in stages:
        known = state.of(stage.fingerprint)
        if known.get("status") in ENDED_BADLY:
            state.put(stage.fingerprint, job=None, status=None)
        known = state.of(stage.fingerprint)
        if known.get("file") and not known.get("job") and (job := service.find_job(known["file"])):
            state.put(stage.fingerprint, job=job.id, status=job.status)


class _Phase:
    """One phase on its way: upload, job, events, model, each written down when it is done."""

    def __init__(self, config: RunConfig, service: Service, state: State, stage: Stage, watch: Watch):
        self.config, self.service, self.state, self.stage, self.watch = config, service, state, stage, watch

    @property
    def known(self) -> dict[str, Any]:
        return self.state.of(self.stage.fingerprint)

    def tuned(self, model: str) -> str:
        """The model after this phase, which continues from `model`."""
        if not self.known.get("model"):
            if not self.known.get("job"):
                self._create(model)
            self._follow()
        return self.known["model"]

    def _create(self, model: str) -> None:
        closed = self.config.closed
        chosen = {"batch_size": closed.batch_size, "learning_rate_multiplier": closed.lr_multiplier}
        job = self.service.create_job(
            self._uploaded(), model, f"{closed.suffix}-p{self.stage.index}-{self.stage.fingerprint[:8]}", self.config.train.seed,
            n_epochs=self.stage.epochs, **{name: value for name, value in chosen.items() if value},
        )
        self._put(phase=self.stage.index, base=model, job=job.id, status=job.status)
        self._tell(f"job {job.id} fine-tunes {model}, {self.stage.epochs} passes over {self.stage.file.name}", status=job.status)

    def _uploaded(self) -> str:
        """The id of the phase's file at the service, which has read it."""
        file = self.known.get("file")
        status = self.service.file_status(file) if file else ""
        if not file or status in ("", "error"):
            file = self.service.upload(self.stage.file)
            self._put(file=file)
            self._tell(f"uploaded {self.stage.file.name} as {file}")
            status = self.service.file_status(file)
        for _ in range(FILE_CHECKS):
            if status not in READING:
                break
            self.service.wait(self.config.closed.poll_s)
            status = self.service.file_status(file)
        if status == "error":
            raise TrainingError(f"phase {self.stage.index}: the service cannot read {self.stage.file} as training rows")
        return file

    def _follow(self) -> None:
        """Watch the job until it has ended. Raises TrainingError with the service's reason when it ended badly."""
        seen: set[str] = set()
        losses: dict[int, float] = {}
        pause = poll = self.config.closed.poll_s
        while True:
            job = self._job()
            news = self.service.events(job.id, seen)  # after the job, so that its last events are among them
            for event in news:
                seen.add(event.id)
                self._hear(event, losses)
            if job.status in ENDED_BADLY:
                self._put(status=job.status)
                reason = job.error.message if job.error and job.error.message else "the service gives no reason"
                raise TrainingError(f"phase {self.stage.index}: job {job.id} {job.status}: {reason.rstrip('.')}. The same command tries the phase again with a new job")
            if job.status == "succeeded":
                return self._done(job, losses)
            if job.status != self.known["status"]:
                self._put(status=job.status)
                self._tell(f"job {job.id} is {job.status.replace('_', ' ')}", status=job.status)
                news = [job]
            pause = poll if news else min(pause * 1.5, SLOWEST * poll)
            self.service.wait(pause)

    def _job(self) -> Any:
        try:
            return self.service.job(self.known["job"])
        except UnknownError as error:
            raise TrainingError(f"phase {self.stage.index}: {error}. If it is gone for good, delete {self.state.path} to train again, which pays for every phase again") from None

    def _hear(self, event: Any, losses: dict[int, float]) -> None:
        data = event.data if isinstance(event.data, dict) else {}
        step, loss = data.get("step"), data.get("train_loss")
        if isinstance(step, int) and isinstance(loss, int | float):
            losses[step] = loss
            self._tell(event.message, step=step, loss=loss, total=data.get("total_steps"))
        else:
            self._tell(event.message)

    def _done(self, job: Any, losses: dict[int, float]) -> None:
        if not job.fine_tuned_model:
            raise TrainingError(f"phase {self.stage.index}: job {job.id} succeeded, but the service names no model for it")
        self._log(losses)
        tokens = job.trained_tokens or price.phase_tokens(self.config, self.stage.index, self.stage.epochs)
        seconds = job.finished_at - job.created_at if job.finished_at else 0
        self._put(status=job.status, model=job.fine_tuned_model, tokens=tokens, seconds=seconds, updates=max(losses, default=0))
        self._tell(f"done, {tokens:,} tokens trained: {job.fine_tuned_model}", status=job.status)

    def _log(self, losses: dict[int, float]) -> None:
        """Put the phase's losses into train.jsonl, after those of earlier phases: `step` counts over the whole run."""
        log = RunDir(self.config.root).train_log
        lines = log.read_text().splitlines() if log.exists() and self.stage.index else []
        kept = [e for e in map(json.loads, lines) if e.get("phase", self.stage.index) < self.stage.index]
        first = max((e["step"] for e in kept), default=-1) + 1
        kept += [{"step": first + i, "phase": self.stage.index, "loss": losses[step]} for i, step in enumerate(sorted(losses))]
        write_atomic(log, "".join(json.dumps(e) + "\n" for e in kept))

    def _put(self, **facts: Any) -> None:
        self.state.put(self.stage.fingerprint, **facts)

    def _tell(self, message: str, **facts: Any) -> None:
        self.watch({"phase": self.stage.index, "message": message, **facts})
