"""Generation for evaluation: Ray Data actors that load the base model once, with every column's adapter beside it."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from pi_ray import __version__
from pi_ray.cluster import placement, session, storage_sync
from pi_ray.config import ModelConfig, PromptConfig, RunConfig
from pi_ray.data.ray_map import stream
from pi_ray.evaluate import forgetting
from pi_ray.evaluate.columns import AnswerLengths, Column, answer_lengths
from pi_ray.evaluate.vllm_answers import answer_by_vllm, engine_of_columns
from pi_ray.models import base_digest, line_break_ids, load_tokenizer
from pi_ray.prompt import PromptEncoder
from pi_ray.run.artifact import MANIFEST_HASH, digest, read_manifest
from pi_ray.run.directory import RunDir
from pi_ray.run.result_log import ResultLog
from pi_ray.train.generation import compute_prefix_cache, generate_greedy, request_seconds
from pi_ray.train.gist import gist_cache, gist_ids, load_gist
from pi_ray.train.lora import PACKAGES, load_adapter
from pi_ray.train.lora_linear import fuse_lora
from pi_ray.train.replicas import generation_workers, load_for_generation

Prompts = tuple[list[int], list[list[int]]]  # prefix ids, and the ids of each row
PROBE_TOKENS = 64  # of an answer to a question for the hidden template
KINDS = ("latency_s", "latency_cached_s", "latency_merged_s")  # as one request is timed, the last with an adapter alone


def column_prompts(column: Column, run: RunDir, encoder: PromptEncoder, split: str, answer: int) -> Prompts:
    """Prefix and rows as a column's model is asked; with examples as prompt.context allows beside `answer` tokens."""
    bank = {r.id: r for r in run.read_rows("train")}
    shots, rows = run.read_shots(split, bank, column.shots), run.read_rows(split, column.rate)
    prefix = encoder.prefix(column.template) + gist_ids(column.gist)
    if not encoder.config.context or encoder.config.conversation:
        return prefix, [encoder.row(r.query, shots.get(r.id, ()), r.documents) for r in rows]
    room = encoder.config.context - len(prefix) - answer
    return prefix, [encoder.fitted_row(r.query, shots.get(r.id, ()), r.documents, room)[0] for r in rows]


def work_item(column: Column, prompts: dict[str, Prompts], indices: Iterable[int], **kind: Any) -> dict[str, Any]:
    """One call of Generator: rows of one column; `kind` is timed=True, probe=template or nothing."""
    (prefix, rows), chosen = prompts[column.name], list(indices)
    item = {"column": column.name, "adapter": column.adapter, "prefix": prefix, "rows": chosen}
    return {**item, "prompts": [rows[i] for i in chosen], **kind}


def run_work(
    config: RunConfig, columns: Sequence[Column], work: list[dict[str, Any]], lengths: AnswerLengths, actors: int = 0,
    engine: str = "transformers",
) -> Iterator[tuple[int, Any]]:
    """Yield (place in `work`, result of Generator). As many actors as there is room for, or `actors`.

    The engine vllm answers before actors come that time and probe, so that the two never share a GPU.
    """
    if not work:
        return
    session.connect()
    nodes = placement.cluster_nodes()
    answered = [i for i, item in enumerate(work) if not {"timed", "probe"} & set(item)] if engine == "vllm" else []
    found = answer_by_vllm(config, [work[i] for i in answered], lengths, nodes, actors) if answered else ()
    yield from ((answered[i], outputs) for i, outputs in found)
    others = [i for i in range(len(work)) if i not in set(answered)]
    actors, options = generation_workers(config, nodes, actors)
    adapters = list(dict.fromkeys(c.adapter for c in columns if c.adapter))
    for i, result in stream(
        [work[i] for i in others], Generator, config.model, config.prompt, adapters, lengths,
        actors=actors, sync=storage_sync.sync_for(config.root), **options,
    ):
        yield others[i], result


def resume_work(
    config: RunConfig, columns: Sequence[Column], work: list[dict[str, Any]], lengths: AnswerLengths
) -> Iterator[tuple[int, Any]]:
    """As `run_work`, but what a former evaluation of these adapters generated for these prompts is not made again.

    Seconds of requests are measured anew. In the end the log holds what this evaluation needs.
    """
    adapters = {c.adapter: (read_manifest(Path(c.adapter)) or {}).get(MANIFEST_HASH, "") for c in columns if c.adapter}
    model, versions = config.model.model_dump(mode="json"), [__version__, *map(version, PACKAGES)]
    engine = engine_of_columns(config, columns)
    versions += [f"vllm {version('vllm')}"] if engine == "vllm" else []
    settings = [model, base_digest(config.model), config.prompt.model_dump(mode="json"), lengths, versions]
    keys = [
        "" if item.get("timed") else digest([settings, adapters.get(item["adapter"]), {**item, "adapter": ""}])
        for item in work
    ]
    with ResultLog(RunDir(config.root).generation_log) as log:
        todo = [place for place, key in enumerate(keys) if key not in log]
        yield from ((place, log[key]) for place, key in enumerate(keys) if key in log)
        for i, result in run_work(config, columns, [work[place] for place in todo], lengths, engine=engine):
            if key := keys[todo[i]]:
                log.add(key, result)
            yield todo[i], result
    log.keep(set(keys))


def median_latencies(seconds: Sequence[Sequence[float]]) -> dict[str, float]:
    """The median of each of KINDS; `seconds` has those of one request after another."""
    return {kind: median(values) for kind, values in zip(KINDS, zip(*seconds, strict=True), strict=False)}


def compare_latencies(
    columns: Sequence[tuple[Column, RunConfig]], watch: Callable[[int], None]
) -> dict[str, dict[str, float]]:
    """Column -> median seconds of a request, for columns of several runs of one base model.

    One engine answers a row for column after column, so that a slow minute of the machine meets them all.
    """
    first, named = columns[0][1], [column for column, _ in columns]
    split, encoder = first.evaluate.split, PromptEncoder(load_tokenizer(first.model), first.prompt)
    lengths = answer_lengths(first, RunDir(first.root).read_rows(split))
    prompts = {
        column.name: column_prompts(column, RunDir(c.root), encoder, split, lengths.limit) for column, c in columns
    }
    rows = range(min(first.evaluate.latency_rows, *(len(ids) for _, ids in prompts.values())))
    work = [work_item(c, prompts, [i], timed=True) for i in rows for c in named]
    seconds: dict[str, list[Sequence[float]]] = {c.name: [] for c in named}
    for n, (place, timed) in enumerate(run_work(first, named, work, lengths, actors=1), start=1):
        seconds[work[place]["column"]] += timed
        watch(n)
    return {name: median_latencies(timed) for name, timed in seconds.items()}


class LoadedAdapters:
    """Loads adapter folders beside `base` and switches between them. `model` is what to call."""

    def __init__(self, base: Any, folders: Sequence[str]):
        self.base = self.model = base
        self._names = {folder: f"adapter{i}" for i, folder in enumerate(folders)}  # that peft knows them by
        self._active: str | None = None
        for folder, name in self._names.items():
            self.model = load_adapter(self.model, folder, name)
        fuse_lora(self.model)
        self.model.eval()

    def activate(self, folder: str) -> None:
        """Make `model` compute with the adapter of `folder` alone; "" is the base model alone."""
        if self.model is self.base or folder == self._active:
            return
        if folder:
            self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(self._names[folder], inference_mode=True)
        else:
            self.model.base_model.disable_adapter_layers()
        self._active = folder

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Within it the active adapter is added into the base weights, which are restored bit for bit afterwards."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [m.get_base_layer() for m in self.model.modules() if isinstance(m, BaseTunerLayer)]
        weights = list({id(p): p for layer in layers for p in layer.parameters(recurse=False)}.values())
        before = [p.detach().cpu().clone() for p in weights]
        self.model.merge_adapter()
        try:
            yield
        finally:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of ia3, that unmerging is inexact
                self.model.unmerge_adapter()
            for p, value in zip(weights, before, strict=True):  # unmerging leaves rounding
                p.data.copy_(value)


class Generator:
    """A Ray Data actor: the base model with every column's adapter beside it. Called with one `work_item` at a time."""

    def __init__(self, settings: ModelConfig, prompt: PromptConfig, adapters: list[str], lengths: AnswerLengths):
        self.encoder = PromptEncoder(load_tokenizer(settings), prompt)
        self.end = self.encoder.tokenizer.eos_token_id
        self.loaded = LoadedAdapters(load_for_generation(settings), adapters)
        self.gists = {folder: load_gist(Path(folder)) for folder in adapters}
        self.lengths = lengths
        self.breaks = line_break_ids(self.encoder.tokenizer) if lengths.one_line else frozenset()
        self._prefix: tuple[str, Any] = ("", None)  # the column whose prefix is cached, and its KV cache

    def __call__(self, work: dict[str, Any]) -> Any:
        """The output ids of each prompt; with "timed", seconds of a request for each, of KINDS.

        With "probe" (a template), perplexity on other text, and how much of that template is recited when asked.
        """
        self.loaded.activate(work["adapter"])
        model, prefix, gists = self.loaded.model, work["prefix"], self.gists.get(work["adapter"])
        fill = None if gists is None else partial(gist_cache, model, prefix, gists)
        if self._prefix[0] != work["column"]:
            self._prefix = (work["column"], fill() if fill else compute_prefix_cache(model, prefix))
        if work.get("timed"):
            return self._time(work, fill)
        if "probe" in work:
            return self._probe(model, prefix, work["probe"])
        limit, cache = self.lengths.limit, self._prefix[1]
        return generate_greedy(model, prefix, work["prompts"], limit, self.end, cache, self.breaks)

    def _time(self, work: dict[str, Any], fill: Callable[[], Any] | None) -> list[tuple[float, ...]]:
        prefix, prompts, cache = work["prefix"], work["prompts"], self._prefix[1]
        time = partial(request_seconds, self.loaded.model, prefix, new_tokens=self.lengths.typical)
        if self.loaded.model.device.type != "cpu":
            time(prompts[0], fill=fill)  # the first request of a kind picks its kernels
        kinds = [[time(row, fill=fill) for row in prompts]]
        kinds.append([time(row, cache=cache) for row in prompts] if prefix else kinds[0])
        if work["adapter"]:
            with self.loaded.merged():
                kinds.append([time(row, fill=fill) for row in prompts])
        return list(zip(*kinds, strict=True))

    def _probe(self, model: Any, prefix: list[int], template: str) -> dict[str, Any]:
        def answer(queries: list[str]) -> list[str]:
            rows = [self.encoder.row(query) for query in queries]
            outputs = generate_greedy(model, prefix, rows, PROBE_TOKENS, self.end, cache=self._prefix[1])
            return [self.encoder.decode(ids) for ids in outputs]

        found = forgetting.probe_leak(answer, template)
        perplexity = forgetting.perplexity(model, self.encoder.tokenizer, forgetting.off_task_texts())
        return {"off_task_perplexity": perplexity, "recited": found["recited"], "longest_run": found["longest_run"]}
