"""Teaching: what the teacher does between updates, and the training log's words for it."""

from functools import partial
from typing import Any

from pi_ray.cluster import storage_sync
from pi_ray.config import RunConfig
from pi_ray.errors import TrainingError
from pi_ray.run.artifact import read_manifest
from pi_ray.run.directory import RunDir
from pi_ray.train.batches import Pack
from pi_ray.train.dataloader import TrainDataLoader
from pi_ray.train.distill import write_teacher_answers
from pi_ray.train.distilled_rows import DistilledRows, round_folder
from pi_ray.train.distributed import WorkerGroup
from pi_ray.train.on_policy import StudentWriter
from pi_ray.train.train_log import TrainLog
from pi_ray.train.updates import Round, Update

# Keys that the log takes from the manifest of the teacher's answers.
TEACHER_FACTS = ("queries", "answered", "kept", "held_out", "views", "seconds_teaching")
ROUND_FACTS = ("answers", "tokens", "replaced", "divergence", "seconds_writing")  # those of a round's manifest


class Teaching:
    """The teacher of one worker's training, which answers before the first update that learns from it."""

    def __init__(
        self, config: RunConfig, fingerprint: str, group: WorkerGroup, pack: Pack, loader: TrainDataLoader,
        log: TrainLog,
    ):
        self.config, self.fingerprint, self.group, self.pack = config, fingerprint, group, pack
        self.loader, self.log, self.run = loader, log, RunDir(config.root)
        self.writer: StudentWriter | None = None  # once the student is to write

    def awaits_actors(self, update: Update) -> bool:
        """Whether this update learns from answers that actors outside training have yet to give."""
        begins = (update.phase, update.index) == (self.loader.first_taught, 0)
        return self.config.train.actors_answer and begins and not self.loader.has_answers

    def prepare(self, update: Update, model: Any) -> None:
        """Before an update of a phase that learns from the teacher: have it answer, where it has not.

        Raises TrainingError where its answers are gone and it has been trained on since.
        """
        if update.phase < self.loader.first_taught:
            return
        begins = (update.phase, update.index) == (self.loader.first_taught, 0)
        if not self.loader.has_answers:
            if self.config.train.distill.teacher == "adapter" and not begins:
                raise TrainingError(
                    f"{self.run.teacher_answers}: the teacher's answers are missing or of another run, and the teacher "
                    f"has been trained on since; delete {self.run.checkpoints} to train again"
                )
            tell = partial(tell_progress, self.log, update.step)
            write_teacher_answers(model, self.config, self.fingerprint, self.group, self.pack, tell)
            storage_sync.fetch_updates(self.run.root)
            self.loader.has_answers = True
        if self.loader.distills and begins:
            manifest = read_manifest(self.run.teacher_answers) or {}
            facts = {key: manifest[key] for key in TEACHER_FACTS}
            options = {"options": said} if (said := describe_options(self.config)) else {}
            self.log.add({"event": "teacher_answers", "step": update.step, **facts, **options})
        if asked := self.loader.round_of(update.step):
            self._prepare_round(asked, update, model)

    def _prepare_round(self, asked: Round, update: Update, model: Any) -> None:
        """Have the student answer for a round of updates, where it has not; the same answers serve a resumed run."""
        begins = update.step == asked.begin
        if not self.group.broadcast_from_rank0(self.loader.has_round(asked)):
            if not begins:
                raise TrainingError(
                    f"{round_folder(self.run, asked)}: the student's answers are missing or of another run, and it has "
                    f"been trained on since; delete {self.run.checkpoints} to train again"
                )
            self.writer = self.writer or StudentWriter(self.config, self.fingerprint, self.group, self.pack)
            data = self.loader.open_phase(update.phase)
            assert isinstance(data, DistilledRows)
            self.writer.write_round(model, asked, self.loader.updates[asked.begin : asked.end], data)
            storage_sync.fetch_updates(self.run.root)
        if begins:
            manifest = read_manifest(round_folder(self.run, asked)) or {}
            facts = {key: manifest[key] for key in ROUND_FACTS}
            self.log.add({"event": "student_answers", "step": update.step, "round": asked.number, **facts})


def tell_progress(log: TrainLog, step: int, verb: str, done: int, total: int) -> None:
    """Log how far the teacher is before update `step`: "answered" or "judged", and how many rows of how many."""
    log.add({"event": "teacher", "step": step, "verb": verb, "done": done, "total": total})


def describe_options(config: RunConfig) -> list[str]:
    """Say in words how students learn from the teacher, where `train.distill` asks for more than its answers."""
    distill, said = config.train.distill, list[str]()
    if distill.tail:
        said.append(f"all tokens but the teacher's {distill.top_k} likeliest count as one")
    if config.train.objective == "distill" and distill.label_weight < 1:
        said.append(f"in labelled rows the label itself weighs {distill.label_weight:g}")
    if distill.labelled is not None:
        said.append(f"labelled rows have at least {distill.labelled:.0%} of each batch")
    if distill.show_labels:
        said.append("the teacher sees the answer of a labelled row that it judges")
    if distill.anchor:
        held = "hold the base model's answers to everyday questions, against forgetting"
        said.append(f"{distill.anchor:.0%} of the rows {held}")
    if distill.on_policy:
        own = f"the last {distill.on_policy:.0%} of the last phase's updates learn from the student's own answers"
        said.append(f"{own}, which the teacher mends")
    return said
