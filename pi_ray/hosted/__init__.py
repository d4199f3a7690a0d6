"""Models behind a service with OpenAI's API (`train.backend.name: openai`): the service fine-tunes them and answers.

    model = tune(config, watch, ask())    # one job a phase, each from the model of the one before; resumes; asks before it spends
"""

from pi_ray.hosted.answer import answers
from pi_ray.hosted.messages import files_of
from pi_ray.hosted.price import ask
from pi_ray.hosted.tuning import is_tuned, tune

BACKEND = "openai"

__all__ = ["BACKEND", "answers", "ask", "files_of", "is_tuned", "tune"]
