"""Verbs of clusters: checks, jobs, and the files that make a cluster."""

import argparse
import sys
from pathlib import Path

from pi_ray.cli.verbs import OVERRIDES, RUN, argument, load_config, run_file_of, verb

API = "URL of the cluster's Jobs API; default: {}RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265"
ADDRESS = argument("--address", default="", metavar="URL", help=API.format(""))
STEPS = ["run", "prepare", "train", "evaluate", "report", "publish", "serve"]
JOB = argument("job", metavar="JOB", help="a job's id, or a run's name")


@verb(
    "check whether a run can work here or on a cluster, and say how to repair it",
    argument("config", type=Path, nargs="?", metavar="run.yaml", help="a run file or directory; may be left out"),
    OVERRIDES,
    argument("--address", default="", metavar="URL", help="URL of a cluster's Jobs API, such as http://127.0.0.1:8265; "
        "default: this machine"),
)
def doctor(args: argparse.Namespace) -> None:
    from pi_ray.cluster import doctor as visit

    config, folder = (load_config(args), run_file_of(args).parent) if args.config else (None, None)
    if visit.print_findings(visit.examine(config, args.address, folder), args.console):
        sys.exit(1)


@verb(
    "run a run file as a job of a Ray cluster, and follow its output",
    RUN, argument("--address", default="", metavar="URL", help=API.format("cluster.address of run.yaml, ")),
    argument("--step", default="run", choices=STEPS, help="only this step; default: all"), OVERRIDES,
)
def submit(args: argparse.Namespace) -> None:
    """Run a run file as a job of a Ray cluster, and follow its output.

    Ctrl-C leaves the job running. The same command follows it again, or goes on where the job ended.
    """
    from pi_ray.cluster.jobs import submit as jobs

    sys.exit(jobs.submit_run(run_file_of(args), args.overrides, args.step, args.address, args.console))


@verb(
    "show where jobs of a cluster stand",
    argument("job", nargs="?", default="", metavar="JOB", help="a job's id, or a run's name; default: all"), ADDRESS,
)
def status(args: argparse.Namespace) -> None:
    from pi_ray.cluster.jobs import submit as jobs

    jobs.print_status(jobs.Jobs(args.address), args.job, args.console)


@verb("follow the output of a job; Ctrl-C leaves it running", JOB, ADDRESS)
def logs(args: argparse.Namespace) -> None:
    from pi_ray.cluster.jobs import submit as jobs

    cluster = jobs.Jobs(args.address)
    sys.exit(jobs.follow_job(cluster, jobs.submission_id(cluster.find(args.job)), args.console))


@verb("stop a job; its work is kept, and submitting the run again goes on", JOB, ADDRESS)
def stop(args: argparse.Namespace) -> None:
    from pi_ray.cluster.jobs import submit as jobs

    cluster = jobs.Jobs(args.address)
    job = jobs.submission_id(cluster.find(args.job))
    args.console.print(f"{job} {'is being stopped' if cluster.stop(job) else 'had ended already'}", highlight=False)


@verb(
    "write the files of a cluster for a run: KubeRay, AWS or GCP, Slurm",
    argument("kind", choices=["k8s", "launcher", "slurm"], help="KubeRay; `ray up` on AWS or GCP; a batch job"),
    RUN, OVERRIDES, argument("--out", type=Path, metavar="FOLDER", help="folder to write to; default: print the files"),
)
def render(args: argparse.Namespace) -> None:
    from pi_ray.cluster import render as files

    found, notes = files.render_cluster_files(args.kind, load_config(args), run_file_of(args).parent)
    if args.out:
        for path in files.write_cluster_files(found, args.out):
            args.console.print(f"wrote {path}", markup=False)
    else:
        print("\n---\n".join(found.values()), end="")
    for line in notes:
        print(f"note: {line}", file=sys.stderr)
