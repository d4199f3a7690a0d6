"""A Ray cluster of two nodes on this machine that loses one: `python -m tests.two_nodes prepare FOLDER`, by itself.

FOLDER has config.json; a file `killed` appears there when the node is gone. The lost node is replaced, as by an
autoscaler.
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
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pi_ray.config import RunConfig
from pi_ray.data import phase_dataset, pieces

NODE = {"num_cpus": 1, "object_store_memory": 100 << 20}


def outside() -> dict[str, str]:
    """The environment of a process with a Ray of its own: Ray joins a cluster that its temporary folder names."""
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


class WaitingTokeniser(phase_dataset.TokeniseRows):
    """Marks the node on which it has begun, and waits until the other one is lost."""

    def __call__(self, table: Any, rows: pieces.RowRange) -> dict[str, Any]:
        import ray

        folder = Path(self.config.run_dir).parent
        (folder / f"begun-{ray.get_runtime_context().get_node_id()}").touch()
        while not (folder / "killed").exists():
            time.sleep(0.01)
        return super().__call__(table, rows)


class CountedSink(pieces.PieceSink):
    """Notes each phase's file that it has written in FOLDER/written."""

    is_held = False

    def write(self, blocks: Iterable[Any], ctx: Any) -> None:
        blocks = list(blocks)
        paths = [Path(path) for block in blocks for path in block[pieces.PATH].unique().to_pylist()]
        if "phases" not in paths[0].parts:
            return super().write(blocks, ctx)
        folder = paths[0].parents[3]  # FOLDER/run/phases/.NAME.partial/part-N.parquet
        written = folder / "written"
        with open(folder / "turn", "w") as turn:
            if self.is_held:
                fcntl.flock(turn, fcntl.LOCK_EX)
            while self.is_held and written.exists() and len(written.read_text().split()) >= 4:
                time.sleep(0.01)
            super().write(blocks, ctx)
            with open(written, "a") as f:
                f.writelines(f"{path.parent.name}/{path.name}\n" for path in paths)
        return None


class HeldSink(CountedSink):
    """Waits for ever after four files, so that what is left of a killed run's Ray writes nothing more.

    Held sinks write one piece at a time: no piece is written and not yet noted when the four are.
    """

    is_held = True


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
        # A node sets a handler when it starts, which only the main thread may do.
        ray._private.utils.set_sigterm_handler = lambda handler: None
        nodes.add_node(**NODE)
        (folder / "killed").touch()

    phase_dataset.PIECE_ROWS, phase_dataset.TokeniseRows = 10, WaitingTokeniser  # type: ignore[misc]
    here = f"begun-{ray.get_runtime_context().get_node_id()}"  # the driver is attached to the head
    begun_elsewhere = lambda: any(p.name != here for p in folder.glob("begun-*"))  # noqa: E731
    killer = threading.Thread(target=lose, args=(begun_elsewhere,), daemon=True)
    killer.start()
    prepare(config, lambda line: None)
    killer.join(timeout=60)
    ray.shutdown()
    nodes.shutdown()


def prepare_held(folder: Path) -> None:
    """Prepare on a Ray of its own, counting files; killed by the test."""
    from pi_ray.data.prepare import prepare

    phase_dataset.PIECE_ROWS, pieces.PieceSink = 10, HeldSink  # type: ignore[misc]
    prepare(RunConfig.model_validate_json((folder / "config.json").read_text()), lambda line: None)


if __name__ == "__main__":
    {"prepare": prepare_and_lose, "held": prepare_held}[sys.argv[1]](Path(sys.argv[2]))
