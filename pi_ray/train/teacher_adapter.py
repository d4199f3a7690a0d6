"""A teacher of another run (train.distill.teacher_adapter) in place of a first phase, as a refresh has it."""

from functools import partial
from pathlib import Path
from typing import Any

from pi_ray.cluster import storage_sync
from pi_ray.run.artifact import is_current
from pi_ray.train.distill import write_teacher_answers
from pi_ray.train.lora import load_init_adapter, trainable_parameters
from pi_ray.train.teaching import tell_progress
from pi_ray.train.updates import Update


def adopt_teacher(trainer: Any) -> None:
    """Keep the teacher as phase 0's adapter and have it answer with this run's prompt; then the student is as before.

    The next refresh finds it there, and so does the evaluation's column "teacher". What is done already stays.
    """
    config, key = trainer.config, "train.distill.teacher_adapter"
    if trainer.dataloader.has_answers and is_current(trainer.dir.adapter(0), trainer.fingerprint):
        return
    # without a start adapter no optimiser has a state yet, and the weights are those of the model
    weights = trainer.backend.state() if config.train.init_adapter else trainable_parameters(trainer.model)
    student = {name: value.detach().float().cpu().clone() for name, value in weights.items() if "/" not in name}
    folder = Path(config.train.distill.teacher_adapter)
    trainer.restart_optimizer(load_init_adapter(folder, trainer.model, config.model.base, key))
    trainer.end_phase(Update(step=0, phase=0, index=0, epoch=0, lr=0.0))
    if not trainer.dataloader.has_answers:
        tell = partial(tell_progress, trainer.log, 0)
        write_teacher_answers(trainer.model, config, trainer.fingerprint, trainer.group, trainer.pack, tell)
        storage_sync.fetch_updates(trainer.dir.root)
        trainer.dataloader.has_answers = True
    trainer.restart_optimizer(student)
