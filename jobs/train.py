"""Training as a Ray job: one gang of workers on GPU nodes (train.workers, cluster.train_resources), of a run that is prepared.

    ray job submit --working-dir . -- python jobs/train.py jobs/runs/nl2bash.yaml task.folder=/shared/nl2bash cluster.storage_path=/shared
"""

import sys

from pi_ray.cli.job import main

if __name__ == "__main__":
    sys.exit(main("train", sys.argv[1:]))
