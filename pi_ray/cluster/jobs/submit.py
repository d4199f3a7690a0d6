"""Submits runs as jobs of a Ray cluster through its Jobs API, follows them, lists them, and stops them.

A run has at most one job at a time. Its settings, its inputs and pi_ray itself travel with it; what pi_ray needs, and
plug-ins of your own, are in the image.
"""

from __future__ import annotations

import asyncio
import logging
import re
import shlex
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

import pi_ray
from pi_ray.cluster import auth
from pi_ray.cluster.jobs import bundle
from pi_ray.config import RunConfig, run_file
from pi_ray.errors import ClusterError
from pi_ray.progress import LogProgress
from pi_ray.train.replicas import check_replica

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
SILENCE_S = 60.0  # after which a quiet stream is opened again: a connection may be dead without either end knowing
ANSWER_S = 20.0  # for one answer of the API
PATIENCE_S = 120.0  # how long a cluster may not answer while a job is followed, or not take a new one
PAUSE_S = 1.0  # before the API is asked again
NO_ENVIRONMENT = (
    "'python' on the head is not one with pi-ray's packages: activate their environment before 'ray start' "
    "(PATH is what counts), or use the image of cluster/Dockerfile"
)


def submit_run(path: Path, overrides: Sequence[str], step: str, address: str, console: Console) -> int:
    """Start the run as a job, or attach to its job; return the job's exit code. Raises ConfigError, ClusterError."""
    bundle.refuse_secrets(overrides)
    config = run_file.validate_yaml(RunConfig, run_file.read_run_file(path), str(path), overrides)
    bundle.refuse_secrets((), config)
    bundle.refuse_local_models(config)
    check_replica(config)
    jobs = Jobs(address, config.cluster.address)
    if jobs.address.startswith("http://") and not auth.is_loopback(jobs.address):
        advice = "where the network is not yours, take https or a tunnel (ssh -L, kubectl port-forward)"
        console.print(f"the token goes to {jobs.address} unencrypted; {advice}", highlight=False)
    with tempfile.TemporaryDirectory() as target:
        facts = {
            "pi_ray.run": config.name, "pi_ray.step": step, "pi_ray.run_dir": config.run_dir,
            "pi_ray.storage": config.cluster.storage_path,
            "pi_ray.fingerprint": bundle.write_bundle(config, path.resolve().parent, Path(target)),
        }
        job, new = jobs.start(facts, Path(target), {"COLUMNS": str(console.width)})
    where = f"{'submitted to' if new else 'which is going on already at'} {jobs.address}"
    console.print(f"[bold]Job[/]  {job}, {where}", highlight=False)
    code = follow_job(jobs, job, console)
    if code == 0 and step in ("run", "publish"):
        serve = shlex.join(["pi-ray", "submit", str(path), *overrides, "--step", "serve", *_address_option(jobs)])
        console.print(f"Paths and addresses above are the cluster's. Serve it there:  {serve}", markup=False)
    return code


def follow_job(jobs: Jobs, job: str, console: Console) -> int:
    """Print the job's log until it ends, and return its exit code. On a terminal, progress stays in one line below."""
    try:
        with console.status("waiting for the job to start") if console.is_terminal else nullcontext() as live:
            seen = LogProgress()

            def print_line(line: str) -> None:
                progress = seen.read_line(line)
                if live:
                    live.update(escape(str(seen)) or "running")
                if not (live and progress):
                    console.print(line, markup=False, highlight=False)

            asyncio.run(jobs.tail(job, print_line))
    except KeyboardInterrupt:
        logs, status, stop = (" ".join(["pi-ray", v, job, *_address_option(jobs)]) for v in ("logs", "status", "stop"))
        text = f"\nThe job goes on. Follow it:  {logs}\nWhere it stands:  {status}\nEnd it:  {stop}"
        console.print(text, markup=False, highlight=False)
        return 130
    details = jobs.find(job)
    reason = f": {escape(_main_line(details.message))}" if details.status == "FAILED" else ""
    console.print(f"[bold]{details.status.lower()}[/]  {job}{reason}", highlight=False)
    return 0 if details.status == "SUCCEEDED" else details.driver_exit_code or 1


def _address_option(jobs: Jobs) -> list[str]:
    """--address for a command that is printed, where the command needs it."""
    return [] if jobs.address == auth.DEFAULT_ADDRESS else ["--address", jobs.address]


def print_status(jobs: Jobs, name: str, console: Console) -> None:
    """Print a line for each of pi-ray's jobs, newest first; of the job or run `name` alone, with its progress."""
    from rich.table import Table

    found = [jobs.find(name)] if name else jobs.all()
    table = Table("job", "run", "step", "status", "for", "stands at" if name else "run directory", box=None)
    for job in found:
        run, step, folder = (_facts(job)[f"pi_ray.{key}"] for key in ("run", "step", "run_dir"))
        minutes = ((job.end_time or time.time() * 1000) - (job.start_time or 0)) / 60000
        last = escape(str(jobs.progress_of(job))) if name else folder or f"runs/{run}"
        table.add_row(job.submission_id, run, step, job.status.lower(), f"{minutes:.1f} min", last)
    console.print(table if found else "no jobs of pi-ray there", highlight=False)
    if name and found[0].status == "FAILED":
        console.print(_main_line(found[0].message), markup=False, highlight=False)


class Jobs:
    """The Jobs API of the cluster that `auth.address_of` finds. Raises ClusterError where it does not answer."""

    def __init__(self, given: str = "", configured: str = ""):
        self.address = auth.address_of(given, configured)
        auth.require_token(self.address)
        self.client = self._ask(_client, self.address)

    def _ask(self, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """The result of `call`. Raises ClusterError, one sentence, for each way in which the API fails."""
        from ray.exceptions import AuthenticationError

        try:
            return call(*args, **options)
        except AuthenticationError as error:
            raise ClusterError(f"{self.address} does not accept this token, or wants one. {auth.CURE}") from error
        except OSError as error:  # requests' own errors are OSErrors
            cure = f"is the cluster up, and is this its Jobs API ('ray start --head' has it at {auth.DEFAULT_ADDRESS})?"
            raise ClusterError(f"{self.address} does not answer; {cure}") from error
        except RuntimeError as error:
            raise ClusterError(f"{self.address}: {_main_line(str(error))}") from error

    def all(self) -> list[JobDetails]:
        """pi-ray's jobs, newest first."""
        own = (job for job in self._ask(self.client.list_jobs) if job.submission_id and "pi_ray.run" in _facts(job))
        return sorted(own, key=lambda job: -(job.start_time or 0))

    def find(self, name: str) -> JobDetails:
        """A job by its id, or a run's job by the run's name: the one that is going on, else the newest."""
        found = [job for job in self.all() if name in (job.submission_id, _facts(job)["pi_ray.run"])]
        if not found:
            raise ClusterError(
                f"no job and no run '{name}' at {self.address}; 'pi-ray status' lists what there is. "
                "Jobs are forgotten when the head node starts anew, runs are not: submit again"
            )
        return next((job for job in found if job.status not in ENDED), found[0])

    def progress_of(self, job: JobDetails) -> LogProgress:
        seen = LogProgress()
        for line in self._ask(self.client.get_job_logs, job.submission_id).splitlines():
            seen.read_line(line)
        return seen

    def stop(self, job: str) -> bool:
        """Ask the job to end; its results so far are kept. False when it had ended already."""
        return self._ask(self.client.stop_job, job)

    def start(self, facts: dict[str, str], folder: Path, environment: dict[str, str]) -> tuple[str, bool]:
        """(id, whether it is new) of the run's job; one job for two callers at once, since ids are unique."""
        until, name = time.monotonic() + PATIENCE_S, f"pi-ray-{facts['pi_ray.run']}"
        command = f"python -m pi_ray.cli.job {shlex.quote(facts['pi_ray.step'])} run.yaml"
        packages = {
            "working_dir": str(folder), "py_modules": [str(Path(pi_ray.__file__).parent)], "excludes": ["__pycache__"],
            "env_vars": environment,
        }
        while True:
            jobs, place = self.all(), ("pi_ray.run", "pi_ray.run_dir", "pi_ray.storage")
            same = (job for job in jobs if all(_facts(job).get(key) == facts[key] for key in place))
            if running := next((job for job in same if job.status not in ENDED), None):
                if any(_facts(running)[key] != facts[key] for key in ("pi_ray.step", "pi_ray.fingerprint")):
                    going = f"'{facts['pi_ray.run']}' is going on as job {running.submission_id}"
                    ends = f"'pi-ray stop {running.submission_id}' ends it, another name makes this a run of its own"
                    step = _facts(running)["pi_ray.step"]
                    raise ClusterError(f"the run {going} ({step}), and its settings or inputs are not these: {ends}")
                return submission_id(running), False
            numbered = re.compile(rf"{re.escape(name)}-(\d+)")
            numbers = [int(m[1]) for job in jobs if (m := numbered.fullmatch(submission_id(job)))]
            job_id = f"{name}-{max(numbers, default=0) + 1}"  # older jobs may have been deleted
            sent = {"entrypoint": command, "submission_id": job_id, "metadata": facts, "runtime_env": packages}
            try:
                return self._ask(self.client.submit_job, **sent), True
            except ClusterError as error:
                # The head's agent starts after its API; or another caller took the id.
                passes = any(text in str(error.__cause__) for text in ("try again later", "already exists"))
                if not passes or time.monotonic() >= until:
                    raise
            time.sleep(PAUSE_S)

    async def tail(self, job: str, take_line: Callable[[str], None]) -> None:
        """Hand each line of the job's log to `take_line` until the job ends, over lost connections too."""
        import aiohttp

        known, rest, lost = 0, "", None  # characters that were read, the line that has begun, when the API fell silent
        while True:
            try:
                async for text in self._log_after(job, known):
                    known += len(text)
                    *lines, rest = (rest + text).split("\n")
                    for line in lines:
                        take_line(line)
                whole = True
            except (TimeoutError, OSError, RuntimeError, aiohttp.ClientError):
                whole = False
            try:
                ended, lost = self.client.get_job_info(job).status in ENDED, None
            except (OSError, RuntimeError) as error:
                ended, lost = False, lost or time.monotonic()
                if "status code 404" in str(error):
                    cause = f"{self.address} knows no job {job} any more, as after a new start of its head node"
                    raise ClusterError(f"{cause}; submit again: the run goes on from storage") from error
                if time.monotonic() - lost >= PATIENCE_S:
                    cause = f"{self.address} has not answered for {PATIENCE_S:.0f} s"
                    raise ClusterError(f"{cause}. The job may go on; the same command follows it again") from error
            if whole and ended:
                if rest:
                    take_line(rest)
                return
            await asyncio.sleep(PAUSE_S)

    async def _log_after(self, job: str, known: int) -> AsyncIterator[str]:
        """Yield the log from its character `known` on, over one connection, which sends it from its start."""
        async with aclosing(self.client.tail_job_logs(job)) as stream, asyncio.timeout(SILENCE_S) as silence:
            async for chunk in stream:
                silence.reschedule(asyncio.get_running_loop().time() + SILENCE_S)
                yield chunk[known:]
                known = max(0, known - len(chunk))


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.WARNING)

    class Client(JobSubmissionClient):
        def _do_request(self, *args: Any, **kwargs: Any) -> Any:
            return super()._do_request(*args, **{"timeout": ANSWER_S, **kwargs})  # Ray waits for a cut link for ever

    return Client(address)


def _main_line(message: str | None) -> str:
    """The line of a message that says most: pi-ray's own, or the last of a traceback or a log."""
    lines = [line.strip() for line in (message or "").splitlines() if line.strip()]
    last = lines[-1] if lines else "no message"
    line = next((line for line in reversed(lines) if line.startswith("pi-ray: ")), last)
    return f"{line}. {NO_ENVIRONMENT}" if line.startswith("ModuleNotFoundError") else line


def _facts(job: JobDetails) -> dict[str, str]:
    return job.metadata or {}


def submission_id(job: JobDetails) -> str:
    return job.submission_id or ""
