"""Progressive fine-tuning (paper Algorithm 1, lines 8 to 12) by a service: one job a phase, from the model before it.

A job is found again by its training file, whose id is written down before the job is created.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pi_ray.config import RunConfig
from pi_ray.errors import ConfigError, CorruptArtifactError, TrainingError
from pi_ray.hosted import price
from pi_ray.hosted.client import ENDED_BADLY, Service, UnknownError
from pi_ray.hosted.together import TogetherService
from pi_ray.prompt import render_prompt
from pi_ray.run.artifact import digest, is_current, staged, verify_artifact, write_atomic
from pi_ray.run.directory import RunDir
from pi_ray.run.lock import run_lock
from pi_ray.run.phases import prompts_of_columns
from pi_ray.schedule import plan_phases

STATE = Path("closed", "state.json")  # of a run, written after every step, so that nothing is paid for twice
COLUMNS = ("base", "base_full_prompt", "promptintern")
FILE = "phase-{}.jsonl"
SLOWEST = 6  # times poll_s, while nothing happens
FILE_CHECKS = 30  # looks at an uploaded file before the job is created in any case
UNREAD = ("uploaded", "pending", "running", "processing")  # a file that the service has not read yet

SERVICES = {"openai": Service, "together": TogetherService}
Listener = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Stage:
    """A phase at the service. Its fingerprint covers the earlier phases, since it continues from their model."""

    index: int
    epochs: int
    file: Path
    fingerprint: str


def read_state(root: Path) -> dict[str, dict[str, Any]]:
    """Phase fingerprint -> file, job, status, model, tokens, seconds. Phases of other settings stay: they are paid for.

    Raises CorruptArtifactError when the file cannot be read.
    """
    try:
        return json.loads((root / STATE).read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        cure = "delete it to begin anew, which pays for every phase again"
        raise CorruptArtifactError(f"{root / STATE}: not readable as JSON ({error}); {cure}") from error


def write_training_files(run: RunDir, config: RunConfig) -> Path:
    """The artifact closed/files, made unless it is there: of each phase its rows as chat messages, in JSONL.

    Raises ConfigError for what a service cannot be asked for.
    """
    phases = plan_phases(config.schedule)
    if any(p.steps for p in phases):
        cure = "use schedule.epochs with train.backend.name openai"
        raise ConfigError(f"schedule.steps: a fine-tuning service counts passes over the rows, not updates; {cure}")
    if config.train.objective != "sft":
        limit = "a fine-tuning service learns from labels alone; take sft with train.backend.name openai"
        raise ConfigError(f"train.objective {config.train.objective}: {limit}")
    folder = run.root / "closed" / "files"
    fingerprint = digest([run.prepared_fingerprint(), config.prompt.model_dump(mode="json")])
    if is_current(folder, fingerprint):
        return folder
    bank, templates = {r.id: r for r in run.read_rows("train")}, run.read_templates()
    with staged(folder, fingerprint=fingerprint) as made:
        for i, phase in enumerate(phases):
            shots = run.read_shots("train", bank, phase.shots)
            with open(made / FILE.format(i), "w", encoding="utf-8") as file:
                for r in run.read_rows("train", phase.rate):
                    examples = shots.get(r.id, ())
                    prompt = render_prompt(config.prompt, r.query, templates[phase.rate], examples, r.documents)
                    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": r.answer}]
                    file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return folder


def tuning_stages(config: RunConfig) -> list[Stage]:
    """The phases with their files. Raises CorruptArtifactError for a file that is not as it was written."""
    folder, closed = write_training_files(RunDir(config.root), config), config.closed
    files, earlier, stages = verify_artifact(folder)["files"], digest([closed.base_url, closed.model]), []
    for i, phase in enumerate(plan_phases(config.schedule)):
        settings = [phase.epochs, closed.batch_size, closed.lr_multiplier or closed.lr, config.train.seed]
        earlier = digest([earlier, files[FILE.format(i)]["sha256"], *settings])
        stages.append(Stage(i, phase.epochs, folder / FILE.format(i), earlier))
    return stages


def tuned_phases(config: RunConfig) -> list[dict[str, Any]]:
    """Each phase's known model, tokens, seconds, updates and status, without asking the service."""
    state = read_state(config.root)
    return [state.get(s.fingerprint, {}) for s in tuning_stages(config)]


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
    with run_lock(config.root / "closed", "is tuning this run"):  # two would create its jobs twice
        state = read_state(config.root)
        if not (model := state.get(stages[-1].fingerprint, {}).get("model")):
            service = SERVICES[config.closed.jobs](config.closed, wait)
            phases = [_Phase(config, service, state, stage, watch) for stage in stages]
            for phase in phases:
                phase.recover()
            if todo := [p for p in phases if not p.known.get("job")]:
                prompts, indices = prompts_of_columns(config), [p.stage.index for p in todo]
                price.confirm_cost(config, indices, [prompts[c] for c in columns], todo[0].tell, confirm)
            model = config.closed.model
            for phase in phases:
                model = phase.tune_from(model)
    return model


@dataclass
class _Phase:
    """One phase on its way: upload, job, events, model, each written down when it is done."""

    config: RunConfig
    service: Service
    state: dict[str, dict[str, Any]]  # of read_state
    stage: Stage
    watch: Listener

    @property
    def known(self) -> dict[str, Any]:
        return self.state.get(self.stage.fingerprint, {})

    def recover(self) -> None:
        """Find a job that was created but not written down, and forget a failed one, so that it is created again."""
        if self.known.get("status") in ENDED_BADLY:
            self._put(job=None, status=None)
        file = self.known.get("file")
        if file and not self.known.get("job") and (job := self.service.find_job(file)):
            self._put(job=job.id, status=job.status)

    def tune_from(self, model: str) -> str:
        """The model after this phase, which continues from `model`."""
        if not self.known.get("model"):
            if not self.known.get("job"):
                self._create_job(model)
            self._follow_job()
        return self.known["model"]

    def _create_job(self, model: str) -> None:
        stage = self.stage
        suffix = f"{self.config.closed.suffix}-p{stage.index}-{stage.fingerprint[:8]}"
        job = self.service.create_job(self._upload(), model, suffix, stage.epochs, self.config.train)
        self._put(phase=stage.index, base=model, job=job.id, status=job.status)
        self.tell(f"job {job.id} fine-tunes {model}, {stage.epochs} passes over {stage.file.name}", status=job.status)

    def _upload(self) -> str:
        """The id of the phase's file at the service, which has read it."""
        file = self.known.get("file")
        if not file or self.service.file_status(file) in ("", "error"):
            file = self.service.upload(self.stage.file)
            self._put(file=file)
            self.tell(f"uploaded {self.stage.file.name} as {file}")
        for _ in range(FILE_CHECKS):
            status = self.service.file_status(file)
            if status not in UNREAD:
                break
            self.service.wait(self.config.closed.poll_s)
        if status == "error":
            raise TrainingError(f"phase {self.stage.index}: the service cannot read {self.stage.file} as training rows")
        return file

    def _follow_job(self) -> None:
        """Watch the job until it has ended. Raises TrainingError with the service's reason when it failed."""
        seen: set[str] = set()
        losses: dict[int, float] = {}
        pause = poll = self.config.closed.poll_s
        while True:
            try:
                job = self.service.job(self.known["job"])
            except UnknownError as error:
                cure = f"delete {self.config.root / STATE} to train again, which pays for every phase again"
                raise TrainingError(f"phase {self.stage.index}: {error}. If it is gone for good, {cure}") from None
            news = self.service.events(job.id, seen)  # after the job, so that its last events are among them
            for event in news:
                seen.add(event.id)
                facts = {}
                match event.data:
                    case {"step": int(step), "train_loss": int(loss) | float(loss)}:
                        losses[step] = loss
                        facts = {"step": step, "loss": loss, "total": event.data.get("total_steps")}
                self.tell(event.message, **facts)
            if job.status in ENDED_BADLY:
                self._put(status=job.status)
                reason = ((job.error and job.error.message) or "the service gives no reason").rstrip(".")
                cure = "The same command tries the phase again with a new job"
                raise TrainingError(f"phase {self.stage.index}: job {job.id} {job.status}: {reason}. {cure}")
            if job.status == "succeeded":
                return self._finish(job, losses)
            if job.status != self.known["status"]:
                self._put(status=job.status)
                self.tell(f"job {job.id} is {job.status.replace('_', ' ')}", status=job.status)
                news = [job]
            pause = poll if news else min(pause * 1.5, SLOWEST * poll)
            self.service.wait(pause)

    def _finish(self, job: Any, losses: dict[int, float]) -> None:
        if not job.fine_tuned_model:
            raise TrainingError(f"phase {self.stage.index}: job {job.id} succeeded, but the service names no model")
        self._log(losses)
        tokens = job.trained_tokens or price.phase_tokens(self.config, self.stage.index, self.stage.epochs)
        seconds = round(job.finished_at - job.created_at) if job.finished_at else 0
        updates = max(losses, default=0)
        self._put(status=job.status, model=job.fine_tuned_model, tokens=tokens, seconds=seconds, updates=updates)
        self.tell(f"done, {tokens:,} tokens trained: {job.fine_tuned_model}", status=job.status)

    def _log(self, losses: dict[int, float]) -> None:
        """Put the phase's losses into train.jsonl, after those of earlier phases: `step` counts over the whole run."""
        log, phase = RunDir(self.config.root).train_log, self.stage.index
        lines = log.read_text().splitlines() if log.exists() and phase else []
        kept = [e for e in map(json.loads, lines) if e.get("phase", phase) < phase]
        first = max((e["step"] for e in kept), default=-1) + 1
        kept += [{"step": first + i, "phase": phase, "loss": losses[step]} for i, step in enumerate(sorted(losses))]
        write_atomic(log, "".join(json.dumps(e) + "\n" for e in kept))

    def _put(self, **facts: Any) -> None:
        """Add facts of the phase and write them down; None takes a fact away."""
        known = {**self.known, **facts}
        self.state[self.stage.fingerprint] = {name: fact for name, fact in known.items() if fact is not None}
        write_atomic(self.config.root / STATE, json.dumps(self.state, indent=1) + "\n")

    def tell(self, message: str, **facts: Any) -> None:
        self.watch({"phase": self.stage.index, "message": message, **facts})
