"""`pi-ray doctor`: whether a run can work here, or on a cluster, and how to mend what is in its way."""

from pi_ray.cluster.doctor.examine import examine, print_findings
from pi_ray.cluster.doctor.finding import Finding

__all__ = ["Finding", "examine", "print_findings"]
