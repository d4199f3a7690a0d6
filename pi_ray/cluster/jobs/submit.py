"""Runs as jobs of a Ray cluster, through its Jobs API: submit, follow, look, stop.

A run has at most one job at a time. Its settings and inputs travel as a parcel, and so does pi_ray itself, always: what runs there is the version
that wrote the run file, whatever the nodes' image has. The image must have what pi-ray needs (pip install pi-ray), and plug-ins of your own.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

import pi_ray
from pi_ray.cluster import auth
from pi_ray.cluster.jobs import bundle
from pi_ray.config import RunConfig, run_file
from pi_ray.errors import ClusterError
from pi_ray.progress import Seen

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
SILENCE_S = 60.0  # after which a quiet stream is opened again: a connection may be dead without either end knowing
ANSWER_S = 20.0  # for one answer of the API
PATIENCE_S = 120.0  # how long a cluster may not answer while a job is followed, or not take one
PAUSE_S = 1.0  # before it is asked again
NO_ENVIRONMENT = "'python' on the head is not one with pi-ray's packages: activate their environment before 'ray start' (PATH is what counts), or use the image of cluster/Dockerfile"


def submit_run(path: Path, overrides: Sequence[str], step: str, address: str, console: Console) -> int:
    """Start the run as a job, or attach to the job that it has, and follow it. Returns the job's exit code; Ctrl-C leaves the job running.

    Raises ConfigError (run file, secrets, size) and ClusterError (no answer, no token, the run is going on with other settings).
    """
    path = path / "run.yaml" if path.is_dir() else path
    bundle.refuse_secrets(overrides)
    config, folder = run_file.check(RunConfig, run_file.read(path), str(path), overrides), path.resolve().parent
    bundle.refuse_secrets((), config)
    bundle.refuse_local_models(config)
    jobs = Jobs(auth.address_of(address, config.cluster.address))
    if jobs.address.startswith("http://") and not auth.is_loopback(jobs.address):
        console.print(f"the token goes to {jobs.address} unencrypted; where the network is not yours, take https or a tunnel (ssh -L, kubectl port-forward)", highlight=False)
    with tempfile.TemporaryDirectory() as target:
        facts = {"pi_ray.run": config.name, "pi_ray.step": step, "pi_ray.run_dir": config.run_dir, "pi_ray.storage": config.cluster.storage_path}
        facts["pi_ray.fingerprint"] = bundle.write_bundle(config, folder, Path(target))
        job, new = jobs.start(facts, Path(target), {"COLUMNS": str(console.width)})
    console.print(f"[bold]Job[/]  {job}, {'submitted to' if new else 'which is going on already at'} {jobs.address}", highlight=False)
    code = follow_job(jobs, job, console)
    if code == 0 and step in ("run", "publish"):
        again = shlex.join(["pi-ray", "submit", str(path), *overrides, "--step", "serve", *_where(jobs)])
        console.print(f"Paths and addresses above are the cluster's. Serve it there:  {again}", markup=False, highlight=False)
    return code


def follow_job(jobs: Jobs, job: str, console: Console) -> int:
    """Print the job's log until it ends. On a terminal, progress stays in one line below."""
    try:
        with console.status("waiting for the job to start") if console.is_terminal else nullcontext() as live:
            seen = Seen()

            def show(line: str) -> None:
                progress = seen.take(line)
                if live:
                    live.update(escape(str(seen)) or "running")
                if not (live and progress):
                    console.print(line, markup=False, highlight=False)

            jobs.tail(job, show)
    except KeyboardInterrupt:
        typed = {verb: " ".join(["pi-ray", verb, job, *_where(jobs)]) for verb in ("logs", "status", "stop")}
        console.print(f"\nThe job goes on. Follow it:  {typed['logs']}\nWhere it stands:  {typed['status']}\nEnd it:  {typed['stop']}", markup=False, highlight=False)
        return 130
    details = jobs.find(job)
    console.print(f"[bold]{details.status.lower()}[/]  {job}" + (f": {escape(_first(details.message))}" if details.status == "FAILED" else ""), highlight=False)
    return 0 if details.status == "SUCCEEDED" else details.driver_exit_code or 1


def _where(jobs: Jobs) -> list[str]:
    """--address for a command that is printed, where it needs one."""
    return [] if jobs.address == auth.DEFAULT else ["--address", jobs.address]


def print_status(jobs: Jobs, name: str, console: Console) -> None:
    """One line for each of pi-ray's jobs, newest first; of one job, or one run's newest, where it stands as well."""
    from rich.table import Table

    found = [jobs.find(name)] if name else jobs.all()
    table = Table("job", "run", "step", "status", "for", "stands at" if name else "run directory", box=None)
    for job in found:
        facts, last = job.metadata, _minutes(job)
        table.add_row(job.submission_id, facts["pi_ray.run"], facts["pi_ray.step"], job.status.lower(), last, escape(str(jobs.seen(job))) if name else facts["pi_ray.run_dir"] or f"runs/{facts['pi_ray.run']}")
    console.print(table if found else "no jobs of pi-ray there", highlight=False)
    if name and found[0].status == "FAILED":
        console.print(_first(found[0].message), markup=False, highlight=False)


class Jobs:
    """The Jobs API of one cluster, by its URL. Raises ClusterError where it does not answer or does not let us in."""

    def __init__(self, address: str):
        auth.require(address)
        self.address = address
        self.client = _answered(lambda: _client(address), address)

    def all(self) -> list[JobDetails]:
        """pi-ray's jobs, newest first."""
        found = _answered(self.client.list_jobs, self.address)
        return sorted((job for job in found if job.submission_id and "pi_ray.run" in (job.metadata or {})), key=lambda job: -(job.start_time or 0))

    def find(self, name: str) -> JobDetails:
        """A job by its id, or a run's job by the run's name: the one that is going on, else the newest."""
        found = [job for job in self.all() if name in (job.submission_id, job.metadata["pi_ray.run"])]
        if not found:
            raise ClusterError(f"no job and no run '{name}' at {self.address}; 'pi-ray status' lists what there is. Jobs are forgotten when the head node starts anew, runs are not: submit again")
        return next((job for job in found if job.status not in ENDED), found[0])

    def seen(self, job: JobDetails) -> Seen:
        seen = Seen()
        for line in self.log(job.submission_id).splitlines():
            seen.take(line)
        return seen

    def log(self, job: str) -> str:
        return _answered(lambda: self.client.get_job_logs(job), self.address)

    def stop(self, job: str) -> bool:
        """Ask the job to end; what it has done is kept. False when it had ended already."""
        return _answered(lambda: self.client.stop_job(job), self.address)

    def start(self, facts: dict[str, str], folder: Path, environment: dict[str, str]) -> tuple[str, bool]:
        """(id, whether it is new) of the run's job. Two that start one run at the same time get the same job, since an id is given once."""
        until, name = time.monotonic() + PATIENCE_S, f"pi-ray-{facts['pi_ray.run']}"
        while True:
            jobs, same = self.all(), ("pi_ray.run", "pi_ray.run_dir", "pi_ray.storage")
            running = next((job for job in jobs if job.status not in ENDED and all(job.metadata.get(key) == facts[key] for key in same)), None)
            if running:
                return self._attach(running, facts), False
            numbers = [int(found[1]) for job in jobs if (found := re.fullmatch(rf"{re.escape(name)}-(\d+)", job.submission_id))]
            job = f"{name}-{max(numbers, default=0) + 1}"  # older ones may have been deleted
            packages = {"working_dir": str(folder), "py_modules": [str(Path(pi_ray.__file__).parent)], "excludes": ["__pycache__"], "env_vars": environment}
            command = f"python -m pi_ray.cli.job {shlex.quote(facts['pi_ray.step'])} run.yaml"
            try:
                return _answered(partial(self.client.submit_job, entrypoint=command, submission_id=job, metadata=facts, runtime_env=packages), self.address), True
            except ClusterError as error:
                passes = any(said in str(error.__cause__) for said in ("try again later", "already exists"))  # its agent starts after its API; another took the id
                if not passes or time.monotonic() >= until:
                    raise
            time.sleep(PAUSE_S)

    def _attach(self, job: JobDetails, facts: dict[str, str]) -> str:
        if job.metadata["pi_ray.step"] != facts["pi_ray.step"] or job.metadata["pi_ray.fingerprint"] != facts["pi_ray.fingerprint"]:
            raise ClusterError(
                f"the run '{facts['pi_ray.run']}' is going on as job {job.submission_id} ({job.metadata['pi_ray.step']}), and its settings or inputs are not these: "
                f"'pi-ray stop {job.submission_id}' ends it, another name makes this a run of its own"
            )
        return job.submission_id

    def tail(self, job: str, show: Callable[[str], None]) -> None:
        """Hand each line of the job's log to `show` until the job ends, over lost connections too."""
        asyncio.run(self._tail(job, show))

    async def _tail(self, job: str, show: Callable[[str], None]) -> None:
        lines, lost = _Lines(show), None
        while True:
            whole = await self._stream(job, lines)
            try:
                ended, lost = self.client.get_job_info(job).status in ENDED, None
            except (OSError, RuntimeError) as error:
                if "status code 404" in str(error):
                    raise ClusterError(f"{self.address} knows no job {job} any more, as after a new start of its head node; submit again: the run goes on from storage") from error
                lost = lost or time.monotonic()
                if time.monotonic() - lost >= PATIENCE_S:
                    raise ClusterError(f"{self.address} has not answered for {PATIENCE_S:.0f} s. The job may go on; the same command follows it again") from error
                ended = False
            if whole and ended:
                return lines.end()
            await asyncio.sleep(PAUSE_S)

    async def _stream(self, job: str, lines: _Lines) -> bool:
        """One connection: what of the log is new goes to `lines`. True when the cluster said that it is the whole."""
        import aiohttp

        stream, place = self.client.tail_job_logs(job), 0
        try:
            while True:
                chunk = await asyncio.wait_for(anext(stream), SILENCE_S)
                lines.take(chunk, place)
                place += len(chunk)
        except StopAsyncIteration:
            return True
        except (TimeoutError, OSError, RuntimeError, aiohttp.ClientError):
            return False
        finally:
            await stream.aclose()


class _Lines:
    """Chunks of a log, each with its place in it, become lines; what was there before a new connection is left out."""

    def __init__(self, show: Callable[[str], None]):
        self.show, self.known, self.rest = show, 0, ""

    def take(self, chunk: str, place: int) -> None:
        new = chunk[max(0, self.known - place) :]
        self.known = max(self.known, place + len(chunk))
        *whole, self.rest = (self.rest + new).split("\n")
        for line in whole:
            self.show(line)

    def end(self) -> None:
        if self.rest:
            self.show(self.rest)


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.WARNING)

    class Client(JobSubmissionClient):
        def _do_request(self, *args: Any, **kwargs: Any) -> Any:
            return super()._do_request(*args, **{"timeout": ANSWER_S, **kwargs})  # Ray would wait for ever on a link that was cut

    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray takes this, or RAY_ADDRESS, above what it is given
    return Client(address)


def _answered(call: Callable[[], Any], address: str) -> Any:
    """What `call` returns, its failures in one sentence."""
    from ray.exceptions import AuthenticationError

    try:
        return call()
    except AuthenticationError as error:
        raise ClusterError(f"{address} does not accept this token, or wants one. {auth.CURE}") from error
    except OSError as error:  # requests' own errors are of this kind
        raise ClusterError(f"{address} does not answer; is the cluster up, and is this its Jobs API ('ray start --head' has it at {auth.DEFAULT})?") from error
    except RuntimeError as error:
        raise ClusterError(f"{address}: {_first(str(error))}") from error


def _first(message: str | None) -> str:
    """The line of a message that says most: the last of a traceback, or of a job's log."""
    lines = [line.strip() for line in (message or "").splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if line.startswith("pi-ray: ")), lines[-1] if lines else "no message")
    return f"{said}. {NO_ENVIRONMENT}" if said.startswith("ModuleNotFoundError") else said


def _minutes(job: JobDetails) -> str:
    return f"{((job.end_time or time.time() * 1000) - (job.start_time or 0)) / 60000:.1f} min"

