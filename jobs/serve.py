"""Serving as a Ray job, which goes on until it is stopped; replicas where cluster.serve_resources are.

    ray job submit --working-dir . -- python jobs/serve.py jobs/runs/nl2bash.yaml task.folder=/shared/nl2bash cluster.storage_path=/shared
"""

import sys

from pi_ray.job import main

if __name__ == "__main__":
    sys.exit(main("serve", sys.argv[1:]))
