"""`pi-ray plan TABLE.yaml`: what each column of a table takes on one node and on two."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pi_ray.experiments.sweep import Sweep
from pi_ray.plan import estimate, scale
from pi_ray.plan.inputs import PlanInputs
from pi_ray.plan.plan import plan_run
from pi_ray.report.summary import terminal_table
from pi_ray.train.replicas import replica_gpus

NODES, GIB = (1, 2), 2**30


def print_table_plan(sweep: Sweep, console: Console) -> bool:
    """Print the plan of every trained column, for all seeds together; returns whether all fit into their GPUs."""
    rows, fits, total = [], True, [[0.0, 0.0] for _ in NODES]
    trained = [run for run in sweep.runs if run.trained and run.seed == sweep.config.seeds[0]]
    inputs = PlanInputs()
    for run in trained:
        made, cluster = plan_run(run.config, inputs), run.config.cluster
        seeds = len(sweep.runs_of(run.column))
        cells = [sweep.config.columns[run.column].label, f"{sum(p.updates for p in made.phases):,}"]
        for point, sums in zip(scale.grid(made, NODES), total, strict=True):
            config = scale.with_workers(run.config, point.gpus)
            host = estimate.node_memory(made.size, config, cluster.gpus_per_node)
            fits = fits and point.memory <= cluster.gpu_memory_gib * GIB
            hours, money = seeds * point.seconds / 3600, seeds * point.money
            sums[:] = [sums[0] + hours, sums[1] + money]
            cells += [f"{point.memory / GIB:.0f}", f"{host / GIB:.0f}", f"{hours:.1f}", f"{money:,.0f}"]
        rows.append(cells)
    currency, each = sweep.base.cost.currency, sweep.base.cluster
    rows.append(["All columns", "", *(cell for h, m in total for cell in ("", "", f"{h:.1f}", f"{m:,.0f}"))])
    head = ["", "updates"]
    for nodes in NODES:
        at = f"{nodes} node{'s' * (nodes > 1)}"
        head += [f"{at}: GiB a GPU", "GiB a host", "hours", currency]
    title = f"Table {sweep.config.table}: {sweep.base.model.base}, seeds {len(sweep.config.seeds)}"
    table: Table = terminal_table(title, head, rows)
    console.print(table)
    gpus, room = replica_gpus(sweep.base), f"{each.gpu_memory_gib} GiB"
    verdict = f"all fit into GPUs of {room}" if fits else f"NOT all fit into GPUs of {room}"
    copy = "one GPU" if gpus == 1 else f"{gpus} GPUs"
    where = f"Nodes of {each.gpus_per_node} A100s; {verdict}; a copy that evaluates or serves takes {copy}."
    console.print(Text(f"{where} Give or take a factor of two; hosts hold what the workers need while they load."))
    return fits
