"""A run on more nodes and with more rows, on paper: seconds of an update, hours, money, traffic, storage.

An update takes the longer of computing and of gathering sharded weights, since DeepSpeed fetches the next layers while
one computes, and then the sum of the gradients.

- Computing: the multiply-adds of estimate.py, at the share of a GPU's speed that training reaches. Every worker
  computes the template for its own rows, so that this part of the work grows with the number of workers.
- ZeRO-3 (Rajbhandari et al. 2020, section 7): each micro-batch gathers all weights twice, forward and backward. Between
  nodes all but a node's own share comes through its network, inside a node over NVLink. Stages 0 to 2 send LoRA's
  gradients alone, which are small: that is why they scale where the base fits on one GPU.
- Storage: the base is read once (by one worker where it is sharded, else by every node), one worker writes checkpoints,
  rows take 4 bytes a token.

Published: Mixtral-8x7B with QLoRA on an A100 (Xia et al. 2024, arXiv 2408.04693, section III and Table IV: rank 16 on
the experts, recomputing, 80 GB) is 2.6 times slower than this model says, an MFU of 8%: weights are unpacked from 4
bits in each pass, and 3,000 tokens over eight experts are few. NVIDIA's NeMo AutoModel summary of October 2025 has 18%
for LoRA on Llama 3 70B (176 of 989 TFLOP/s, 8 H100) and 23% to 28% for training mixtures of experts of 20B to 120B (231
to 279 TFLOP/s, 8 to 64 H100, with experts in parallel); ZeRO-3 gathers all experts, and reaches less between nodes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pi_ray.config import RunConfig
from pi_ray.plan import estimate
from pi_ray.plan.estimate import ModelSize, Shape
from pi_ray.plan.figures import Plan
from pi_ray.report import cost
from pi_ray.train.updates import updates_in_phase

NODES = (1, 2, 4, 8, 16, 32, 64)
ROWS = (1_000_000, 100_000_000)
NVLINK = 300e9  # bytes a second into one A100; NVIDIA's data sheet says 600e9 both ways
NETWORK = {"aws": 50e9, "gcp": 12.5e9}  # bytes a second into one node: p4d and p4de 400 Gb/s, a2 100 Gb/s
LINK = 0.7  # share of a link's speed that collectives reach; overlap is never perfect, so that real runs are slower
DISK = 1e9  # bytes a second of the shared disk
PUBLISHED_MFU = (0.18, 0.28)
MIXTRAL_MFU, MIXTRAL_SLOWER = 0.08, 2.6  # of the published run of Mixtral; times slower than this model says
GIB = 2**30


@dataclass(frozen=True)
class ScaledUpdate:
    """One update: seconds by what takes them, of which computing, gathering and launching run side by side."""

    computing: float
    gathering: float  # of sharded weights
    summing: float  # of gradients
    launching: float  # of GPU kernels
    operations: float
    network: float  # bytes into one node
    mfu: float = 0.0

    @property
    def seconds(self) -> float:
        return max(self.computing, self.gathering, self.launching) + self.summing

    @property
    def limit(self) -> str:
        return _largest({
            "computing": self.computing, "network: gathering sharded weights": self.gathering,
            "starting GPU kernels: too few rows": self.launching, "network: gradients": self.summing,
        })


@dataclass(frozen=True)
class Point:
    """The whole training on `nodes` nodes with `rows` rows: seconds, tokens, bytes, money."""

    nodes: int
    gpus: int
    rows: int
    batch: int
    update: ScaledUpdate  # of the slowest phase
    training: float
    reading: float
    saving: float
    tokens: float
    stored: float
    memory: float
    money: float

    @property
    def seconds(self) -> float:
        return self.training + self.reading + self.saving

    @property
    def limit(self) -> str:
        disk = {"disk: reading the base model": self.reading, "disk: checkpoints": self.saving}
        return _largest({self.update.limit: self.training, **disk})


def _largest(seconds: dict[str, float]) -> str:
    return max(seconds, key=lambda name: seconds[name])


def grid(plan: Plan, nodes: Sequence[int] = NODES, rows: Sequence[int] = ()) -> list[Point]:
    """The run on each number of nodes, with its own rows or each of `rows`."""
    return [_point(plan, n, r) for r in rows or [plan.rows["train"]] for n in nodes]


def with_workers(config: RunConfig, workers: int) -> RunConfig:
    """The run on so many GPUs, with the same batch, or the next larger one that they share evenly."""
    each, micro = math.ceil(config.train.batch_size / workers), config.train.micro_batch
    return config.replace(**{
        "train.workers": workers, "train.min_workers": 0, "train.batch_size": workers * each, "train.gpu": True,
        "train.micro_batch": micro if micro and each % micro == 0 else 0,
    })


def scaled_update(size: ModelSize, shape: Shape, config: RunConfig) -> ScaledUpdate:
    """One update of `config` on its train.workers A100s, spread over nodes of cluster.gpus_per_node."""
    workers, nodes, (_, peak) = config.train.workers, _nodes(config), estimate.REFERENCE_GPU
    operations, passes = estimate.update_operations(size, shape, config), _passes(config)
    inside, between = traffic(size, config)
    network = NETWORK[config.cluster.launcher.provider]
    gradients = 2 * size.lora * 4 * (workers > 1)
    made = ScaledUpdate(
        computing=operations / (workers * estimate.REACHED["gpu"] * peak),
        gathering=max(inside / NVLINK, between / network) / LINK,
        summing=gradients / (NVLINK if nodes == 1 else network) / LINK,
        launching=passes * size.layers * estimate.LAUNCH,
        operations=operations, network=between + gradients * (nodes > 1),
    )
    # Recomputed operations count for nothing in the MFU.
    useful = estimate.update_operations(size, shape, config.replace(**{"train.gradient_checkpointing": False}))
    return replace(made, mfu=useful / (made.seconds * workers * peak))


def traffic(size: ModelSize, config: RunConfig) -> tuple[float, float]:
    """Bytes of weights that one update gathers: into one GPU, and through the network into one node. 0 below ZeRO-3."""
    train = config.train
    if train.backend.name != "deepspeed" or train.backend.zero_stage < 3 or train.workers == 1:
        return 0.0, 0.0
    whole = 2 * _passes(config) * _base_bytes(size, config)
    return whole * (1 - 1 / train.workers), whole * (1 - 1 / _nodes(config))


def _nodes(config: RunConfig) -> int:
    return math.ceil(config.train.workers / config.cluster.gpus_per_node)


def _passes(config: RunConfig) -> int:
    return config.rows_per_worker // estimate.rows_per_pass(config)


def _base_bytes(size: ModelSize, config: RunConfig) -> float:
    return size.weights * estimate.BYTES[estimate.dtype_name(config)]


def _point(plan: Plan, nodes: int, rows: int) -> Point:
    config, size = with_workers(plan.config, nodes * plan.config.cluster.gpus_per_node), plan.size
    train, shapes = config.train, [p.shape for p in plan.phases]
    base, adapter = _base_bytes(size, config), 12 * size.lora  # with Adam's state
    counts = [updates_in_phase(rows, p.phase, train.batch_size) for p in plan.phases]
    updates = [scaled_update(size, shape, config) for shape in shapes]
    tokens = [sum(estimate.update_tokens(size, shape, config)) for shape in shapes]
    training = sum(n * u.seconds for n, u in zip(counts, updates, strict=True))
    reading = base / DISK * (1 if traffic(size, config)[0] else nodes)
    saving = sum(counts) // train.checkpoint_every * adapter / DISK
    return Point(
        nodes=nodes, gpus=train.workers, rows=rows, batch=train.batch_size,
        update=max(updates, key=lambda u: u.seconds), training=training, reading=reading, saving=saving,
        tokens=sum(n * t for n, t in zip(counts, tokens, strict=True)),
        stored=sum(4 * rows * (s.row + s.label) for s in shapes) + base + (train.keep_checkpoints + 1) * adapter,
        memory=max(sum(estimate.device_memory(size, shape, config).values()) for shape in shapes),
        money=cost.training_cost(config.cost, training + reading + saving, train.workers),
    )


def print_scale(plan: Plan, console: Console) -> None:
    """Print both tables and what they assume."""
    points, config = grid(plan), plan.config
    table = _table("nodes", "GPUs", "batch", "seconds", "compute", "network", "MFU", "hours", config.cost.currency)
    for p in points:
        u, room = p.update, config.cluster.gpu_memory_gib
        table.add_row(
            str(p.nodes), str(p.gpus), str(p.batch),
            *(f"{part:.2g}" for part in (u.seconds, u.computing, u.gathering + u.summing)),
            f"{u.mfu:.0%}", f"{p.seconds / 3600:.2g}", f"{p.money:,.0f}",
            p.limit if p.memory <= room * GIB else f"memory: {p.memory / GIB:.0f} GiB on a GPU of {room}",
        )
    nodes = f"On nodes of {config.cluster.gpus_per_node} A100s ({config.cluster.launcher.provider})"
    console.print(Text(f"{nodes}, with the run's {plan.rows['train']:,} rows", "bold"))
    console.print(table)
    console.print(Text(work_in_words(points)))
    more = _table("rows", "nodes", "tokens", "on disk", "hours", config.cost.currency)
    for p in grid(plan, (_nodes(config), NODES[-1]), ROWS):
        more.add_row(
            f"{p.rows:,}", str(p.nodes), f"{p.tokens:.1e}", f"{p.stored / 1e9:,.0f} GB", f"{p.seconds / 3600:,.0f}",
            f"{p.money:,.0f}", p.limit,
        )
    console.print(more)
    console.print(Text(limits_in_words(points), "bold"))
    low, high = PUBLISHED_MFU
    console.print(Text(
        f"On paper, and an upper bound: links at {LINK:.0%} of what the machines name, gathering hidden behind "
        f"computing, a shared disk of {DISK / 1e9:.0f} GB/s. Published: Mixtral with LoRA in 4 bits on one A100 at an "
        f"MFU of {MIXTRAL_MFU:.0%}, {MIXTRAL_SLOWER} times slower than this model says of it (Xia et al. 2024); "
        f"{low:.0%} to {high:.0%} on H100s (LoRA on Llama 3 70B, mixtures of experts). "
        f"A batch above {config.train.batch_size} learns differently: look at train.lr.", "dim",
    ))


def _table(*numbers: str) -> Table:
    """Columns of numbers, and what limits it in the width that they leave."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("limited by", overflow="fold")
    return table


def work_in_words(points: Sequence[Point]) -> str:
    """Operations and traffic of an update, on the fewest nodes and on the most."""
    (few, a), (many, b) = ((p.nodes, p.update) for p in (points[0], points[-1]))
    work = f"From {few} to {many} nodes it goes from {a.operations:.1e} to {b.operations:.1e} FLOPs"
    sent = f"from {a.network / 1e9:,.1f} to {b.network / 1e9:,.1f} GB through the network into each node"
    return f"Seconds are an update's, in the slowest phase. {work}, and {sent}."


def limits_in_words(points: Sequence[Point]) -> str:
    """The first limit of the run, and the number of nodes from which more hardly help."""
    first = points[0]
    turn = next((p for p in points if p.limit != first.limit), None)
    until = f"; from {turn.nodes} nodes on by {turn.limit}" if turn else f", up to {points[-1].nodes} nodes"
    limited = f"Limited first by {first.limit}{until}."
    for fewer, more in pairwise(points):
        if more.seconds > 0.8 * fewer.seconds:
            gain = fewer.seconds / more.seconds
            faster = f"{gain - 1:.0%} faster" if gain > 1.005 else "no faster"
            return f"{limited} {more.nodes} nodes are {faster} than {fewer.nodes}."
    return limited
