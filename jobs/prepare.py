"""Preparation as a Ray job: templates, examples and one dataset for each phase, on CPU nodes (cluster.prepare_resources).

    ray job submit --working-dir . -- python jobs/prepare.py jobs/runs/nl2bash.yaml task.folder=/shared/nl2bash cluster.storage_path=/shared
"""

import sys

from pi_ray.cli.job import main

if __name__ == "__main__":
    sys.exit(main("prepare", sys.argv[1:]))
