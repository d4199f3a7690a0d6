"""Writers of queries: which one a run has, and how each replies to requests."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

from pi_ray.ask.endpoint import confirm_writing, write_by_endpoint
from pi_ray.ask.few_shot import FewShotWriter
from pi_ray.ask.requests import WriteRequest, task_description
from pi_ray.ask.sources import Sources
from pi_ray.ask.train_writer import Pair, prompt_format, train_writer
from pi_ray.ask.writing_workers import write_locally
from pi_ray.config import ADAPTER_KINDS, AskKind, PromptConfig, RunConfig
from pi_ray.errors import DataError
from pi_ray.models import load_tokenizer
from pi_ray.prompt import PromptEncoder
from pi_ray.train.base_size import base_size

FEW_KINDS: dict[str, tuple[AskKind, ...]] = {"adapter": ADAPTER_KINDS, "few-shot": ("direct",)}  # others write all
LARGE = 3_000_000_000  # weights from which a base writes as it is told
QUERY_TOKENS = 64  # of a query where no known one says how long they are
TOKENISED = 1024  # queries at once
LONGER = 1.25  # than the longest known query, in tokens, a written one may be

Name = Literal["adapter", "few-shot", "prompt", "endpoint"]
Replies = Iterator[tuple[int, str]]  # (place of the request, reply)
Listener = Callable[[dict[str, Any]], None]  # of the training log of an adapter that writes
Confirm = Callable[[str], bool]  # asked before money is spent
Tell = Callable[[str], None]


class Writer(Protocol):
    """Replies to requests, in any order."""

    one_each: bool  # whether a reply is one query

    def write(self, requests: Sequence[WriteRequest]) -> Replies: ...


def choose_writer(config: RunConfig, labelled: int) -> Name:
    """The writer that `ask.writer` names; a small base that is prompted is shown examples, not told what to write.

    Raises DataError where an adapter has too few labelled rows to learn from.
    """
    name: Name | Literal["auto"] = config.ask.writer
    if name == "auto":
        name = "prompt" if base_size(config.model).weights >= LARGE else "adapter"
    elif name == "prompt" and base_size(config.model).weights < LARGE:
        name = "few-shot"
    if name == "adapter" and labelled < 2:
        cure = "set ask.writer: prompt (for an instructed base) or endpoint, or let 'pi-ray bake' do all of it"
        raise DataError(f"ask.writer {name}: an adapter learns to write queries from labelled rows, of which there are "
            f"{labelled}; {cure}")
    return name


def written_kinds(config: RunConfig, writer: Name) -> list[AskKind]:
    """The kinds of `ask.kinds` that this writer can write. Raises DataError for none of them."""
    can = FEW_KINDS.get(writer, config.ask.kinds)
    kinds = [kind for kind in config.ask.kinds if kind in can]
    if not kinds:
        raise DataError(f"ask.kinds: the writer {writer} writes {' and '.join(can)} alone; add one of them, or take a "
            "larger base with ask.writer prompt, or ask.writer endpoint")
    return kinds


def query_tokens(config: RunConfig, sources: Sources) -> int:
    """The most tokens of a query."""
    tokenizer = load_tokenizer(config.model)
    known = [*(row.query for row in sources.labelled), *sources.log]
    batches = (known[i : i + TOKENISED] for i in range(0, len(known), TOKENISED))
    longest = max((len(ids) for batch in batches for ids in tokenizer(batch).input_ids), default=0)
    return round(LONGER * longest) + 1 if known else QUERY_TOKENS


def make_writer(
    config: RunConfig, name: Name, sources: Sources, pairs: Sequence[Pair], confirm: Confirm, tell: Tell,
    watch: Listener,
) -> Writer:
    """The writer of this name; `pairs` are what an adapter learns from. Raises DataError where it has none."""
    limit = query_tokens(config, sources)
    if name == "prompt":
        return PromptedWriter(config, sources.template, limit)
    if name == "few-shot":
        return FewShotWriter(config, limit)
    if name == "endpoint":
        return EndpointWriter(config, sources.template, limit, confirm, tell)
    if not pairs:
        raise DataError("ask.writer adapter: no labelled row shares a telling word with the template, so there is "
            "nothing to learn from; set ask.writer prompt or endpoint")
    return AdapterWriter(config, pairs, limit, watch)


class AdapterWriter:
    """The base with an adapter of its own, trained when the first request comes."""

    one_each = True

    def __init__(self, config: RunConfig, pairs: Sequence[Pair], limit: int, watch: Listener):
        self.config, self.pairs, self.limit, self.watch = config, pairs, limit, watch

    def write(self, requests: Sequence[WriteRequest]) -> Replies:
        adapter = train_writer(self.config, self.pairs, self.watch)
        prompt = PromptConfig.model_validate(prompt_format(self.config))
        return write_locally(self.config, requests, prompt, "", str(adapter), self.limit)


class PromptedWriter:
    """The base as it is, in its chat template where it has one."""

    one_each = False

    def __init__(self, config: RunConfig, template: str, limit: int):
        self.config, self.template, self.limit = config, template, limit
        chat: Any = "model+system" if load_tokenizer(config.model).chat_template else "none"
        self.prompt = PromptConfig(chat=chat)

    def write(self, requests: Sequence[WriteRequest]) -> Replies:
        return write_locally(self.config, requests, self.prompt, task_description(self.template), "", self.limit)


class EndpointWriter:
    """The model of the block `closed`. `confirm_cost` comes before the first request, for all rounds that are left."""

    one_each = False

    def __init__(self, config: RunConfig, template: str, limit: int, confirm: Confirm, tell: Tell):
        self.config, self.template, self.limit = config, template, limit
        self.confirm, self.tell, self.confirmed = confirm, tell, False

    def confirm_cost(self, requests: Sequence[WriteRequest], number: int) -> None:
        """`requests` are all of round `number`, counted from 0. Raises TrainingError where declined."""
        if not self.confirmed:
            encoder = PromptEncoder(load_tokenizer(self.config.model), PromptConfig(chat="none"))
            confirm_writing(self.config, requests, number, self.template, self.limit, encoder, self.confirm, self.tell)
            self.confirmed = True

    def write(self, requests: Sequence[WriteRequest]) -> Replies:
        return write_by_endpoint(self.config, requests, self.template, self.limit)
