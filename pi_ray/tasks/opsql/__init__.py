"""OpsQL, the bundled task: template.md, the language, generated rows and the score."""

from pi_ray.tasks.opsql.task import OpsqlTask

__all__ = ["OpsqlTask"]
