"""`pi-ray render`: a cluster's files, filled from a run file."""

from pi_ray.cluster.render.files import KINDS, render, write

__all__ = ["KINDS", "render", "write"]
