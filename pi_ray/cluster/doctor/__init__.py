"""`pi-ray doctor`: whether a run can work here, or on a cluster, and how to mend what is in its way."""

from pi_ray.cluster.doctor.finding import Finding
from pi_ray.cluster.doctor.visit import examine, render

__all__ = ["Finding", "examine", "render"]
