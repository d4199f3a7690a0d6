"""The run on paper with more nodes and more rows: seconds of an update by what takes them, hours, money, traffic, storage, and what limits it first.

An update takes the longer of computing and of gathering sharded weights, since DeepSpeed fetches the next layers while one computes, and then its gradients' sum.

- Computing: estimate.py's multiply-adds, at the share of a GPU's speed that training reaches. Every worker computes the template for its own rows, so that its part
  of the work grows with the number of workers.
- ZeRO-3 (Rajbhandari et al. 2020, section 7): each micro-batch gathers all weights twice, forward and backward. Between nodes all but a node's own share comes
  through its network, inside a node over NVLink. Stages 0 to 2 send LoRA's gradients alone, which are small: that is why they scale where the base fits on one GPU.
- Storage: the base is read once (by one worker where it is sharded, else by every node), checkpoints are written by one worker, rows are 4 bytes a token.

Assumed, and said so in what is printed: an A100's NVLink (300 GB/s each way; NVIDIA's A100 data sheet says 600 both ways) and the machines' networks (p4d and p4de
400 Gb/s, a2 100 Gb/s a node, as AWS and Google name them), of which LINK is reached; a shared disk of DISK. Overlap is never perfect, so that real runs are slower.

Published figures to hold the column MFU against: `PUBLISHED`, the one known to us of Mixtral-8x7B with LoRA on an A100 (Xia et al. 2024, arXiv 2408.04693, section III
and Table IV: QLoRA of rank 16 on the experts, recomputing, one A100 with 80 GB), is 2.6 times slower than this model says of the same work, an MFU of 8%: its weights are
unpacked from 4 bits in each pass, and 3,000 tokens over eight experts are few. NVIDIA's NeMo AutoModel summary of October 2025 has 18% for LoRA on Llama 3 70B (176 of
989 TFLOP/s, 8 H100) and 23% to 28% for training mixtures of experts of 20B to 120B (231 to 279 TFLOP/s, 8 to 64 H100, with experts in parallel). ZeRO-3 gathers all
experts where a token uses a quarter of them, so that less is to be expected of it between nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from pi_ray.config import RunConfig
from pi_ray.plan import estimate
from pi_ray.report import cost
from pi_ray.train.updates import phase_updates

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
    """A published run of Mixtral-8x7B with LoRA: `rows` of `tokens` (the median of its data set) on one A100 at once, and how it compares with this model."""

    rows: int
    tokens: int
    rows_per_second: float
    mfu: float
    times_slower: float


PUBLISHED = Published(rows=17, tokens=174, rows_per_second=2.74, mfu=0.08, times_slower=2.6)


@dataclass(frozen=True)
class Update:
    """One update on so many GPUs: seconds, by what takes them (`computing` and `gathering` run side by side), operations, and bytes through the network into one node."""

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
    update: Update
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
        shares = {self.update.limit: self.training, "disk: reading the base model": self.reading, "disk: checkpoints": self.saving}
        return max(shares, key=shares.get)  # type: ignore[arg-type]


def grid(plan: Plan, nodes: Sequence[int] = NODES, rows: Sequence[int] = ()) -> list[Point]:
    """The run on each number of nodes, with its own rows or each of `rows`."""
    return [_point(plan, n, r) for r in rows or [plan.rows["train"]] for n in nodes]


def with_workers(config: RunConfig, workers: int) -> RunConfig:
    """The run on so many GPUs: the same batch while each has a row of it and they share it evenly, else the next larger one."""
    batch = workers * -(-config.train.batch_size // workers)
    micro = config.train.micro_batch if config.train.micro_batch and not (batch // workers) % config.train.micro_batch else 0
    return config.replace(**{"train.workers": workers, "train.batch_size": batch, "train.micro_batch": micro, "train.gpu": True})


def update(size: ModelSize, shape: Shape, config: RunConfig, peak: float = estimate.REFERENCE_GPU[1]) -> Update:
    """One update of `config`, which says how many GPUs; they are spread over nodes of cluster.gpus_per_node."""
    train, workers, nodes = config.train, config.train.workers, _nodes(config)
    micro = train.micro_batch or config.rows_per_worker
    operations, passes = estimate.update_operations(size, shape, config), config.rows_per_worker // micro
    computing = operations / (workers * estimate.REACHED["gpu"] * peak)
    inside, between = traffic(size, config)
    network = NETWORK[config.cluster.launcher.provider]
    gathering = max(inside / NVLINK, between / network) / LINK
    gradients = 2 * size.lora * 4 * (workers > 1)
    summing = gradients / (NVLINK if nodes == 1 else network) / LINK
    made = Update(computing, gathering, summing, passes * size.layers * estimate.LAUNCH, operations, between + gradients * (nodes > 1))
    useful = estimate.update_operations(size, shape, config.replace(**{"train.gradient_checkpointing": False}))  # recomputing is no use to anyone
    return replace(made, mfu=useful / (made.seconds * workers * peak))


def traffic(size: ModelSize, config: RunConfig) -> tuple[float, float]:
    """Bytes of gathered weights in one update: into one GPU, and through the network into one node. None below ZeRO-3, or where nothing is sharded."""
    train, nodes = config.train, _nodes(config)
    if train.backend.name != "deepspeed" or train.backend.zero_stage < 3 or train.workers == 1:
        return 0.0, 0.0
    passes = config.rows_per_worker // (train.micro_batch or config.rows_per_worker)
    whole = 2 * passes * size.weights * estimate.BYTES[estimate.dtype_of(config)]
    return whole * (1 - 1 / train.workers), whole * (1 - 1 / nodes)


def _nodes(config: RunConfig) -> int:
    return -(-config.train.workers // config.cluster.gpus_per_node)


def _point(plan: Plan, nodes: int, rows: int) -> Point:
    config, size = with_workers(plan.config, nodes * plan.config.cluster.gpus_per_node), plan.size
    train, workers = config.train, config.train.workers
    found = [(p, phase_updates(rows, p.phase, train.batch_size), update(size, p.shape, config)) for p in plan.phases]
    updates = sum(n for _, n, _ in found)
    training = sum(n * u.seconds for _, n, u in found)
    base = size.weights * estimate.BYTES[estimate.dtype_of(config)]
    reading = base / DISK * (1 if traffic(size, config)[0] else nodes)
    saving = updates // train.checkpoint_every * 12 * size.lora / DISK
    stored = sum(4 * rows * (p.shape.row + p.shape.label) for p in plan.phases) + base + (train.keep_checkpoints + 1) * 12 * size.lora
    slowest = max((u for _, _, u in found), key=lambda u: u.seconds)
    return Point(
        nodes=nodes, gpus=workers, rows=rows, batch=train.batch_size, update=slowest, training=training, reading=reading, saving=saving, stored=stored,
        tokens=sum(_tokens(p, n, size, config) for p, n, _ in found),
        memory=max(sum(estimate.memory(size, p.shape, config).values()) for p in plan.phases),
        money=cost.training_cost(config.cost, training + reading + saving, workers),
    )


def _tokens(phase: PhasePlan, updates: int, size: ModelSize, config: RunConfig) -> float:
    """Tokens that pass through the model: every row, and the template once for each pass of a worker, or with every row."""
    train = config.train
    passes = train.batch_size / (train.micro_batch or config.rows_per_worker) if estimate.shares_prefix(size, config) else train.batch_size
    return updates * (passes * phase.shape.prefix + train.batch_size * phase.shape.fed)


def render(plan: Plan, console: Console) -> None:
    """Print both tables and what they assume."""
    from rich.text import Text

    own, config = grid(plan), plan.config
    table = _table("nodes", "GPUs", "batch", "seconds", "compute", "network", "MFU", "hours", config.cost.currency)
    for p in own:
        fits = p.memory <= config.cluster.gpu_memory_gib * GIB
        limit = p.limit if fits else f"memory: {p.memory / GIB:.0f} GiB on a GPU of {config.cluster.gpu_memory_gib}"
        u = p.update
        seconds = [f"{part:.2g}" for part in (u.seconds, u.computing, u.gathering + u.summing)]
        table.add_row(str(p.nodes), str(p.gpus), str(p.batch), *seconds, f"{u.mfu:.0%}", f"{p.seconds / 3600:.2g}", f"{p.money:,.0f}", limit)
    console.print(Text(f"On nodes of {config.cluster.gpus_per_node} A100s ({config.cluster.launcher.provider}), with the run's {plan.rows['train']:,} rows", "bold"))
    console.print(table)
    console.print(Text(work(own)))
    more = _table("rows", "nodes", "tokens", "on disk", "hours", config.cost.currency)
    for p in grid(plan, (max(1, _nodes(config)), NODES[-1]), ROWS):
        more.add_row(f"{p.rows:,}", str(p.nodes), f"{p.tokens:.1e}", f"{p.stored / 1e9:,.0f} GB", f"{p.seconds / 3600:,.0f}", f"{p.money:,.0f}", p.limit)
    console.print(more)
    console.print(Text(sentence(own), "bold"))
    low, high = PUBLISHED_MFU
    console.print(Text(
        f"On paper, and an upper bound: links at {LINK:.0%} of what the machines name, gathering hidden behind computing, a shared disk of {DISK / 1e9:.0f} GB/s. "
        f"Published: Mixtral with LoRA in 4 bits on one A100 at an MFU of {PUBLISHED.mfu:.0%}, {PUBLISHED.times_slower} times slower than this model says of it "
        f"(Xia et al. 2024); {low:.0%} to {high:.0%} on H100s (LoRA on Llama 3 70B, mixtures of experts). A batch above {config.train.batch_size} learns differently: look at train.lr.", "dim",
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


def work(points: Sequence[Point]) -> str:
    """Operations and traffic of an update, on the fewest nodes and on the most."""
    (few, a), (many, b) = ((p.nodes, p.update) for p in (points[0], points[-1]))
    return (
        f"Seconds are an update's, in the slowest phase. From {few} to {many} nodes it goes from {a.operations:.1e} to {b.operations:.1e} FLOPs, "
        f"and from {a.network / 1e9:,.1f} to {b.network / 1e9:,.1f} GB through the network into each node."
    )


def sentence(points: Sequence[Point]) -> str:
    """What limits it first, and from where on more nodes hardly help."""
    first = points[0]
    turn = next((p for p in points if p.limit != first.limit), None)
    useless = next(((a, b) for a, b in pairwise(points) if b.seconds > 0.8 * a.seconds), None)
    said = f"Limited first by {first.limit}" + (f"; from {turn.nodes} nodes on by {turn.limit}" if turn else f", up to {points[-1].nodes} nodes")
    if not useless:
        return f"{said}."
    (fewer, more), gain = useless, useless[0].seconds / useless[1].seconds
    return f"{said}. {more.nodes} nodes are {f'{gain - 1:.0%} faster' if gain > 1.005 else 'no faster'} than {fewer.nodes}."
