"""Serving over HTTP: the full prompt, the adapter with the query alone, eight adapters, and `transformers serve`.

    python -m tests.bench.serve [--requests 200] [--tokens 16] [--only query,peer] [--concurrency 1,2,4,8,16]
                                [--folder FOLDER] [--out FILE]

The same requests (the bundled task's test queries) at rising concurrency, streamed, each answered with exactly --tokens
tokens: all sides serve one model folder whose end token is one that answers do not hold, and every answer's length is
checked. Parts, each with a server of its own:

    full          the template before every query, read each time
    full-cached   the same with pi-ray's prefix cache
    query         the query alone, the adapter beside the base model
    merged        the query alone, the adapter in the base weights
    mixed8        the queries over 8 adapters in turn
    constrained   as query, with answers held to a JSON schema
    overhead      an engine that computes nothing, one request after another and at the highest concurrency
    haproxy       the same where Ray Serve has HAProxy in front of it (RAY_SERVE_ENABLE_HA_PROXY=1)
    guard         the same, for an adapter of conversations: the user's message alone, and behind a system message of
                  6 kB with 12 kB of tools, which the guard takes away; the difference is what these cost, and that to
                  a request with as many bytes in a field that is ignored is what the guard costs
    cold          one query to a server without a replica, which then starts
    peer          `transformers serve` with the merged model, the query alone; with and without --continuous-batching,
                  the faster one at the highest concurrency
    llama.cpp     its server with the merged model in F16 and in Q8_0, the query alone

Only `full-cached` has a prefix cache, and a new server for each concurrency, so that the cache holds the template and
none of the queries. Ratios are of requests a second at the highest concurrency. `over_transformers_serve` is `merged`
over the peer: the same weights, the same ids; `unmerged_over_transformers_serve` is `query`, which has the adapter's
products to compute besides. The adapters are random: their answers mean nothing, their time does.
`serve_overhead_ms` is the median of whole requests. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import count, cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

from pi_ray.config import ModelConfig, RunConfig, ServeConfig, TaskConfig
from pi_ray.protocols import GenerationRequest, Token
from pi_ray.tasks.opsql.task import OpsqlTask
from tests.bench.llama_server import KINDS as LLAMA_KINDS
from tests.bench.report import header, last_line

REPO = Path(__file__).parents[2]
ADAPTERS, RANK = 9, 32  # one alone, and eight that share batches
QUERY = "Request: {query}\nOpsQL:"
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLUGIN = {
    "bench_engine-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: bench-engine\nVersion: 1\n",
    "bench_engine-1.dist-info/entry_points.txt": "[pi_ray.engine]\nempty = tests.bench.serve:EmptyEngine\n",
}
START_S = 600  # of a server, at most
WARM = 8  # requests before those that are timed


class FailedError(Exception):
    """A side that does not answer, or does other work than the others."""


@dataclass(frozen=True)
class Part:
    """What one server is asked. `full`: the template stands before each query; `models`: asked in turn; `serve`:
    settings of pi-ray's server; `body`: further fields of each request.
    """

    name: str
    models: tuple[str, ...]
    full: bool = False
    serve: tuple[tuple[str, Any], ...] = (("prefix_cache_mb", 0),)
    body: tuple[tuple[str, Any], ...] = ()


ALERT = {
    "type": "object", "required": ["metric", "severity", "minutes"], "additionalProperties": False,
    "properties": {
        "metric": {"type": "string"}, "severity": {"enum": ["low", "high"]}, "minutes": {"type": "integer"},
    },
}
ALERTS = {"type": "array", "items": ALERT, "minItems": 1000}  # longer than any answer that is asked for
AS_ALERTS = {"type": "json_schema", "json_schema": {"name": "alerts", "schema": ALERTS, "strict": True}}
PARTS = (
    Part("full", ("base",), full=True),
    Part("full-cached", ("base",), full=True, serve=(("prefix_cache_mb", 512),)),
    Part("query", ("a0",)),
    Part("merged", ("a0",), serve=(("prefix_cache_mb", 0), ("merge", "a0"))),
    Part("mixed8", tuple(f"a{i}" for i in range(1, ADAPTERS))),
    Part("constrained", ("a0",), body=(("response_format", AS_ALERTS),)),
)
NAMES = (*(p.name for p in PARTS), "peer", "llama.cpp", "overhead", "haproxy", "guard", "cold")
POLICY = "\n".join(f"Rule {i}: an agent says what the tools say about case {i}, and nothing else." for i in range(88))
TOOLS = [
    {"type": "function", "function": {
        "name": f"look_up_{i}", "description": f"Looks up part {i} of a case, and says how it stands and since when.",
        "parameters": {"type": "object", "required": ["case_id"], "properties": {
            name: {"type": "string", "description": f"The {name.replace('_', ' ')}, as the customer gave it, if any."}
            for name in ("case_id", "name", "street", "town", "date_of_birth", "note")
        }},
    }} for i in range(16)
]  # fmt: skip


@dataclass(frozen=True)
class Reply:
    """Seconds until the first text and until the end; tokens as the server counted them."""

    first: float
    whole: float
    prompt: int
    answer: int


@dataclass(frozen=True)
class Level:
    """One part at one concurrency."""

    part: str
    concurrency: int
    seconds: float
    replies: tuple[Reply, ...]

    @property
    def rate(self) -> float:
        return len(self.replies) / self.seconds

    def row(self) -> str:
        whole, first = sorted(r.whole for r in self.replies), sorted(r.first for r in self.replies)
        tokens = (
            sum(r.prompt for r in self.replies) / len(self.replies),
            sum(r.answer for r in self.replies) / len(self.replies),
        )
        return (
            f"  {self.part:24} {self.concurrency:3}  {self.rate:8.2f} requests/s   latency p50 {median(whole):7.3f} "
            f"p99 {_p99(whole):7.3f} s   "
            f"first text p50 {median(first):7.3f} p99 {_p99(first):7.3f} s   {tokens[0]:5.0f} + {tokens[1]:.0f} tokens"
        )


def _p99(ordered: Sequence[float]) -> float:
    return ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]


class EmptyEngine:
    """protocols.Engine that computes nothing, so that what remains is the server."""

    def __init__(self, model: ModelConfig, serve: ServeConfig):
        pass

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Token]:
        for _ in range(request.max_new_tokens):
            yield Token(request.prompt_ids[-1])


# Models and adapters


def make_models(folder: Path, model: str) -> None:
    """folder/base (the model, with an end token that answers do not hold), folder/merged (with adapter 0 in it), and
    folder/store with the adapters.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    from pi_ray.models import load_model, load_tokenizer

    tokenizer, base = load_tokenizer(ModelConfig(base=model)), load_model(ModelConfig(base=model, dtype="float32"))
    tokenizer.chat_template = CHAT
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)
    base.config.eos_token_id = base.generation_config.eos_token_id = len(tokenizer) - 1
    for name in ("base", "merged"):
        tokenizer.save_pretrained(folder / name)
    base.save_pretrained(folder / "base")
    adapted = get_peft_model(
        base, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for i in reversed(range(ADAPTERS)):  # the first one last, which then is merged
        torch.manual_seed(i)
        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                if "lora_" in name:
                    weight.normal_(0, 0.01)
        _publish(folder, f"a{i}", adapted)
    adapted.merge_and_unload().save_pretrained(folder / "merged")
    (folder / "complete").touch()


def _publish(folder: Path, name: str, adapted: Any) -> None:
    from pi_ray.run.artifact import staged, write_atomic
    from tests.lora import card

    with staged(folder / "store" / name / "v0001", fingerprint=name) as tmp:
        adapted.save_pretrained(tmp)
        (tmp / "README.md").unlink(missing_ok=True)
        prompt = {"chat": "chatml", "query": QUERY}
        write_atomic(tmp / "pi_ray.json", json.dumps(card(folder / "base", prompt=prompt, max_answer_tokens=64)))
    write_atomic(folder / "store" / name / "latest.json", json.dumps({"version": "v0001"}))


def queries(n: int) -> list[str]:
    """Of the bundled task, none twice while there are so many (about 900), so that no cache knows an answer's
    prompt.
    """
    task = OpsqlTask(TaskConfig(name="opsql"))
    return list(
        islice(
            cycle(
                dict.fromkeys(row.query for split in ("test", "unlabelled", "train", "dev") for row in task.rows(split))
            ),
            n,
        )
    )


# Servers


@contextmanager
def pi_ray(folder: Path, part: Part, concurrency: int, haproxy: bool = False, **serve: Any) -> Iterator[str]:
    """`pi-ray serve`, in a process and a Ray of its own -> its URL."""
    port = _free_port()
    limits = {
        "port": port, "max_ongoing_requests": concurrency, "max_queued_requests": 2 * concurrency,
        "request_timeout_s": 600, **dict(part.serve), **serve,
    }
    config = RunConfig.model_validate(
        {
            "name": "bench", "run_dir": str(folder / "runs"), "store": str(folder / "store"),
            "model": {"base": str(folder / "base"), "dtype": "float32"},
            "prompt": {"chat": "chatml", "query": "{query}"}, "serve": limits,
        }
    )
    path = folder / f"{part.name}.json"
    path.write_text(config.model_dump_json())
    plugin = folder / "plugin"
    for name, text in PLUGIN.items():  # an installed package that brings an engine, as registry.py finds it
        (plugin / name).parent.mkdir(parents=True, exist_ok=True)
        (plugin / name).write_text(text)
    environment = {"PYTHONPATH": f"{plugin}:{REPO}", "RAY_ADDRESS": "", "PI_RAY_API_KEY": ""}
    environment["RAY_SERVE_ENABLE_HA_PROXY"] = str(int(haproxy))
    with _process(
        [sys.executable, "-m", "pi_ray.cli", "serve", str(path)], environment, folder / f"{part.name}.log", port,
        "/healthz",
    ):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def transformers_serve(folder: Path, batching: bool) -> Iterator[str]:
    port = _free_port()
    command = [
        Path(sys.executable).with_name("transformers"), "serve", folder / "merged", "--port", port, "--host",
        "127.0.0.1", "--dtype", "float32",
    ]
    command += ["--continuous-batching"] * batching
    with _process(list(map(str, command)), {}, folder / f"peer-{batching}.log", port, "/health"):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def llama_server(folder: Path, kind: str, parallel: int) -> Iterator[str]:
    model, port = folder / f"merged-{kind}.gguf", _free_port()
    if not model.is_file():
        work = (
            "from pathlib import Path; from tests.bench.llama_server import write_gguf; "
            f"write_gguf(Path({str(folder / 'merged')!r}), {CHAT!r}, {kind!r}, Path({str(model) + '.tmp'!r}))"
        )
        subprocess.run([sys.executable, "-c", work], cwd=REPO, check=True)
        Path(f"{model}.tmp").rename(model)
    command = [sys.executable, "-m", "tests.bench.llama_server", model, "--port", port, "--parallel", parallel]
    with _process(list(map(str, command)), {}, folder / f"llama-{kind}.log", port, "/health"):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def _process(command: list[str], environment: dict[str, str], log: Path, port: int, health: str) -> Iterator[None]:
    """Raises FailedError with the end of its log when it does not come up."""
    import httpx

    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **environment}
    with open(log, "w") as out:
        process = subprocess.Popen(
            command, cwd=REPO, env={k: v for k, v in environment.items() if v}, stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            for _ in range(START_S):
                time.sleep(1)
                if process.poll() is not None:
                    break
                try:
                    if httpx.get(f"http://127.0.0.1:{port}{health}", timeout=5).status_code == 200:
                        yield
                        return
                except httpx.TransportError:
                    continue
            raise FailedError(
                f"{' '.join(command[:4])} did not come up; the end of its log:\n{log.read_text()[-3000:]}"
            )
        finally:
            _stop(process)


def _replicas() -> list[str]:
    """Processes of model replicas on this machine, by the names that Ray gives them."""
    found = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [
        line for line in found.splitlines() if line.startswith("ray::ServeReplica") and line.rstrip().endswith(":Model")
    ]


def _wait_for(happened: Callable[[], bool]) -> None:
    for _ in range(START_S):
        if happened():
            return
        time.sleep(1)
    raise FailedError("the server's replica did not go")


def _stop(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# Clients


async def drive(
    url: str, asks: Sequence[tuple[str, str]], tokens: int, concurrency: int, more: dict[str, Any] | None = None
) -> tuple[float, list[Reply]]:
    """(model, message) of each request, and `more` fields of all; so many clients, each of which sends its next request
    when it has its answer -> seconds in all, replies.
    """
    import aiohttp

    places = count()
    replies: list[Reply] = []

    async def client() -> None:
        while (i := next(places)) < len(asks):
            replies.append(await ask(session, url, *asks[i], tokens, more or {}))

    # a connection for each request: llama.cpp's server closes one that a client would use again
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=1200), connector=connector) as session:
        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(concurrency)))
        return time.perf_counter() - began, replies


async def ask(session: Any, url: str, model: str, message: str, tokens: int, more: dict[str, Any]) -> Reply:
    body = {
        "model": model, "messages": [{"role": "user", "content": message}], "max_tokens": tokens, "temperature": 0,
        "stream": True, "stream_options": {"include_usage": True}, **more,
    }  # fmt: skip
    began, first, usage = time.perf_counter(), 0.0, None
    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
        if response.status != 200:
            raise FailedError(f"{model}: HTTP {response.status}: {(await response.text())[:500]}")
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise FailedError(f"{model}: {event['error']}")
            usage = event.get("usage") or usage
            if not first and any((choice.get("delta") or {}).get("content") for choice in event["choices"]):
                first = time.perf_counter() - began
    whole = time.perf_counter() - began
    if not usage or usage["completion_tokens"] != tokens:
        raise FailedError(
            f"{model}: an answer of {usage and usage['completion_tokens']} tokens, expected {tokens}; the sides would "
            "not do the same work"
        )
    return Reply(first or whole, whole, usage["prompt_tokens"], usage["completion_tokens"])


async def overhead(url: str, bodies: Sequence[dict[str, Any]], concurrency: int = 1) -> list[float]:
    """Seconds of requests for one token, not streamed, of which `concurrency` are under way at once."""
    import aiohttp

    found: list[float] = []
    waiting = iter(bodies)

    async def client() -> None:
        for body in waiting:
            began = time.perf_counter()
            async with session.post(f"{url}/v1/chat/completions", json={**body, "max_tokens": 1}) as response:
                text = await response.text()
            found.append(time.perf_counter() - began)
            if response.status != 200:
                raise FailedError(f"HTTP {response.status}: {text[:500]}")

    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(client() for _ in range(concurrency)))
    return found


# The run


def levels(
    name: str, url: str, asks: Sequence[tuple[str, str]], tokens: int, concurrencies: Sequence[int],
    more: dict[str, Any] | None = None,
) -> list[Level]:
    """The asks at each concurrency, after the last few, which warm up and are not asked again."""
    asyncio.run(drive(url, asks[-WARM:], tokens, 4, more))
    found = []
    for concurrency in concurrencies:
        found.append(Level(name, concurrency, *_timed(url, asks[:-WARM], tokens, concurrency, more)))
        print(found[-1].row(), flush=True)
    return found


def _timed(
    url: str, asks: Sequence[tuple[str, str]], tokens: int, concurrency: int, more: dict[str, Any] | None = None
) -> tuple[float, tuple[Reply, ...]]:
    seconds, replies = asyncio.run(drive(url, asks, tokens, concurrency, more))
    return seconds, tuple(replies)


def own(folder: Path, part: Part, args: argparse.Namespace) -> list[Level]:
    template = OpsqlTask(TaskConfig(name="opsql")).template().text
    message = (lambda q: f"{template}\n\n{QUERY.replace('{query}', q)}") if part.full else (lambda q: q)
    asks = list(zip(cycle(part.models), map(message, queries(args.requests + WARM)), strict=False))
    found: list[Level] = []
    for concurrencies in [[c] for c in args.concurrency] if dict(part.serve)["prefix_cache_mb"] else [args.concurrency]:
        with pi_ray(folder, part, max(args.concurrency)) as url:
            found += levels(part.name, url, asks, args.tokens, concurrencies, dict(part.body))
    return found


def peer(folder: Path, args: argparse.Namespace) -> list[Level]:
    """Both ways at the highest concurrency, with a quarter of the requests; then the faster one at all."""
    asks = [(str(folder / "merged"), QUERY.replace("{query}", q)) for q in queries(args.requests + WARM)]
    rates: dict[bool, float] = {}
    for batching in (True, False):
        name = f"transformers serve, {'continuous' if batching else 'one by one'}"
        try:
            with transformers_serve(folder, batching) as url:
                asyncio.run(drive(url, asks[:2], args.tokens, 2))
                part = asks[: max(len(asks) // 4, 1)]
                level = Level(name, max(args.concurrency), *_timed(url, part, args.tokens, max(args.concurrency)))
        except FailedError as error:
            print(f"  {name}: not on this machine ({str(error).strip()[-300:]})", flush=True)
            continue
        rates[batching] = level.rate
        print(level.row(), flush=True)
    if not rates:
        raise FailedError("transformers serve does not run here")
    with transformers_serve(folder, max(rates, key=lambda way: rates[way])) as url:
        return levels("peer", url, asks, args.tokens, args.concurrency)


def llama(folder: Path, args: argparse.Namespace) -> list[Level]:
    """The merged weights by llama.cpp's server, which is told to go on at the end tokens that it finds by itself."""
    asks = [("merged", QUERY.replace("{query}", q)) for q in queries(args.requests + WARM)]
    found: list[Level] = []
    for kind in LLAMA_KINDS:
        with llama_server(folder, kind, max(args.concurrency)) as url:
            found += levels(f"llama.cpp {kind}", url, asks, args.tokens, args.concurrency, {"ignore_eos": True})
    return found


def empty(folder: Path, args: argparse.Namespace, haproxy: bool = False) -> dict[str, float]:
    """An engine that computes nothing: milliseconds (p50) of a request, and requests a second at the highest
    concurrency.
    """
    bodies = [{"model": "a0", "messages": _user(query)} for query in queries(args.requests)]
    name, most = "haproxy" if haproxy else "overhead", max(args.concurrency)
    with pi_ray(folder, Part(name, ("a0",)), most, haproxy, engine="empty") as url:
        asyncio.run(overhead(url, bodies[:20]))
        found = asyncio.run(overhead(url, bodies))
        began = time.perf_counter()
        asyncio.run(overhead(url, bodies, most))
        rate = len(bodies) / (time.perf_counter() - began)
    p50, p99 = 1000 * median(found), 1000 * _p99(sorted(found))
    where = "behind HAProxy" if haproxy else "behind Serve's own proxy"
    print(f"  an empty engine {where}: p50 {p50:.1f} ms, p99 {p99:.1f} ms a request; {rate:.1f} requests/s", flush=True)
    return {"ms": p50, "rate": rate}


def guard(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds (p50) that a request takes longer for the system message and the tools that the guard takes away,
    and for as many bytes in a field that the server ignores.

    The three kinds of request take turns.
    """
    _publish_agent(folder)
    bare = [{"model": "agent", "messages": _user(query)} for query in queries(args.requests)]
    policy = {"role": "system", "content": POLICY}
    carried = [{**body, "metadata": json.dumps([policy, TOOLS])} for body in bare]
    full = [{**body, "messages": [policy, *body["messages"]], "tools": TOOLS} for body in bare]
    mixed = [body for three in zip(bare, carried, full, strict=True) for body in three]
    with pi_ray(folder, Part("guard", ("agent",)), max(args.concurrency), engine="empty") as url:
        asyncio.run(overhead(url, mixed[:60]))
        seconds = asyncio.run(overhead(url, mixed))
    alone, ignored, guarded = (1000 * median(seconds[i::3]) for i in range(3))
    sizes = f"{len(POLICY):,} characters of system message, {len(json.dumps(TOOLS)):,} of tools"
    print(f"  a message alone: p50 {alone:.2f} ms; with as many bytes that are ignored: {ignored:.2f} ms", flush=True)
    print(f"  behind {sizes}: {guarded:.2f} ms", flush=True)
    return {"guard_ms": guarded - alone, "guard_over_ignored_ms": guarded - ignored}


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _publish_agent(folder: Path) -> None:
    """The adapter a0 once more, as if it had been trained on conversations."""
    from pi_ray.conversation import join_tools
    from pi_ray.store.prompt_guard import prompt_record
    from tests.lora import card, rewrite

    made = folder / "store" / "agent"
    shutil.rmtree(made, ignore_errors=True)
    shutil.copytree(folder / "store" / "a0", made)
    wording = {"chat": "chatml", "conversation": True}
    rewrite(made / "v0001", "pi_ray.json", card(folder / "base", prompt=wording, full_prompt_tokens=4000))
    rewrite(made / "v0001", "prompt.json", prompt_record(join_tools(POLICY, TOOLS), [], []))


def figures(found: Sequence[Level], milliseconds: dict[str, float]) -> dict[str, float]:
    """Those of the last line, as far as their parts were run."""
    highest = max((level.concurrency for level in found), default=0)
    best = {level.part: level.rate for level in found if level.concurrency == highest}
    single = {level.part: level.rate for level in found if level.concurrency == 1}
    wanted = {
        "query_over_full": (best.get("query"), best.get("full")),
        "query_over_full_cached": (best.get("query"), best.get("full-cached")),
        f"c{highest}_over_c1": (best.get("query"), single.get("query")),
        "over_transformers_serve": (best.get("merged"), best.get("peer")),
        "unmerged_over_transformers_serve": (best.get("query"), best.get("peer")),
        "over_llama_cpp_f16": (best.get("merged"), best.get("llama.cpp F16")),
        "over_llama_cpp_q8_0": (best.get("merged"), best.get("llama.cpp Q8_0")),
        "one_over_llama_cpp_f16": (single.get("merged"), single.get("llama.cpp F16")),
        "one_over_llama_cpp_q8_0": (single.get("merged"), single.get("llama.cpp Q8_0")),
        "mixed8_over_one": (best.get("mixed8"), best.get("query")),
        "constrained_over_free": (best.get("constrained"), best.get("query")),
    }
    ratios = {name: a / b for name, (a, b) in wanted.items() if a and b}
    return {**ratios, **milliseconds}


def _arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return sorted(int(n) for n in text.split(","))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200, help="at each concurrency")
    parser.add_argument("--tokens", type=int, default=16, help="of each answer")
    parser.add_argument("--only", default=",".join(NAMES), help=f"parts, of {', '.join(NAMES)}")
    parser.add_argument("--concurrency", type=numbers, default=[1, 2, 4, 8, 16])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument(
        "--folder", type=Path,
        help="keep models and adapters there for the next run; without it they are made anew, in a temporary folder",
    )
    parser.add_argument("--out", type=Path, help="also write every reply's measurements there, as JSON")
    args = parser.parse_args()
    args.only = args.only.split(",")
    if unknown := set(args.only) - set(NAMES):
        parser.error(f"--only: no part {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    if "peer" in args.only and not all(map(find_spec, ("uvicorn", "openai", "typer"))):
        raise SystemExit(
            "the peer needs what 'transformers serve' needs: pip install 'transformers[serving]'; or leave it out with "
            "--only"
        )
    return args


def run(folder: Path, args: argparse.Namespace) -> tuple[list[Level], dict[str, float]]:
    """Every part that was asked for, on the models in `folder` -> its levels, and milliseconds of the empty engine."""
    if not (folder / "complete").is_file():
        work = (
            "from pathlib import Path; from tests.bench.serve import make_models; "
            f"make_models(Path({str(folder)!r}), {args.model!r})"
        )
        subprocess.run([sys.executable, "-c", work], cwd=REPO, check=True)
    found: list[Level] = []
    milliseconds: dict[str, float] = {}
    for part in PARTS:
        if part.name in args.only:
            found += own(folder, part, args)
    if "peer" in args.only:
        found += peer(folder, args)
    if "llama.cpp" in args.only:
        found += llama(folder, args)
    if "overhead" in args.only:
        own_proxy = empty(folder, args)
        milliseconds["serve_overhead_ms"] = own_proxy["ms"]
    if "haproxy" in args.only:
        behind = empty(folder, args, haproxy=True)
        milliseconds["haproxy_overhead_ms"] = behind["ms"]
        if "overhead" in args.only:
            milliseconds["overhead_over_haproxy"] = own_proxy["ms"] / behind["ms"]
            milliseconds["haproxy_rate_over_proxy"] = behind["rate"] / own_proxy["rate"]
    if "guard" in args.only:
        milliseconds |= guard(folder, args)
    if "cold" in args.only:
        with pi_ray(folder, Part("cold", ("a0",)), 1, min_replicas=0, downscale_to_zero_delay_s=1) as url:
            _wait_for(lambda: not _replicas())
            seconds, _ = _timed(url, [("a0", queries(1)[0])], args.tokens, 1)
        print(
            f"  cold start: {seconds:.1f} s from a request to a server without a replica until its answer ends",
            flush=True,
        )
    return found, milliseconds


def main() -> None:
    args = _arguments()
    header(
        f"serving {args.model}, {args.requests} requests of {args.tokens} tokens at "
        f"{', '.join(map(str, args.concurrency))} at once, against transformers serve"
    )
    with tempfile.TemporaryDirectory() as temporary:
        try:
            found, milliseconds = run((args.folder or Path(temporary)).resolve(), args)
        except FailedError as error:
            raise SystemExit(str(error)) from None
    if args.out:
        args.out.write_text(json.dumps([asdict(level) for level in found], indent=1) + "\n")
    last_line(**figures(found, milliseconds))


if __name__ == "__main__":
    main()
