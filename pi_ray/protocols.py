"""The seven Protocols that people extend, and the types that they exchange. registry.py finds parts by name."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np

    from pi_ray.config import ScheduleConfig
    from pi_ray.prompt import Template
    from pi_ray.schedule import Phase

SPLITS = ("train", "dev", "test")
UNLABELLED = "unlabelled"  # a further split: rows with an empty answer, which a teacher answers


@dataclass(frozen=True)
class Row:
    """One labelled query."""

    id: str  # unique over all splits
    query: str
    answer: str
    group: str = ""  # a part of the test set with its own scores
    documents: tuple[str, ...] = ()  # such as passages retrieved for the query; compressed at the template's rate


@dataclass(frozen=True)
class Reject:
    """A row that cannot be used: its file, its line and the reason."""

    source: str
    line: int
    reason: str


class Task(Protocol):
    """Data, template and metric. Constructed with a TaskConfig."""

    def rows(self, split: str) -> Iterator[Row | Reject]:
        """Stream all rows of a split of SPLITS, or of UNLABELLED if there are any; a Reject for one that is unfit."""

    def template(self) -> Template: ...

    def score(self, row: Row, output: str) -> dict[str, float]:
        """Metrics of one row in [0, 1]: those of `task.metric`, or "exact_match" and more, beside which evaluate/ sets
        corpus BLEU.
        """

    def fingerprint(self) -> str:
        """A hash of everything that rows and template are made from."""


class Metric(Protocol):
    """A score of answers to a user's own rows (`task.metric`). Constructed with a MetricConfig and the TaskConfig.

    Optional methods: check(row) says why a row's answer cannot be scored against, or ""; score_all(rows, outputs) takes
    all rows at once where scoring is work.
    """

    def score(self, row: Row, output: str) -> float | dict[str, float]:
        """A number from 0 to 1, or several by name, the deciding one first. Raises DataError for an unfit row."""


class Compressor(Protocol):
    """Constructed with a CompressConfig."""

    def compress(self, text: str, rate: float) -> str:
        """Keep about `rate` (0 < rate < 1) of the tokens of `text`. The caller protects spans and controls the rate."""


class Encoder(Protocol):
    """Constructed with a RetrieveConfig."""

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Unit-length float32 vectors, shape (len(texts), d): near texts have a large inner product."""


class Schedule(Protocol):
    def __call__(self, config: ScheduleConfig) -> list[Phase]: ...


class Backend(Protocol):
    """Turns gradients into an update over all workers.

    Constructed inside a worker with (build, TrainConfig, micro-batches of an update, bf16). `build()` loads and returns
    the peft model, in bfloat16 or else float32; the backend calls it once, when it is ready.
    """

    model: Any  # what the training loop calls: the peft model, or a wrapper such as DeepSpeed's engine

    def backward(self, loss: Any, last: bool) -> None:
        """Accumulate the gradients of one micro-batch; `last` marks the last one of an update."""

    def step(self, lr: float) -> None:
        """Do one AdamW update of the trainable weights, with gradients summed over workers and clipped."""

    def state(self) -> dict[str, Any]:
        """name -> fp32 CPU tensor: full weights and Adam moments of the trainable parameters, equal on every worker."""

    def load_state(self, state: dict[str, Any], updates: int) -> None:
        """Restore the `state()` of `updates` updates, which AdamW's bias correction counts."""


@dataclass(frozen=True)
class GenerationRequest:
    """One sequence to generate."""

    prompt_ids: list[int]  # of PromptEncoder
    max_new_tokens: int
    adapter: str = ""  # a verified folder; "": the base model
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None  # likeliest tokens that come with each token; None: no log-probabilities at all
    adapter_hash: str = ""  # of the folder's manifest: what an engine keeps of an adapter, it keeps under this
    cache_salt: str = ""  # requests of different salts share no cached prefix
    grammar: str = ""  # that the answer follows, in llguidance's Lark (serve/engine/grammar.py); "": it is free

    @property
    def adapter_key(self) -> str:
        """The key that tells adapters apart, also two that had one folder in turn; "": the base model."""
        return self.adapter_hash or self.adapter


class Token(NamedTuple):
    """One generated token."""

    id: int
    logprob: float | None = None  # natural log-probability under the model (temperature 1)
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens as (id, logprob), best first


class Engine(Protocol):
    """Constructed with (ModelConfig, ServeConfig) inside a Serve replica.

    Optional methods: check() raises when the engine can no longer answer; stats() returns counts and gauges for
    metrics; merge(folder) is called once before the first request if serve.merge is set.
    """

    def generate(self, request: GenerationRequest) -> AsyncIterator[Token]:
        """Yield tokens up to the end-of-sequence token, `stop` or the limit; closing the iterator ends the sequence.

        It chooses no token that `grammar` forbids. Raises AdapterError if the adapter does not fit the base model.
        """
