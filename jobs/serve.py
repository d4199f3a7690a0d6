r"""Serving as a Ray job that runs until it is stopped: published adapters, replicas where cluster.serve_resources are.

    ray job submit --no-wait --working-dir . -- python jobs/serve.py jobs/runs/nl2bash.yaml \
        task.folder=/shared/nl2bash cluster.storage_path=/shared

The API key is PI_RAY_API_KEY in the environment of the cluster's nodes, or serve.keys_file names a file of keys there;
serve.host=0.0.0.0 lets other machines ask.
"""

import sys

from pi_ray.cli.job import main

if __name__ == "__main__":
    sys.exit(main("serve", sys.argv[1:]))
