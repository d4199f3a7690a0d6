"""A run on more nodes and with more rows, on paper: seconds of an update by what takes them, hours, money, traffic,
storage.

An update takes the longer of computing and of gathering sharded weights, since DeepSpeed fetches the next layers while
one computes, and then the sum of the gradients.

- Computing: the multiply-adds of estimate.py, at the share of a GPU's speed that training reaches. Every worker
  computes the
  template for its own rows, so that this part of the work grows with the number of workers.
- ZeRO-3 (Rajbhandari et al. 2020, section 7): each micro-batch gathers all weights twice, forward and backward. Between
  nodes
  all but a node's own share comes through its network, inside a node over NVLink. Stages 0 to 2 send LoRA's gradients
  alone, which are small: that is why they scale where the base fits on one GPU.
- Storage: the base is read once (by one worker where it is sharded, else by every node), one worker writes checkpoints,
  rows
  take 4 bytes a token.

Assumed, and printed with the tables: an A100's NVLink (300 GB/s each way; NVIDIA's data sheet says 600 both ways) and
the machines' networks (p4d and p4de 400 Gb/s, a2 100 Gb/s a node, as AWS and Google name them), of which LINK is
reached; a shared disk of DISK. Overlap is never perfect, so that real runs are slower.

`PUBLISHED` is the one figure known to us of Mixtral-8x7B with LoRA on an A100 (Xia et al. 2024, arXiv 2408.04693,
section III and Table IV: QLoRA of rank 16 on the experts, recomputing, 80 GB). It is 2.6 times slower than this model
says of the same work, an MFU of 8%: its weights are unpacked from 4 bits in each pass, and 3,000 tokens over eight
experts are few. NVIDIA's NeMo AutoModel summary of October 2025 has 18% for LoRA on Llama 3 70B (176 of 989 TFLOP/s, 8
H100) and 23% to 28% for training mixtures of experts of 20B to 120B (231 to 279 TFLOP/s, 8 to 64 H100, with experts in
parallel). ZeRO-3 gathers all experts where a token uses a quarter of them, so that less is to be expected of it between
nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from pi_ray.config import RunConfig
from pi_ray.plan import estimate
from pi_ray.report import cost
from pi_ray.train.updates import updates_in_phase

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from pi_ray.plan.estimate import ModelSize, Shape
    from pi_ray.plan.figures import PhasePlan, Plan

NODES = (1, 2, 4, 8, 16, 32, 64)
ROWS = (1_000_000, 100_000_000)
NVLINK = 300e9  # bytes a second into one GPU
NETWORK = {"aws": 50e9, "gcp": 12.5e9}  # bytes a second into one node
LINK = 0.7  # share of a link's speed that collectives reach
DISK = 1e9  # bytes a second of the shared disk
PUBLISHED_MFU = (0.18, 0.28)
GIB = 2**30


@dataclass(frozen=True)
class Published:
    """A published run: `rows` of `tokens` each (its data set's median) on one A100 at once, and how this model
    compares.
    """

    rows: int
    tokens: int
    rows_per_second: float
    mfu: float
    times_slower: float


PUBLISHED = Published(rows=17, tokens=174, rows_per_second=2.74, mfu=0.08, times_slower=2.6)


@dataclass(frozen=True)
class ScaledUpdate:
    """One update on so many GPUs: seconds by what takes them, operations, and bytes through the network into one node.

    `computing` and `gathering` run side by side.
    """

    computing: float
    gathering: float
    summing: float
    launching: float
    operations: float
    network: float
    mfu: float = 0.0

    @property
    def seconds(self) -> float:
        return max(self.computing, self.gathering, self.launching) + self.summing

    @property
    def limit(self) -> str:
        parts = {
            "computing": self.computing, "network: gathering sharded weights": self.gathering,
            "starting GPU kernels: too few rows": self.launching, "network: gradients": self.summing,
        }
        return max(parts, key=parts.get)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Point:
    """The whole training on `nodes` nodes with `rows` rows. `update` is that of the slowest phase."""

    nodes: int
    gpus: int
    rows: int
    batch: int
    update: ScaledUpdate
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
        shares = {self.update.limit: self.training, **disk}
        return max(shares, key=shares.get)  # type: ignore[arg-type]


def grid(plan: Plan, nodes: Sequence[int] = NODES, rows: Sequence[int] = ()) -> list[Point]:
    """The run on each number of nodes, with its own rows or each of `rows`."""
    return [_point(plan, n, r) for r in rows or [plan.rows["train"]] for n in nodes]


def with_workers(config: RunConfig, workers: int) -> RunConfig:
    """The run on so many GPUs, with the same batch, or the next larger one that they share evenly."""
    batch = workers * -(-config.train.batch_size // workers)
    micro = config.train.micro_batch
    micro = micro if micro and not (batch // workers) % micro else 0
    changes = {"train.workers": workers, "train.batch_size": batch, "train.micro_batch": micro, "train.gpu": True}
    return config.replace(**changes)


def scaled_update(
    size: ModelSize, shape: Shape, config: RunConfig, peak: float = estimate.REFERENCE_GPU[1],
) -> ScaledUpdate:
    """One update of `config` on its train.workers GPUs, spread over nodes of cluster.gpus_per_node."""
    train, workers, nodes = config.train, config.train.workers, _nodes(config)
    micro = train.micro_batch or config.rows_per_worker
    operations, passes = estimate.update_operations(size, shape, config), config.rows_per_worker // micro
    inside, between = traffic(size, config)
    network = NETWORK[config.cluster.launcher.provider]
    gradients = 2 * size.lora * 4 * (workers > 1)
    made = ScaledUpdate(
        computing=operations / (workers * estimate.REACHED["gpu"] * peak),
        gathering=max(inside / NVLINK, between / network) / LINK,
        summing=gradients / (NVLINK if nodes == 1 else network) / LINK,
        launching=passes * size.layers * estimate.LAUNCH,
        operations=operations,
        network=between + gradients * (nodes > 1),
    )
    # Recomputed operations count for nothing in the MFU.
    useful = estimate.update_operations(size, shape, config.replace(**{"train.gradient_checkpointing": False}))
    return replace(made, mfu=useful / (made.seconds * workers * peak))


def traffic(size: ModelSize, config: RunConfig) -> tuple[float, float]:
    """Bytes of weights that one update gathers: into one GPU, and through the network into one node. 0 below ZeRO-3."""
    train, nodes = config.train, _nodes(config)
    if train.backend.name != "deepspeed" or train.backend.zero_stage < 3 or train.workers == 1:
        return 0.0, 0.0
    passes = config.rows_per_worker // (train.micro_batch or config.rows_per_worker)
    whole = 2 * passes * size.weights * estimate.BYTES[estimate.dtype_name(config)]
    return whole * (1 - 1 / train.workers), whole * (1 - 1 / nodes)


def _nodes(config: RunConfig) -> int:
    return -(-config.train.workers // config.cluster.gpus_per_node)


def _point(plan: Plan, nodes: int, rows: int) -> Point:
    config, size = with_workers(plan.config, nodes * plan.config.cluster.gpus_per_node), plan.size
    train, workers = config.train, config.train.workers
    counts = [updates_in_phase(rows, p.phase, train.batch_size) for p in plan.phases]
    updates = [scaled_update(size, p.shape, config) for p in plan.phases]
    training = sum(n * u.seconds for n, u in zip(counts, updates, strict=True))
    base = size.weights * estimate.BYTES[estimate.dtype_name(config)]
    reading = base / DISK * (1 if traffic(size, config)[0] else nodes)
    saving = sum(counts) // train.checkpoint_every * 12 * size.lora / DISK
    phases = sum(4 * rows * (p.shape.row + p.shape.label) for p in plan.phases)
    return Point(
        nodes=nodes, gpus=workers, rows=rows, batch=train.batch_size, update=max(updates, key=lambda u: u.seconds),
        training=training, reading=reading, saving=saving,
        tokens=sum(_tokens(p, n, size, config) for p, n in zip(plan.phases, counts, strict=True)),
        stored=phases + base + (train.keep_checkpoints + 1) * 12 * size.lora,
        memory=max(sum(estimate.device_memory(size, p.shape, config).values()) for p in plan.phases),
        money=cost.training_cost(config.cost, training + reading + saving, workers),
    )


def _tokens(phase: PhasePlan, updates: int, size: ModelSize, config: RunConfig) -> float:
    """Tokens that pass through the model: every row, and the template once for each pass of a worker, or each row."""
    train = config.train
    rows_of_a_pass = (train.micro_batch or config.rows_per_worker) if estimate.shares_prefix(size, config) else 1
    passes = train.batch_size / rows_of_a_pass
    return updates * (passes * phase.shape.prefix + train.batch_size * phase.shape.fed)


def print_scale(plan: Plan, console: Console) -> None:
    """Print both tables and what they assume."""
    from rich.text import Text

    points, config = grid(plan), plan.config
    table = _table("nodes", "GPUs", "batch", "seconds", "compute", "network", "MFU", "hours", config.cost.currency)
    for p in points:
        fits = p.memory <= config.cluster.gpu_memory_gib * GIB
        limit = p.limit if fits else f"memory: {p.memory / GIB:.0f} GiB on a GPU of {config.cluster.gpu_memory_gib}"
        u = p.update
        seconds = [f"{part:.2g}" for part in (u.seconds, u.computing, u.gathering + u.summing)]
        totals = [f"{u.mfu:.0%}", f"{p.seconds / 3600:.2g}", f"{p.money:,.0f}", limit]
        table.add_row(str(p.nodes), str(p.gpus), str(p.batch), *seconds, *totals)
    nodes = f"On nodes of {config.cluster.gpus_per_node} A100s ({config.cluster.launcher.provider})"
    console.print(Text(f"{nodes}, with the run's {plan.rows['train']:,} rows", "bold"))
    console.print(table)
    console.print(Text(work_in_words(points)))
    more = _table("rows", "nodes", "tokens", "on disk", "hours", config.cost.currency)
    for p in grid(plan, (max(1, _nodes(config)), NODES[-1]), ROWS):
        size = [f"{p.rows:,}", str(p.nodes), f"{p.tokens:.1e}", f"{p.stored / 1e9:,.0f} GB"]
        more.add_row(*size, f"{p.seconds / 3600:,.0f}", f"{p.money:,.0f}", p.limit)
    console.print(more)
    console.print(Text(limits_in_words(points), "bold"))
    low, high = PUBLISHED_MFU
    links = f"links at {LINK:.0%} of what the machines name, gathering hidden behind computing"
    console.print(Text(
        f"On paper, and an upper bound: {links}, a shared disk of {DISK / 1e9:.0f} GB/s. "
        f"Published: Mixtral with LoRA in 4 bits on one A100 at an MFU of {PUBLISHED.mfu:.0%}, "
        f"{PUBLISHED.times_slower} times slower than this model says of it (Xia et al. 2024); "
        f"{low:.0%} to {high:.0%} on H100s (LoRA on Llama 3 70B, "
        f"mixtures of experts). A batch above {config.train.batch_size} learns differently: look at train.lr.", "dim",
    ))


def _table(*numbers: str) -> Table:
    """Columns of numbers, and what limits it in the width that they leave."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("limited by", overflow="fold")
    return table


def work_in_words(points: Sequence[Point]) -> str:
    """Operations and traffic of an update, on the fewest nodes and on the most."""
    (few, a), (many, b) = ((p.nodes, p.update) for p in (points[0], points[-1]))
    return (
        f"Seconds are an update's, in the slowest phase. From {few} to {many} nodes it goes from {a.operations:.1e} to "
        f"{b.operations:.1e} FLOPs, and from {a.network / 1e9:,.1f} to {b.network / 1e9:,.1f} GB through the network "
        "into each node."
    )


def limits_in_words(points: Sequence[Point]) -> str:
    """The first limit of the run, and the number of nodes from which more hardly help."""
    first = points[0]
    turn = next((p for p in points if p.limit != first.limit), None)
    until = f"; from {turn.nodes} nodes on by {turn.limit}" if turn else f", up to {points[-1].nodes} nodes"
    limited = f"Limited first by {first.limit}{until}."
    flat = next(((a, b) for a, b in pairwise(points) if b.seconds > 0.8 * a.seconds), None)
    if not flat:
        return limited
    fewer, more = flat
    gain = fewer.seconds / more.seconds
    faster = f"{gain - 1:.0%} faster" if gain > 1.005 else "no faster"
    return f"{limited} {more.nodes} nodes are {faster} than {fewer.nodes}."
