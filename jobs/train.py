r"""Training of a prepared run as a Ray job: train.workers workers, where cluster.train_resources are.

    ray job submit --working-dir . -- python jobs/train.py jobs/runs/nl2bash.yaml \
        task.folder=/shared/nl2bash cluster.storage_path=/shared
"""

import sys

from pi_ray.cli.job import main

if __name__ == "__main__":
    sys.exit(main("train", sys.argv[1:]))
