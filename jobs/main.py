r"""A whole run as one Ray job, on the cluster that it is submitted to: prepare, train, evaluate, report, publish.

    ray job submit --working-dir . -- python jobs/main.py jobs/runs/nl2bash.yaml \
        task.folder=/shared/nl2bash cluster.storage_path=/shared

Submitted again it goes on: what is done is skipped, and training goes on from the newest checkpoint. Relative run
directories lie under cluster.storage_path, which every node must see. `pi-ray submit run.yaml` does the same from any
machine, and sends along what run.yaml names.
"""

import sys

from pi_ray.cli.job import main

if __name__ == "__main__":
    sys.exit(main("run", sys.argv[1:]))
