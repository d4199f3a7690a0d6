"""Closed models: `train.backend.name: openai` has a service with OpenAI's API fine-tune and answer.

    model = tune(config, watch, ask())    # one job a phase, each from the model of the one before; resumes; asks before it spends
    summary = evaluate(config, watch)     # the tuned model with the query alone, and the base model without and with the full prompt
"""

from pi_ray.closed.answer import answers
from pi_ray.closed.evaluation import columns_of, evaluate, trained
from pi_ray.closed.messages import files_of
from pi_ray.closed.price import ask
from pi_ray.closed.tuning import is_tuned, tune

BACKEND = "openai"

__all__ = ["BACKEND", "answers", "ask", "columns_of", "evaluate", "files_of", "is_tuned", "trained", "tune"]
