"""The phases of a run, what all of them together need, and the prompts and the baseline that they are compared with."""

from typing import NamedTuple

from pi_ray.config import RunConfig
from pi_ray.run.answered import answered_config
from pi_ray.run.directory import RunDir
from pi_ray.schedule import plan_phases


class ColumnPrompt(NamedTuple):
    """A template, the number of examples, and the rate at which template and documents are compressed."""

    template: str
    shots: int
    rate: float


def distinct_rates(config: RunConfig) -> list[float]:
    """Every template rate of the run, largest first; always with 1.0, which the full-prompt baseline uses."""
    return sorted({1.0, *(p.rate for p in plan_phases(config.schedule))} - {0.0}, reverse=True)


def max_shots(config: RunConfig) -> int:
    """The most examples that any phase, or the evaluation, puts before a query."""
    return max(config.evaluate.shots, *(p.shots for p in plan_phases(config.schedule)))


def first_taught_phase(config: RunConfig) -> int:
    """The phase from which on a teacher's answers are learned: the second where the first has the whole template, else
    the first.

    A first phase with the whole template learns labels; with the adapter as teacher, reading them makes the teacher.
    """
    return 1 if plan_phases(config.schedule)[0].rate == 1 else 0


def prompts_of_columns(config: RunConfig) -> dict[str, ColumnPrompt]:
    """Column -> the prompt that its model is asked with; PromptIntern's is that of the last phase."""
    templates, (first, *_, last) = RunDir(config.root).read_templates(), [*plan_phases(config.schedule)] * 2
    nothing = ColumnPrompt("", 0, 0.0)
    return {
        "base": nothing,
        "base_full_prompt": ColumnPrompt(templates[1.0], config.evaluate.shots or max_shots(config), 1.0),
        "plain": nothing,
        "teacher": ColumnPrompt(templates[1.0], first.shots, 1.0),
        "promptintern": ColumnPrompt(templates[last.rate], last.shots, last.rate),
    }


def plain_finetuning_config(config: RunConfig) -> RunConfig:
    """The baseline: the run's rows, updates and learning rates, with rate 0 and no shots in every phase.

    Rows that a teacher made are learned as if people had labelled them.
    """
    config = answered_config(config)
    phases = [{"rate": 0.0, "shots": 0, "epochs": p.epochs, "steps": p.steps} for p in plan_phases(config.schedule)]
    changes = {"evaluate.shots": 0, "train.objective": "sft", "train.gist": 0, "train.init_adapter": ""}
    changes |= {"task.generate": False, "ask": {}} if config.task.generate else {}
    run_dir = str(RunDir(config.root).baseline("plain").root)
    return config.replace(run_dir=run_dir, schedule={"name": "list", "list": phases}, **changes)
