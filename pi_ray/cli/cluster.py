"""Verbs of clusters: whether a run can work there, its jobs, and the files that make one."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pi_ray.cli.verbs import OVERRIDES, RUN, Verbs, argument, folder_of, load_config

if TYPE_CHECKING:
    from rich.console import Console

verb = Verbs()
ADDRESS = argument("--address", default="", metavar="URL", help="of the cluster's Jobs API; default: cluster.address of run.yaml, RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265")
JOB = argument("job", metavar="JOB", help="a job's id, or a run's name")


@verb(
    "whether a run can work here, or on the cluster at --address, and how to mend what is in its way; also without a run file",
    argument("config", type=Path, nargs="?", metavar="run.yaml", help="a run file, or a run directory"), OVERRIDES,
    argument("--address", default="", metavar="URL", help="of a cluster's Jobs API, such as http://127.0.0.1:8265; default: this machine"),
)
def doctor(args: argparse.Namespace, console: Console) -> None:
    from pi_ray.cluster import doctor as visit

    config, folder = (load_config(args), folder_of(args)) if args.config else (None, None)
    if visit.print_findings(visit.examine(config, args.address, folder), console):
        sys.exit(1)


@verb(
    "run a run file as a job of a Ray cluster, and follow it; Ctrl-C leaves it running, the same command follows it again, or goes on where it ended",
    RUN, ADDRESS, argument("--step", default="run", choices=["run", "prepare", "train", "evaluate", "report", "publish", "serve"], help="one step of it; default: all of them"), OVERRIDES,
)
def submit(args: argparse.Namespace, console: Console) -> None:
    from pi_ray.cluster.jobs import submit as jobs

    sys.exit(jobs.submit_run(args.config, args.overrides, args.step, args.address, console))


@verb("jobs of a cluster: where one stands, or all of them", argument("job", nargs="?", default="", metavar="JOB", help="a job's id, or a run's name; default: all"), ADDRESS)
def status(args: argparse.Namespace, console: Console) -> None:
    from pi_ray.cluster import auth
    from pi_ray.cluster.jobs import submit as jobs

    jobs.print_status(jobs.Jobs(auth.address_of(args.address)), args.job, console)


@verb("what a job prints, until it ends; Ctrl-C leaves it running", JOB, ADDRESS)
def logs(args: argparse.Namespace, console: Console) -> None:
    from pi_ray.cluster import auth
    from pi_ray.cluster.jobs import submit as jobs

    cluster = jobs.Jobs(auth.address_of(args.address))
    sys.exit(jobs.follow_job(cluster, cluster.find(args.job).submission_id, console))


@verb("end a job; what it has done is kept, and submitting its run again goes on from there", JOB, ADDRESS)
def stop(args: argparse.Namespace, console: Console) -> None:
    from pi_ray.cluster import auth
    from pi_ray.cluster.jobs import submit as jobs

    cluster = jobs.Jobs(auth.address_of(args.address))
    job = cluster.find(args.job).submission_id
    console.print(f"{job} {'is being stopped' if cluster.stop(job) else 'had ended already'}", highlight=False)


@verb(
    "write a cluster's files for a run: k8s (KubeRay), launcher (ray up on AWS or GCP), slurm; see cluster/README.md",
    argument("kind", choices=["k8s", "launcher", "slurm"]), RUN, OVERRIDES, argument("--out", type=Path, metavar="FOLDER", help="where to; default: print them"),
)
def render(args: argparse.Namespace, console: Console) -> None:
    from pi_ray.cluster import render as files

    found, notes = files.render_cluster_files(args.kind, load_config(args), folder_of(args))
    if args.out:
        for path in files.write_cluster_files(found, args.out):
            console.print(f"wrote {path}", markup=False)
    else:
        print("\n---\n".join(found.values()), end="")
    for line in notes:
        print(f"note: {line}", file=sys.stderr)
