"""The entry point inside a Ray job: `python -m pi_ray.cli.job VERB run.yaml`, for jobs/*.py and `pi-ray submit`."""

import sys
from collections.abc import Sequence

from pi_ray import cli
from pi_ray.cluster.jobs.entrypoint import run_job


def main(verb: str, arguments: Sequence[str]) -> int:
    return run_job(cli.main, verb, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
