"""`pi-ray render`: the files that make a cluster (KubeRay, `ray up`, Slurm), filled from a run file."""

from pi_ray.cluster.render.files import KINDS, render_cluster_files, write_cluster_files

__all__ = ["KINDS", "render_cluster_files", "write_cluster_files"]
