"""The six Protocols that people extend. registry.py says how a name finds its implementation."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np

    from pi_ray.config import ScheduleConfig
    from pi_ray.prompt import Template
    from pi_ray.schedule import Phase

SPLITS = ("train", "dev", "test")
UNLABELLED = "unlabelled"  # a fourth, of rows with an empty answer, that a teacher answers


@dataclass(frozen=True)
class Row:
    """One labelled query. `id` is unique over all splits; `group` names a part of the test set that is reported apart.

    `documents` come with the query, such as passages that were retrieved for it; a prompt has them as compressed as its template.
    """

    id: str
    query: str
    answer: str
    group: str = ""
    documents: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reject:
    """A row that could not be used: where it stood and why."""

    source: str
    line: int
    reason: str


class Task(Protocol):
    """Data, template and metric. Constructed with a TaskConfig."""

    def rows(self, split: str) -> Iterator[Row | Reject]:
        """All rows of "train", "dev" or "test", streamed; what cannot be used comes as a Reject.

        Of "unlabelled" the queries that have no answer (Row.answer is ""), as many as there are: none is fine.
        """

    def template(self) -> Template: ...

    def score(self, row: Row, output: str) -> dict[str, float]:
        """Per-row metrics in [0, 1]; always has "exact_match". Corpus BLEU is added by evaluate.py for every task."""

    def fingerprint(self) -> str:
        """Hash of everything the rows and the template are made from."""


class Compressor(Protocol):
    """Constructed with a CompressConfig."""

    def compress(self, text: str, rate: float) -> str:
        """Keep about `rate` (0 < rate < 1) of the tokens of `text`. Protected spans and rate control are the caller's."""


class Encoder(Protocol):
    """Constructed with a RetrieveConfig."""

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Unit-length float32 vectors, shape (len(texts), d): near texts have a large inner product."""


class Schedule(Protocol):
    def __call__(self, config: ScheduleConfig) -> list[Phase]: ...


class Backend(Protocol):
    """How gradients become an update over all workers. Constructed with (build, TrainConfig, micro-batches an update, bf16) inside a worker.

    `build()` loads and returns the peft model, in bfloat16 or else float32; called once, when the backend has made ready for it.
    `model` is what the loop calls; a wrapper such as DeepSpeed's engine stands in for the model there.
    """

    model: Any

    def backward(self, loss: Any, last: bool) -> None:
        """Accumulate gradients of one micro-batch; `last` marks the one that completes the update."""

    def step(self, lr: float) -> None:
        """One AdamW update of the trainable weights with gradients summed over workers, clipped."""

    def state(self) -> dict[str, Any]:
        """name -> fp32 CPU tensor: full weights and Adam moments of the trainable parameters, equal on every worker."""

    def load_state(self, state: dict[str, Any], updates: int) -> None:
        """Take over what `state` gave after `updates` updates, which AdamW's bias correction counts."""


@dataclass(frozen=True)
class GenerationRequest:
    """What an engine is asked for. `prompt_ids` come from PromptEncoder; `adapter` is a verified folder or "" for the base."""

    prompt_ids: list[int]
    max_new_tokens: int
    adapter: str = ""
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = field(default=())
    logprobs: int | None = None  # how many of the likeliest tokens come with each token; None: no log-probabilities at all


class Token(NamedTuple):
    """One generated token. `logprob` is its natural log-probability under the model (temperature 1), `top` the likeliest (id, logprob), best first."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Engine(Protocol):
    """Constructed with (ModelConfig, ServeConfig) inside a Serve replica.

    May also have: check(), which raises when no answer can be expected any more; stats(), counts and gauges for metrics; merge(folder), called once
    before the first request when serve.merge is set.
    """

    def generate(self, request: GenerationRequest) -> AsyncIterator[Token]:
        """Tokens as they are generated, ending after the end-of-sequence token, `stop` or the limit. Closing it frees the slot.

        Raises AdapterError when the adapter does not fit the base model.
        """
