"""The client of the service: files, fine-tuning jobs, their events, answers. Faults that can pass are retried.

The key comes from the environment and goes to the service alone; it is cut out of the service's messages.
"""

import json
import os
import random
import re
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

from pi_ray.config import ClosedConfig, RunConfig, TrainConfig
from pi_ray.errors import ConfigError, MissingExtraError, PiRayError, TrainingError
from pi_ray.run.artifact import digest, notify_written

OPENAI = "https://api.openai.com/v1"  # named here, so that OPENAI_BASE_URL cannot redirect a run unseen
RETRIES = 8
BACKOFF_S = 1.0  # before the first retry, then twice as long each time
LONGEST_WAIT_S = 60.0
REQUEST_S = 120.0
PARALLEL = 8  # prompts asked at a time
NOTIFY_EVERY = 64  # replies after which those that are paid for are sent to object storage
CUT_OFF = ("length", "content_filter")  # reasons for which a reply ends before the model ends it
PAGE = 100  # jobs or events of one listing
ENDED_BADLY = ("failed", "cancelled")
CHOSEN_BY = "train.backend.name 'openai'"  # the key that asks for a service, where none else is named
UNSUPPORTED = re.compile(r"Unsupported (?:parameter|value): '(max_tokens|temperature)'")
REPLACED = {"max_tokens": "max_completion_tokens"}
OUT_OF_MONEY = ("insufficient_quota", "billing_hard_limit_reached")  # come as 429, and do not pass

T = TypeVar("T")
Sampling = Mapping[str, float]  # temperature, top_p and seed, as the service's API has them
Request = tuple[str, int, Sampling]  # prompt, the most tokens of its reply


class UnknownError(TrainingError):
    """The service knows no file, job or model of this name."""


@dataclass(frozen=True)
class Reply:
    """An answer, its tokens as the service counts them (None where it does not), the seconds it took, why it ended
    (None where the service does not say), and the most tokens that it could have (0 in logs of old, which do not say).
    """

    text: str
    input_tokens: int | None
    output_tokens: int | None
    seconds: float
    finish_reason: str | None = None
    limit: int = 0

    @property
    def cut_off(self) -> bool | None:
        """Whether the model did not end it; None where the service says neither why it ended nor how long it is."""
        if self.finish_reason:
            return self.finish_reason in CUT_OFF
        return self.output_tokens >= self.limit if self.limit and self.output_tokens is not None else None


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
        self.refused: dict[str, dict[str, None]] = {}  # model -> keys of a request that it does not take
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

    def create_job(self, file: str, model: str, suffix: str, epochs: int, train: TrainConfig) -> Any:
        """A fine-tuning job, never two of one file: each try looks first, since a lost connection may have made one."""
        chosen = {
            "batch_size": self.settings.batch_size, "learning_rate_multiplier": self.settings.lr_multiplier,
        }
        hyperparameters: Any = {"n_epochs": epochs, **{name: value for name, value in chosen.items() if value}}
        settings: dict[str, Any] = {"suffix": suffix, "seed": train.seed, "hyperparameters": hyperparameters}
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
        """The answer to one user message, at most `limit` tokens, greedy unless `sampling` says otherwise.

        A model that reasons takes its limit by another name, and no temperature but its own.
        """
        create: Any = self.client.chat.completions.create

        def request() -> Reply:
            settings = {"max_tokens": limit, "temperature": 0, **sampling}
            for name in tuple(self.refused.get(model, ())):
                settings |= {REPLACED[name]: settings[name]} if name in REPLACED else {}
                del settings[name]
            start = time.perf_counter()
            try:
                done = create(model=model, messages=[{"role": "user", "content": prompt}], **settings)
            except self.openai.BadRequestError as error:
                named = [name for name in UNSUPPORTED.findall(str(error)) if name in settings]
                if not named:
                    raise
                self.refused.setdefault(model, {}).update(dict.fromkeys(named))
                return request()
            seconds, usage = time.perf_counter() - start, done.usage
            choice = done.choices[0] if done.choices else None
            text, finish = (choice.message.content or "", choice.finish_reason) if choice else ("", None)
            sent, written = (usage.prompt_tokens, usage.completion_tokens) if usage else (None, None)
            return Reply(text.strip(), sent, written, seconds, finish, limit)

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
    config: RunConfig, model: str, prompts: Sequence[str], limit: int | Sequence[int],
    watch: Callable[[int, int], None] = lambda done, total: None, wait: Callable[[float], None] = time.sleep,
    sampling: Sequence[Sampling] = (), chosen_by: str = CHOSEN_BY, named_limit: int = 0,
) -> list[Reply]:
    """The model's reply to each prompt, at most `limit` tokens (of all or of each). closed/answers.jsonl keeps what was
    paid for.

    Replies are greedy, or sampled as `sampling` says prompt by prompt. `chosen_by` is the key that asks for a service.
    `named_limit` stands for a limit that depends on other prompts: replies are found by it under any limit, and only
    those that a smaller one cut off are asked for again. `watch` gets (distinct prompts answered, distinct prompts).
    Raises TrainingError when the service cannot be reached.
    """
    requests = _keyed_requests(config, model, prompts, limit, sampling, named_limit)
    log, wanted = _log_path(config), dict(requests)
    known = _known_replies(log, wanted)
    todo = {key: request for key, request in wanted.items() if key not in known}
    watch(len(wanted) - len(todo), len(wanted))
    if todo:
        service = Service(config.closed, wait, chosen_by)
        log.parent.mkdir(parents=True, exist_ok=True)
        lock = threading.Lock()
        # the file outlives the pool, so that answers that are on their way when another request fails are kept too
        try:
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
                        if i % NOTIFY_EVERY == 0:
                            notify_written(log)
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        finally:
            notify_written(log)
    return [known[key] for key, _ in requests]


def unpaid_places(
    config: RunConfig, model: str, prompts: Sequence[str], limit: int | Sequence[int],
    sampling: Sequence[Sampling] = (), named_limit: int = 0,
) -> list[int]:
    """The places of the prompts that `replies` would ask the service about, each prompt once."""
    requests = _keyed_requests(config, model, prompts, limit, sampling, named_limit)
    known, first = _known_replies(_log_path(config), dict(requests)), dict[str, int]()
    for place, (key, _) in enumerate(requests):
        if key not in known:
            first.setdefault(key, place)
    return [*first.values()]


def _log_path(config: RunConfig) -> Path:
    return config.root / "closed" / "answers.jsonl"


def _keyed_requests(
    config: RunConfig, model: str, prompts: Sequence[str], limit: int | Sequence[int], sampling: Sequence[Sampling],
    named_limit: int,
) -> list[tuple[str, Request]]:
    """(the key that names its reply, request) of each prompt."""
    limits, samples = [limit] * len(prompts) if isinstance(limit, int) else limit, sampling or [{}] * len(prompts)
    service = [config.closed.base_url, model]
    return [
        (digest([*service, *filter(None, (prompt, named_limit or most, sample))]), (prompt, most, sample))
        for prompt, most, sample in zip(prompts, limits, samples, strict=True)
    ]


def _known_replies(log: Path, wanted: Mapping[str, Request]) -> dict[str, Reply]:
    """Key -> reply, of those that no smaller limit cut off; half a line, which a kill leaves, is passed over."""
    found = {}
    for line in log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else ():
        with suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            reply = Reply(**{field.name: entry[field.name] for field in fields(Reply) if field.name in entry})
            _, most, _ = wanted[entry["key"]]
            if not (reply.cut_off and reply.limit < most):
                found[entry["key"]] = reply
    return found
