r"""Evaluation as a Ray job, where cluster.evaluate_resources are, of a run that is trained.

    ray job submit --working-dir . -- python jobs/evaluate.py jobs/runs/nl2bash.yaml \
        task.folder=/shared/nl2bash cluster.storage_path=/shared
"""

import sys

from pi_ray.cli.job import main

if __name__ == "__main__":
    sys.exit(main("evaluate", sys.argv[1:]))
