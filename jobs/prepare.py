r"""Preparation as a Ray job: templates, examples and a dataset for each phase, on nodes with cluster.prepare_resources.

    ray job submit --working-dir . -- python jobs/prepare.py jobs/runs/nl2bash.yaml \
        task.folder=/shared/nl2bash cluster.storage_path=/shared
"""

import sys

from pi_ray.cli.job import main

if __name__ == "__main__":
    sys.exit(main("prepare", sys.argv[1:]))
