"""`pi-ray serve` as a process that also takes new versions: python -m tests.faults.server RUN.yaml.

Each line on stdin is a run file, deployed over what is served as `serve deploy` would; its outcome is one line of JSON
on stdout: {"deployed": path} or {"failed": why}. The line "metrics" is answered with {"metrics": url}, for Prometheus.
"""

from __future__ import annotations

import json
import sys
import threading

from pi_ray.config import run_file
from pi_ray.serve import app, deployment


def obey() -> None:
    import ray
    from ray import serve

    for line in sys.stdin:
        path = line.strip()
        try:
            if path == "metrics":
                [node] = ray.nodes()
                print(
                    json.dumps({"metrics": f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"}),
                    flush=True,
                )
                continue
            serve.run(
                deployment.build_application(run_file.load_run_file(path)), name=app.APP_NAME, route_prefix="/",
                blocking=False,
            )
            outcome = {"deployed": path}
        except Exception as error:
            outcome = {"failed": str(error)}
        print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    threading.Thread(target=obey, daemon=True).start()
    app.run_server(run_file.load_run_file(sys.argv[1]))
