"""Training workers as processes of this machine over gloo, without Ray. They fork from one server that has everything
imported, so that a start costs little.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PRELOAD = [
    "deepspeed.runtime.zero.muon.muon_optimizer", "peft", "transformers.models.llama.modeling_llama",
    "transformers.models.mixtral.modeling_mixtral", "pi_ray.train.trainer", "tests.workers",
]


def run(world: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """The results of `work(*args)` in each of `world` processes that know each other through torch.distributed. `work`
    is a module's function.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    results: list[Any] = [None] * world
    with tempfile.TemporaryDirectory() as folder:
        said = context.SimpleQueue()
        processes = [
            context.Process(
                target=_one, args=(rank, world, f"file://{Path(folder) / 'store'}", said, work, args), daemon=True
            )
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        try:
            for _ in processes:
                rank, results[rank], error = said.get()
                assert not error, f"worker {rank}: {error}"
            for process in processes:
                process.join(timeout=30)
        finally:
            for process in processes:
                process.kill()
    return results


def _one(rank: int, world: int, store: str, said: Any, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
        value = work(*args)
        dist.barrier()
        said.put((rank, value, ""))
        dist.destroy_process_group()
    except BaseException:
        said.put((rank, None, traceback.format_exc()))
