"""A conversation on the terminal with one adapter, without Ray: the engine runs in this process and sees what the server's would see."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, closing
from pathlib import Path
from typing import Any, TextIO

from pi_ray.config import RunConfig, run_file
from pi_ray.errors import AdapterError, ConfigError
from pi_ray.serve.engine.completion import Ask, Completer, RefusedError
from pi_ray.store.adapters import NAME, Adapter, AdapterStore
from pi_ray.store.verify import check

HELP = "Each line is one query, sent alone: earlier ones are not remembered.  /quit or Ctrl-D ends, Ctrl-C stops an answer."


class Trained:
    """A store of one: the best adapter of a run, published or not."""

    def __init__(self, run: Path, config: RunConfig):
        if not (run / "adapters" / "best").is_dir():
            raise AdapterError(f"{run}: no trained adapter; 'pi-ray train {run}' makes one")
        best = (run / "adapters" / "best").resolve()
        self._adapter = Adapter(config.name, best.name, best, check(best, config.model))

    def open(self, spec: str, ticket: str = "") -> Adapter:
        return self._adapter


def find(target: str, overrides: Sequence[str]) -> tuple[RunConfig, str, Any]:
    """What `target` stands for, a run directory or an adapter's name: (config, the adapter's name, the store that has it).

    Raises AdapterError when it is neither, or fails verification.
    """
    run = Path(target)
    if (run / "run.yaml").is_file():
        config = run_file.load(run / "run.yaml", overrides)
        return config, config.name, Trained(run, config)
    config = run_file.parse("name: chat", "chat", overrides)
    store = AdapterStore(config.store)
    if not NAME.fullmatch(target.partition("@")[0]) or target.partition("@")[0] not in store.names():
        known = ", ".join(store.names()) or "none yet"
        raise AdapterError(f"'{target}' is neither a run directory nor an adapter in {config.store}, where there are: {known}. Another store: store=FOLDER")
    card = store.open(target).card
    config = config.replace(**{"model.base": card["base"], "model.revision": card.get("revision", "")})
    return config, target, AdapterStore(config.store, config.model)


def chat(target: str, overrides: Sequence[str], out: TextIO | None = None) -> None:
    """Load the adapter and its base model, then answer line after line of stdin until it ends."""
    from pi_ray.models import context_length, load_tokenizer
    from pi_ray.registry import engines

    out = out or sys.stdout
    config, name, store = find(target, overrides)
    if hasattr(engines[config.serve.engine], "deployment"):
        raise ConfigError(f"serve.engine {config.serve.engine} runs on a Ray cluster only; to chat, add serve.engine=transformers")
    with closing(engines[config.serve.engine](config.model, config.serve)) as engine:
        completer = Completer(config, engine, load_tokenizer(config.model), context_length(config.model))
        completer.store = store
        terminal = sys.stdin.isatty()
        print(f"{name} on {config.model.base}.  {HELP}\n", file=out, flush=True)
        talk(completer, name, _typed() if terminal else _lines(sys.stdin), out, terminal)


def talk(completer: Completer, name: str, queries: Iterator[str], out: TextIO, styled: bool = False) -> None:
    """Answer each query as it comes. What cannot be answered is said, and the next one is read."""
    dim, plain = ("\033[2m", "\033[0m") if styled else ("", "")
    with asyncio.Runner() as runner:
        for query in queries:
            try:
                said = runner.run(_answer(completer, Ask(name, query), out))
            except RefusedError as error:
                said = error.message
            except KeyboardInterrupt:
                said = "stopped"
            print(f"\n{dim}[{said}]{plain}\n", file=out, flush=True)


async def _answer(completer: Completer, ask: Ask, out: TextIO) -> str:
    """Write the answer as it is generated; what it took comes back."""
    began = time.monotonic()
    start: dict[str, Any] = {}
    events: AsyncIterator[dict[str, Any]] = completer.complete(ask)
    async with aclosing(events):
        async for event in events:
            if "fingerprint" in event:
                start = event
            elif "text" in event:
                print(event["text"], end="", file=out, flush=True)
            else:
                made = event["completion_tokens"]
    spent = (time.monotonic() - began) * 1000
    return f"{start['prompt_tokens']} tokens in, {made} out, {start['saved']} saved, {spent:.0f} ms"


def _typed() -> Iterator[str]:
    """Queries from a person, with line editing and the history of this conversation. It is kept in no file."""
    import readline

    readline.set_auto_history(True)

    def lines() -> Iterator[str]:
        while True:
            try:
                yield input("> ")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()

    return _queries(lines())


def _lines(stream: TextIO) -> Iterator[str]:
    return _queries(line.rstrip("\n") for line in stream)


def _queries(lines: Iterator[str]) -> Iterator[str]:
    """What is to be answered: commands are obeyed here, empty lines skipped."""
    for line in lines:
        word = line.strip()
        if word == "/quit":
            return
        if word == "/help":
            print(HELP, flush=True)
        elif word:
            yield line
