"""The whole main job as one Ray job, on the cluster that it is submitted to:

    ray job submit --working-dir . -- python jobs/main.py jobs/runs/nl2bash.yaml task.folder=/shared/nl2bash run_dir=/shared/runs/nl2bash

Re-submitting continues: what is done is skipped, and training goes on from the newest checkpoint. `run_dir` must be on storage that every node sees.
"""

import sys

from pi_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
