"""Two workers against one on this machine, and Ray Train against a plain torchrun of the same loop.

    python -m tests.bench.scale --data NL2BASH_FOLDER [--updates 6] [--rounds 2] [--backend deepspeed] [--model
    smollm2-135m] [--out FILE]

Every run is the whole training worker on the CPU: `--updates` updates behind a 480-token template, then as many with
the query alone.

    one     one process with all threads, started by torchrun
    two     two processes with half of the threads each, started by torchrun, gradients over gloo
    ray     the same two started by `pi_ray.train.launch.train` on a local Ray

They run in turn, each from a cold start. A step is the time from one update's log entry to the next, within a phase, so
that the first update of a phase warms up; start-up is reported by itself. Last line, from medians summed over both
phases: `workers2_over_1` is the seconds of one worker over those of two (both have all cores, and each of two workers
computes the template for its half of the rows), `ray_overhead` is ray / two - 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from pi_ray.config import RunConfig
from pi_ray.run.directory import RunDir
from tests.bench.report import header, last_line
from tests.bench.train import PROMPTS, cores, data_folder, in_fresh_process, prepare, run_config

SIDES = {"one": 1, "two": 2, "ray": 2}  # name -> workers
LIMIT = 0.05


@dataclass
class Times:
    """All rounds of one side: seconds of every step by phase, and of every start until the first update begins."""

    steps: dict[int, list[float]] = field(default_factory=dict)
    starts: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def add(self, entries: Sequence[dict[str, Any]], launched: float) -> None:
        """`entries`: a whole train.jsonl; `launched`: the time at which its run was started."""
        updates = [e for e in entries if "loss" in e]
        self.starts.append(updates[0]["time"] - updates[0]["seconds"] - launched)
        self.losses = [e["loss"] for e in updates]
        for before, after in pairwise(updates):
            if before["phase"] == after["phase"]:
                self.steps.setdefault(after["phase"], []).append(after["time"] - before["time"])

    @property
    def medians(self) -> list[float]:
        return [median(steps) for _, steps in sorted(self.steps.items())]


def train_plainly(settings: dict[str, Any]) -> None:
    """Train in each process that torchrun starts."""
    import torch
    import torch.distributed as dist

    from pi_ray.train.trainer import train_worker

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    dist.init_process_group("gloo")
    train_worker(settings)
    dist.destroy_process_group()


def train_on_ray(settings: dict[str, Any], threads: int) -> None:
    import ray

    from pi_ray.train.launch import train

    ray.init(
        address="local", num_cpus=threads, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
    )
    train(RunConfig.model_validate(settings["config"]))
    ray.shutdown()


def command(side: str, settings: Path, threads: int) -> tuple[list[str], dict[str, str]]:
    """The command of a side, and its environment. Ray gives its workers their threads itself, by their share of the
    CPUs.
    """
    workers, module = SIDES[side], ["tests.bench.scale", "--worker", str(settings), "--threads", str(threads)]
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS" and not k.startswith("RAY_ADDRESS")}
    environment |= {
        "TOKENIZERS_PARALLELISM": "false", "RAY_USAGE_STATS_ENABLED": "0", "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
    }
    if side == "ray":
        return [sys.executable, "-m", *module], environment
    launch = [
        "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(workers), "-m",
    ]
    return [sys.executable, "-m", *launch, *module], environment | {"OMP_NUM_THREADS": str(max(1, threads // workers))}


def run(side: str, config: RunConfig, threads: int, times: Times) -> None:
    """One cold run of a side, on the rows that lie prepared in the run directory."""
    from pi_ray.train.launch import fingerprint_of

    prepared = RunDir(config.root).phases
    with tempfile.TemporaryDirectory() as folder:
        config = config.replace(run_dir=folder, **{"train.workers": SIDES[side]})
        RunDir(folder).phases.symlink_to(prepared)
        log, settings, output = RunDir(folder).train_log, Path(folder) / "settings.json", Path(folder) / "output.txt"
        settings.write_text(
            json.dumps(
                {"config": config.model_dump(mode="json"), "fingerprint": fingerprint_of(config), "device": "cpu"}
            )
        )
        line, environment = command(side, settings, threads)
        launched = time.time()
        with output.open("wb") as out:
            code = subprocess.run(line, env=environment, stdout=out, stderr=subprocess.STDOUT).returncode
        if code:
            raise SystemExit(
                f"side '{side}' failed with exit status {code}; the end of its output:\n"
                + "\n".join(output.read_text(errors="replace").splitlines()[-30:])
            )
        times.add([json.loads(entry) for entry in log.read_text().splitlines()], launched)


def figures(times: dict[str, Times]) -> dict[str, float]:
    one, two, ray = (sum(times[side].medians) for side in SIDES)
    return {"workers2_over_1": one / two, "ray_overhead": ray / two - 1}


def show(times: dict[str, Times], threads: int) -> None:
    for side, t in times.items():
        steps = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in zip(PROMPTS, t.medians, strict=True))
        print(
            f"  {side:4} {SIDES[side]} worker(s) of {max(1, threads // SIDES[side])} thread(s): an update {steps}; "
            f"start-up {median(t.starts):.1f} s"
        )
    for i, name in enumerate(PROMPTS):
        one, two, ray = (t.medians[i] for t in times.values())
        print(
            f"    {name}: two workers are {one / two:.2f} times as fast as one; Ray Train costs {ray / two - 1:+.1%} "
            "of a plain step"
        )
    start = median(times["ray"].starts) - median(times["two"].starts)
    print(f"    start-up: Ray takes {start:+.1f} s more than torchrun, once for a run")
    spread = max(
        abs(a - b) / abs(b) for t in times.values() for a, b in zip(t.losses, times["one"].losses, strict=True)
    )
    print(f"    losses of all three: largest relative difference {spread:.1e}")
    overhead = figures(times)["ray_overhead"]
    print(
        f"    Ray Train's cost a step {overhead:+.1%}, {'below' if overhead < LIMIT else 'NOT below'} {LIMIT:.0%}",
        flush=True,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="NL2Bash folder; default: nl2bash in $PI_RAY_DATA")
    parser.add_argument("--updates", type=int, default=6, help="of each phase in each run; the first one warms up")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side")
    parser.add_argument(
        "--backend", choices=["deepspeed", "ddp"], default="deepspeed",
        help="DeepSpeed ZeRO-2, or plain data parallelism",
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--out", type=Path, help="also write every measurement there, as JSON")
    # the settings of a process that this program started
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.updates < 2:
        parser.error("--updates must be at least 2: the first one only warms up")
    if args.batch % 2:
        parser.error("--batch must be even: two workers share it")
    return args


def main() -> None:
    args = _arguments()
    if args.worker:
        settings = json.loads(args.worker.read_text())
        return train_plainly(settings) if "LOCAL_RANK" in os.environ else train_on_ray(settings, args.threads)
    data = data_folder(args.data)
    header(
        f"training of {args.model} with {args.backend} on {args.threads} CPU thread(s): workers, and Ray Train against "
        "torchrun"
    )
    times = {side: Times() for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        config = run_config(
            Path(folder), args.model, "float32", args.batch, args.updates, list(PROMPTS.values()),
            backend={"name": args.backend},
        )
        in_fresh_process(prepare, config, data)
        for i in range(args.rounds):
            for side, t in times.items():
                run(side, config, args.threads, t)
                print(f"  round {i + 1}: {side} done", flush=True)
    show(times, args.threads)
    if args.out:
        args.out.write_text(json.dumps({side: vars(t) for side, t in times.items()}, indent=1) + "\n")
    last_line(**figures(times))


if __name__ == "__main__":
    main()
