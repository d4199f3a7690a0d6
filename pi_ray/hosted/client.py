"""The client of the service: files, fine-tuning jobs, their events, answers. Faults that can pass are retried.

The key comes from the environment and goes to the service alone; it is cut out of the service's messages.
"""

import json
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import takewhile
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from pi_ray.config import ClosedConfig, RunConfig
from pi_ray.errors import ConfigError, MissingExtraError, PiRayError, TrainingError
from pi_ray.run.artifact import digest

OPENAI = "https://api.openai.com/v1"  # named here, so that OPENAI_BASE_URL cannot redirect a run unseen
RETRIES = 8
BACKOFF_S = 1.0  # before the first retry, then twice as long each time
LONGEST_WAIT_S = 60.0
REQUEST_S = 120.0
PARALLEL = 8  # prompts asked at a time
PAGE = 100  # jobs or events of one listing
ENDED_BADLY = ("failed", "cancelled")
CHOSEN_BY = "train.backend.name 'openai'"  # the key that asks for a service, where none else is named
OUT_OF_MONEY = ("insufficient_quota", "billing_hard_limit_reached")  # come as 429, and do not pass

T = TypeVar("T")
Sampling = Mapping[str, float]  # temperature, top_p and seed, as the service's API has them


class UnknownError(TrainingError):
    """The service knows no file, job or model of this name."""


@dataclass(frozen=True)
class Reply:
    """An answer, its tokens as the service counts them (None where it does not), and the seconds it took."""

    text: str
    input_tokens: int | None
    output_tokens: int | None
    seconds: float


class Service:
    """One service and key. `wait` sleeps. Errors name the key `chosen_by` and the block of `settings`.

    Raises MissingExtraError without the openai package, ConfigError without a key.
    """

    def __init__(
        self, settings: ClosedConfig, wait: Callable[[float], None] = time.sleep,
        chosen_by: str = CHOSEN_BY, block: str = "closed",
    ):
        try:
            import openai
        except ImportError:
            raise MissingExtraError(f"{chosen_by} needs: pip install 'pi-ray[closed]'") from None
        self.key = os.environ.get(settings.api_key_env, "").strip()
        if not self.key:
            cure = "put the service's key there (any word for a service that wants none)"
            raise ConfigError(f"{block}.api_key_env: the environment variable {settings.api_key_env} is empty; {cure}")
        self.settings, self.wait, self.openai = settings, wait, openai
        url = settings.base_url or OPENAI
        self.client = openai.OpenAI(api_key=self.key, base_url=url, max_retries=0, timeout=REQUEST_S)

    def upload(self, path: Path) -> str:
        """The id of a training file. Uploading twice costs nothing."""
        request = partial(self.client.files.create, file=path, purpose="fine-tune")
        return self._tried(f"uploading {path.name}", request).id

    def file_status(self, file: str) -> str:
        """The service's word for it, or "" for a file that is not there."""
        try:
            return self._tried(f"looking at file {file}", lambda: self.client.files.retrieve(file).status)
        except UnknownError:
            return ""

    def find_job(self, file: str) -> Any | None:
        """The job that trains on this file and has not ended badly."""
        return self._tried("listing fine-tuning jobs", lambda: self._job_on(file))

    def create_job(self, file: str, model: str, suffix: str, seed: int, hyperparameters: Any) -> Any:
        """A fine-tuning job, never two of one file: each try looks first, since a lost connection may have made one."""
        settings: dict[str, Any] = {"suffix": suffix, "seed": seed, "hyperparameters": hyperparameters}
        create = partial(self.client.fine_tuning.jobs.create, model=model, training_file=file, **settings)
        return self._tried(f"fine-tuning {model}", lambda: self._job_on(file) or create())

    def job(self, job: str) -> Any:
        return self._tried(f"looking at job {job}", lambda: self.client.fine_tuning.jobs.retrieve(job))

    def events(self, job: str, seen: set[str]) -> list[Any]:
        """The job's events that are not among `seen`, oldest first; none from a service that has no events."""
        def request() -> list[Any]:
            newest_first = self.client.fine_tuning.jobs.list_events(job, limit=PAGE)
            return [*takewhile(lambda event: event.id not in seen, newest_first)][::-1]

        try:
            return self._tried(f"reading the events of job {job}", request)
        except UnknownError:
            return []

    def chat(self, model: str, prompt: str, limit: int, sampling: Sampling = MappingProxyType({})) -> Reply:
        """The answer to one user message, at most `limit` tokens, greedy unless `sampling` says otherwise."""
        settings: dict[str, Any] = {"temperature": 0, **sampling}

        def request() -> Reply:
            start = time.perf_counter()
            done = self.client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": prompt}], max_tokens=limit, **settings
            )
            seconds, usage = time.perf_counter() - start, done.usage
            text = (done.choices[0].message.content or "") if done.choices else ""
            sent, written = (usage.prompt_tokens, usage.completion_tokens) if usage else (None, None)
            return Reply(text.strip(), sent, written, seconds)

        return self._tried(f"asking {model}", request)

    def _job_on(self, file: str) -> Any | None:
        jobs = self.client.fine_tuning.jobs.list(limit=PAGE)
        return next((job for job in jobs if job.training_file == file and job.status not in ENDED_BADLY), None)

    def _tried(self, what: str, request: Callable[[], T]) -> T:
        """The result of `request`, tried RETRIES times more. Raises ConfigError (refused key) or TrainingError."""
        for attempt in range(RETRIES + 1):
            try:
                return request()
            except self.openai.APIError as error:
                status = getattr(error, "status_code", 0)
                busy = status in (408, 409, 429) and error.code not in OUT_OF_MONEY
                can_pass = busy or status >= 500 or isinstance(error, self.openai.APIConnectionError)
                if attempt == RETRIES or not can_pass:
                    raise self._error(what, error, attempt) from None
                self.wait(_pause(error, attempt))
        raise AssertionError

    def _error(self, what: str, error: Any, retries: int) -> PiRayError:
        status, body = getattr(error, "status_code", None), getattr(error, "body", None)
        message = (body.get("message") if isinstance(body, dict) else None) or error.__cause__ or error
        message = str(message).replace(self.key, "***")
        if status in (401, 403):
            return ConfigError(f"{what}: the service refuses the key in {self.settings.api_key_env}: {message}")
        if status == 404:
            return UnknownError(f"{what}: {message}")
        tried = f" (tried {retries + 1} times)" if retries else ""
        return TrainingError(f"{what}: {message}{tried}. What is done is kept, and the same command goes on from there")


def _pause(error: Any, attempt: int) -> float:
    """Seconds to wait: those of Retry-After, else twice as long each time, varied so that threads do not meet."""
    response: Any = getattr(error, "response", None)
    try:
        return min(max(0.0, float(response.headers["retry-after"])), LONGEST_WAIT_S)
    except (AttributeError, KeyError, ValueError):
        return min(BACKOFF_S * 2**attempt, LONGEST_WAIT_S) * random.uniform(0.75, 1.25)


def replies(
    config: RunConfig, model: str, prompts: Sequence[str], limit: int,
    watch: Callable[[int, int], None] = lambda done, total: None, wait: Callable[[float], None] = time.sleep,
    sampling: Sequence[Sampling] = (), chosen_by: str = CHOSEN_BY,
) -> list[Reply]:
    """The model's reply to each prompt, at most `limit` tokens. closed/answers.jsonl keeps what was paid for.

    Replies are greedy, or sampled as `sampling` says prompt by prompt. `chosen_by` is the key that asks for a service.
    `watch` gets (distinct prompts answered, distinct prompts). Raises TrainingError when the service cannot be reached.
    """
    log = config.root / "closed" / "answers.jsonl"
    asked = [(prompt, limit, sample) for prompt, sample in zip(prompts, sampling or [{}] * len(prompts), strict=True)]
    keys = [digest([config.closed.base_url, model, *filter(None, request)]) for request in asked]
    known, wanted = _read_log(log), dict(zip(keys, asked, strict=True))
    todo = {key: request for key, request in wanted.items() if key not in known}
    watch(len(wanted) - len(todo), len(wanted))
    if todo:
        service = Service(config.closed, wait, chosen_by)
        log.parent.mkdir(parents=True, exist_ok=True)
        lock = threading.Lock()
        # the file outlives the pool, so that answers that are on their way when another request fails are kept too
        with open(log, "a", encoding="utf-8") as file, ThreadPoolExecutor(PARALLEL) as pool:
            file.write("\n" if file.tell() else "")  # ends the half line that a kill left

            def ask(key: str) -> Reply:
                reply = service.chat(model, *todo[key])
                with lock:
                    file.write(json.dumps({"key": key, "model": model, **asdict(reply)}, ensure_ascii=False) + "\n")
                    file.flush()
                return reply

            running = {pool.submit(ask, key): key for key in todo}
            try:
                for i, done in enumerate(as_completed(running), start=1):
                    known[running[done]] = done.result()
                    watch(len(wanted) - len(todo) + i, len(wanted))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return [known[key] for key in keys]


def _read_log(log: Path) -> dict[str, Reply]:
    """Key -> reply; half a line, which a kill leaves, is passed over."""
    found = {}
    for line in log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else ():
        with suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            found[entry["key"]] = Reply(*(entry[field.name] for field in fields(Reply)))
    return found
