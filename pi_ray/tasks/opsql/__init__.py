"""OpsQL, the bundled task: template.md, language, rows and score."""

from pi_ray.tasks.opsql.task import OpsqlTask

__all__ = ["OpsqlTask"]
