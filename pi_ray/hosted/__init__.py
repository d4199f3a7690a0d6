"""Models behind a service with OpenAI's API (`train.backend.name: openai`): the service fine-tunes them and answers.

A prepared run enters, a tuned model's id leaves: `tune(config, watch, ask_on_terminal)` runs one job a phase, each from
the model of the one before, resumes, and asks before it spends.
"""

from pi_ray.config import RunConfig
from pi_ray.hosted.price import ask_on_terminal
from pi_ray.hosted.tuning import tune, tuned_phases

__all__ = ["ask_on_terminal", "is_hosted", "tune", "tuned_phases"]


def is_hosted(config: RunConfig) -> bool:
    """Whether a service has the model, so that no adapter lies in the run directory."""
    return config.train.backend.name == "openai"
