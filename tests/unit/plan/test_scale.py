"""The run on paper: a model of time and traffic that agrees with calculations by hand and with what was measured."""

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from pi_ray.config import RunConfig
from pi_ray.config.run_file import load_run_file
from pi_ray.plan import estimate, scale
from pi_ray.plan.estimate import Shape
from pi_ray.plan.figures import PhasePlan, Plan
from pi_ray.schedule import plan_phases
from tests.golden.cluster import RUN

# As test_plan.py counts them by hand: Mixtral-8x7B with LoRA of rank 32 on attention, and SmolLM2-135M with it on every
# linear layer.
MIXTRAL = estimate.ModelSize(
    46_702_792_704, 12_617_781_248, 32000 * 4096, 1_451_270_144, 0, 27_262_976, 32, 4096, 2 * 14336, 1024
)
SMOLLM2 = estimate.ModelSize(
    134_515_008, 106_203_456, 49152 * 576, 3_540_115, 106_168_320, 9_768_960, 30, 576, 1536, 192
)
SHAPES = (Shape(600, 450, 30), Shape(300, 240, 30), Shape(5, 30, 30))


def plan_of(rows=8000, size=MIXTRAL, **changes):
    config = load_run_file(RUN).replace(**changes)
    phases = [PhasePlan(p, rows, s, 0, 0.0, True) for p, s in zip(plan_phases(config.schedule), SHAPES, strict=True)]
    return Plan(
        config, {"train": rows}, 0, [], size, estimate.Speed("gpu", "A100", 1.0, ""), phases, [], {}, {}, {},
        SHAPES[0], SHAPES[-1], None,
    )


def test_zero_3_gathers_all_weights_twice_a_micro_batch():
    config = plan_of().config
    inside, between = scale.traffic(MIXTRAL, config)
    assert inside == 2 * MIXTRAL.weights * 2 * 15 / 16, (
        "into one of 16 GPUs: all but its own share, in bfloat16, forward and backward"
    )
    assert between == 2 * MIXTRAL.weights * 2 / 2, "into one of 2 nodes: the other's half"
    assert scale.traffic(MIXTRAL, config.replace(**{"train.micro_batch": 4}))[1] == 2 * between
    assert scale.traffic(MIXTRAL, config.replace(**{"train.backend.zero_stage": 2})) == (0, 0)
    assert scale.traffic(MIXTRAL, scale.with_workers(config, 8))[1] == 0, "one node needs no network"


def test_an_elastic_run_is_scaled_to_any_number_of_gpus():
    config = scale.with_workers(plan_of(**{"train.workers": [8, 16]}).config, 4)
    assert (config.train.min_workers, config.train.workers) == (0, 4)


def test_an_update_takes_the_longer_of_computing_and_gathering():
    config = plan_of().config
    found = scale.scaled_update(MIXTRAL, SHAPES[0], config)
    tokens = 16 * 600 + 128 * 479
    assert found.computing == pytest.approx(
        (6 * MIXTRAL.active + 6 * MIXTRAL.lora) * tokens / (16 * 0.3 * 312e12), rel=0.15
    ), "the rest is attention"
    assert found.gathering == pytest.approx(MIXTRAL.weights * 2 / 50e9 / 0.7)
    assert found.seconds == max(found.computing, found.gathering) + found.summing and found.summing < 0.1
    slow = scale.scaled_update(MIXTRAL, SHAPES[0], config.replace(**{"cluster.launcher.provider": "gcp"}))
    assert slow.gathering == pytest.approx(4 * found.gathering) and slow.limit.startswith("network")


def test_the_share_of_peak_agrees_with_published_runs_where_nothing_waits():
    low, high = scale.PUBLISHED_MFU
    one_node = scale.scaled_update(MIXTRAL, SHAPES[0], scale.with_workers(plan_of().config, 8))
    assert one_node.limit == "computing" and low <= one_node.mfu <= high
    assert scale.scaled_update(MIXTRAL, SHAPES[0], scale.with_workers(plan_of().config, 512)).mfu < low


def test_the_published_run_of_mixtral_with_lora_on_an_a100_is_held_against_the_model():
    rows, tokens, rows_per_second = 17, 174, 2.74  # the data set's median row on one A100
    config = RunConfig(name="a", train={"workers": 1, "gpu": True, "batch_size": rows, "gradient_checkpointing": True})
    # rank 16 on the three layers of the two experts that a token uses
    size = replace(MIXTRAL, lora=2 * 32 * 3 * 16 * (4096 + 14336))
    ours = scale.scaled_update(size, Shape(0, tokens, 0), config)
    theirs = rows / rows_per_second
    assert theirs / ours.seconds == pytest.approx(scale.MIXTRAL_SLOWER, rel=0.05)
    assert ours.mfu * ours.seconds / theirs == pytest.approx(scale.MIXTRAL_MFU, rel=0.05)


@pytest.mark.parametrize("workers, batch", [(8, 128), (16, 128), (48, 144), (128, 128), (256, 256), (512, 512)])
def test_the_batch_stays_while_every_gpu_has_a_row_of_it(workers, batch):
    made = scale.with_workers(plan_of().config, workers)
    assert (made.train.workers, made.train.batch_size) == (workers, batch)


def test_time_money_and_storage_add_up_from_1_to_64_nodes_and_to_100_million_rows():
    points = scale.grid(plan_of())
    assert [p.nodes for p in points] == [1, 2, 4, 8, 16, 32, 64] and [p.gpus for p in points][-1] == 512
    for p in points:
        assert p.money == pytest.approx(p.seconds / 3600 * p.gpus * 2.0)
    few, many = scale.grid(plan_of(), (2,), (10**6, 10**8))
    assert many.training == pytest.approx(100 * few.training, rel=1e-3) and many.tokens == pytest.approx(
        100 * few.tokens, rel=1e-3
    )
    assert many.stored - few.stored == pytest.approx(4 * 99e6 * sum(s.row + s.label for s in SHAPES))


def test_what_limits_it_first_is_said():
    aws = scale.grid(plan_of())
    assert scale.limits_in_words(aws) == (
        "Limited first by computing; from 4 nodes on by network: gathering sharded weights. "
        "4 nodes are no faster than 2."
    )
    assert scale.grid(plan_of(**{"cluster.launcher.provider": "gcp"}))[1].limit == "network: gathering sharded weights"
    short = scale.grid(plan_of(rows=8), (64,))[0]
    assert short.limit == "disk: reading the base model", "a run of a few updates mostly loads"


def test_an_unsharded_model_is_limited_by_computing_or_by_too_few_rows():
    plan = plan_of(size=replace(SMOLLM2), **{"train.backend.zero_stage": 2})
    first, *_, last = scale.grid(plan, rows=(10**6,))
    assert (first.update.network, last.update.network) == (0, 2 * 4 * SMOLLM2.lora), (
        "only gradients travel, between nodes alone"
    )
    assert last.limit in ("starting GPU kernels: too few rows", "computing")


# Seconds measured on 2 CPU cores (jobs/paper/RESULTS.md) as ratios, which no machine's speed touches.
MEASURED = [  # rows, prefix, query and answer; plain / shared seconds
    (8, 200, 45, 15, 3.00), (8, 550, 100, 18, 3.59), (16, 480, 25, 18, 9.34),
]  # fmt: skip


@pytest.mark.parametrize("rows, prefix, query, answer, ratio", MEASURED)
def test_counted_work_agrees_with_measured_seconds(rows, prefix, query, answer, ratio):
    config = RunConfig(name="a", train={"workers": 1, "batch_size": rows})
    shape = Shape(prefix, query, answer)
    counted = estimate.update_operations(
        SMOLLM2, shape, config.replace(**{"train.share_prefix": False})
    ) / estimate.update_operations(SMOLLM2, shape, config)
    assert counted == pytest.approx(ratio, rel=0.35)


def test_two_workers_of_one_machine_compute_the_template_twice():
    """As tests/bench/scale.py measured it (jobs/paper/RESULTS.md): 0.92 times as fast behind 480 tokens, 1.16 times
    without. That threads wait for each other cancels.
    """
    one, two = (RunConfig(name="a", train={"workers": n, "batch_size": 16}) for n in (1, 2))
    work = lambda config, prefix: estimate.update_operations(SMOLLM2, Shape(prefix, 29, 15), config)  # noqa: E731
    assert work(one, 480) / work(two, 480) == pytest.approx((480 + 16 * 43) / (2 * 480 + 16 * 43), rel=0.05)
    assert work(one, 480) / work(two, 480) == pytest.approx(0.92 / 1.16, rel=0.15)
    assert work(one, 0) == work(two, 0)


def test_operations_and_traffic_of_an_update_are_printed():
    points = scale.grid(plan_of())
    first, last = points[0].update, points[-1].update
    assert first.operations == pytest.approx(6 * (MIXTRAL.active + MIXTRAL.lora) * (8 * 600 + 128 * 479), rel=0.15), (
        "the rest is attention"
    )
    assert first.network == 0 and last.network == 2 * 2 * MIXTRAL.weights * 63 / 64 + 2 * 4 * MIXTRAL.lora
    assert (
        f"goes from {first.operations:.1e} to {last.operations:.1e} FLOPs, and from 0.0 to 184.1 GB through the network"
        in scale.work_in_words(points)
    )


@pytest.mark.parametrize("width", [80, 150])
def test_the_tables_say_what_they_assume(width):
    console = Console(width=width, file=io.StringIO())
    scale.print_scale(plan_of(), console)
    text = " ".join(console.file.getvalue().split())
    assert max(map(len, console.file.getvalue().splitlines())) <= width and "…" not in text
    for words in (
        "On nodes of 8 A100s (aws), with the run's 8,000 rows", "Limited first by computing", "100,000,000", "FLOPs",
        "GB through the network into each node", "On paper, and an upper bound", "MFU of 8%, 2.6 times slower",
        "18% to 28%", "look at train.lr",
    ):
        assert words in text


def test_a_gpu_too_small_is_said_in_its_line():
    console = Console(width=200, file=io.StringIO())
    scale.print_scale(plan_of(**{"cluster.gpu_memory_gib": 6}), console)
    assert re.search(r" 8 +128 .*memory: \d+ GiB on a GPU of 6", console.file.getvalue()), console.file.getvalue()
