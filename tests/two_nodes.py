"""A Ray cluster of two nodes on this machine, of which one is lost: `python -m tests.two_nodes prepare FOLDER`, in a process of its own.

FOLDER has config.json; a file `killed` appears there when the node is gone. The lost node is replaced, as an autoscaler would do.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pi_ray.config import RunConfig
from pi_ray.data import phase_dataset

NODE = {"num_cpus": 1, "object_store_memory": 100 << 20}


def outside() -> dict[str, str]:
    """The environment of a process that is to have a Ray of its own: Ray joins the cluster that its folder for temporary files names, if there is one."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short, since sockets lie in it
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return {**{k: v for k, v in os.environ.items() if not k.startswith("RAY_ADDRESS")}, "RAY_TMPDIR": folder}


def apart(*words: str, timeout: float = 300) -> None:
    """`python -m tests.two_nodes WORDS`, with a Ray of its own, of which nothing is left when it ends or hangs."""
    process = subprocess.Popen([sys.executable, "-m", "tests.two_nodes", *words], start_new_session=True, env=outside())
    try:
        assert process.wait(timeout) == 0
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


class HeldBuilder(phase_dataset.Builder):
    """Says on which node it has begun, and waits until the other one is lost."""

    def __call__(self, item: dict[str, Any]) -> str:
        import ray

        folder = Path(self.config.run_dir).parent
        (folder / f"begun-{ray.get_runtime_context().get_node_id()}").touch()
        while not (folder / "killed").exists():
            time.sleep(0.01)
        return super().__call__(item)


class CountedBuilder(phase_dataset.Builder):
    """Notes each shard that it builds in the file `built`. Where a file `hold` is there when it starts, it waits for ever from the fifth shard on.

    Those that will be held build one at a time, so that nothing is under way, built and not yet noted, when the fourth stands there.
    """

    def __init__(self, config: RunConfig, fingerprint: str):
        super().__init__(config, fingerprint)
        self.folder = Path(config.run_dir).parent
        self.held = (self.folder / "hold").exists()

    def __call__(self, item: dict[str, Any]) -> str:
        built = self.folder / "built"
        with open(self.folder / "turn", "w") as turn:
            if self.held:
                fcntl.flock(turn, fcntl.LOCK_EX)
            while self.held and built.exists() and len(built.read_text().split()) >= 4:
                time.sleep(0.01)
            made = super().__call__(item)
            with open(built, "a") as f:
                f.write(f"{Path(made).parent.name}/{Path(made).name}\n")
        return made


def prepare_and_lose(folder: Path) -> None:
    import ray
    from ray.cluster_utils import Cluster

    from pi_ray.cluster import session
    from pi_ray.data.prepare import prepare

    nodes = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    victim = nodes.add_node(**NODE)
    ray.init(address=nodes.address, log_to_driver=False)
    session.connect()
    config = RunConfig.model_validate_json((folder / "config.json").read_text())

    def lose(when: Callable[[], bool]) -> None:
        while not when():
            time.sleep(0.01)
        nodes.remove_node(victim, allow_graceful=False)
        ray._private.utils.set_sigterm_handler = lambda handler: None  # a node asks for one when it starts, and only the main thread may
        nodes.add_node(**NODE)
        (folder / "killed").touch()

    phase_dataset.SHARD_ROWS, phase_dataset.Builder = 10, HeldBuilder
    here = f"begun-{ray.get_runtime_context().get_node_id()}"  # the driver is attached to the head
    killer = threading.Thread(target=lose, args=(lambda: any(p.name != here for p in folder.glob("begun-*")),), daemon=True)
    killer.start()
    prepare(config, lambda line: None)
    killer.join(timeout=60)
    ray.shutdown()
    nodes.shutdown()


def prepare_held(folder: Path) -> None:
    """Prepare on a Ray of its own, counting shards; killed by the test."""
    from pi_ray.data.prepare import prepare

    phase_dataset.SHARD_ROWS, phase_dataset.Builder = 10, CountedBuilder
    prepare(RunConfig.model_validate_json((folder / "config.json").read_text()), lambda line: None)


if __name__ == "__main__":
    {"prepare": prepare_and_lose, "held": prepare_held}[sys.argv[1]](Path(sys.argv[2]))
