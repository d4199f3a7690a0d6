"""Chat on the terminal with one adapter, without Ray: the engine runs in this process, on a server's ids."""

import asyncio
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import aclosing, closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

from pi_ray.config import RunConfig, run_file
from pi_ray.errors import AdapterError, ConfigError
from pi_ray.run.artifact import MANIFEST, digest_file
from pi_ray.run.directory import RunDir
from pi_ray.serve.engine.completion import Completer
from pi_ray.serve.engine.refusal import RefusedError
from pi_ray.serve.engine.request import CompletionRequest
from pi_ray.store.adapters import Adapter, AdapterStore
from pi_ray.store.verify import verify_adapter

HELP = "A line is one query, sent alone: no earlier one is remembered.  /quit or Ctrl-D ends, Ctrl-C stops an answer."


def resolve_target(target: str, overrides: Sequence[str]) -> tuple[RunConfig, Adapter]:
    """The adapter that `target` names: a run directory's best one, published or not, or one of the store.

    Raises AdapterError when it is neither, or fails verification.
    """
    run = Path(target)
    if (run / "run.yaml").is_file():
        config, best = run_file.load_run_file(run / "run.yaml", overrides), RunDir(run).best
        if not best.is_dir():
            raise AdapterError(f"{run}: no trained adapter; 'pi-ray train {run}' makes one")
        card = verify_adapter(best, config.model)
        return config, Adapter(config.name, best.name, best, digest_file(best / MANIFEST), card)
    config = run_file.parse_run_file("name: chat", "chat", overrides)
    store = AdapterStore(config.store)
    if target.partition("@")[0] not in store.names():
        known = f"where there are: {', '.join(store.names()) or 'none yet'}. Another store: store=FOLDER"
        raise AdapterError(f"'{target}' is neither a run directory nor an adapter in {config.store}, {known}")
    card = store.open(target).card
    config = config.replace(**{"model.base": card["base"], "model.revision": card.get("revision", "")})
    return config, AdapterStore(config.store, config.model).open(target)


def chat(target: str, overrides: Sequence[str], out: TextIO | None = None) -> None:
    """Load the adapter and its base model, then answer line after line of stdin until it ends."""
    from pi_ray.models import context_length, load_tokenizer
    from pi_ray.registry import engines

    out = out or sys.stdout
    config, adapter = resolve_target(target, overrides)
    if hasattr(engines[config.serve.engine], "deployment"):
        cure = "to chat, add serve.engine=transformers"
        raise ConfigError(f"serve.engine {config.serve.engine} runs on a Ray cluster only; {cure}")
    with closing(engines[config.serve.engine](config.model, config.serve)) as engine:
        store = SimpleNamespace(open=lambda spec, sticky_key: adapter, cold_version=lambda spec, sticky_key: "")
        completer = Completer(config, engine, load_tokenizer(config.model), context_length(config.model), store)
        terminal = sys.stdin.isatty()
        print(f"{adapter.name}@{adapter.version} on {config.model.base}.  {HELP}\n", file=out, flush=True)
        answer_queries(completer, adapter.name, _read_queries(terminal), out, terminal)


def answer_queries(completer: Completer, name: str, queries: Iterator[str], out: TextIO, styled: bool = False) -> None:
    """Answer each query as it comes. A refusal is printed, and the next query is read."""
    dim, plain = ("\033[2m", "\033[0m") if styled else ("", "")
    with asyncio.Runner() as runner:
        for query in queries:
            try:
                note = runner.run(_answer(completer, CompletionRequest(name, query), out))
            except RefusedError as error:
                note = error.message
            except KeyboardInterrupt:
                note = "stopped"
            print(f"\n{dim}[{note}]{plain}\n", file=out, flush=True)


async def _answer(completer: Completer, request: CompletionRequest, out: TextIO) -> str:
    """Write the answer as it is generated -> its token counts and time, in words."""
    began = time.monotonic()
    start: dict[str, Any] = {}
    async with aclosing(completer.complete(request)) as events:
        async for event in events:
            if "fingerprint" in event:
                start = event
            elif "text" in event:
                print(event["text"], end="", file=out, flush=True)
            else:
                generated = event["completion_tokens"]
    spent = (time.monotonic() - began) * 1000
    return f"{start['prompt_tokens']} tokens in, {generated} out, {start['saved']} saved, {spent:.0f} ms"


def _read_queries(terminal: bool) -> Iterator[str]:
    """The lines of stdin that are to be answered: commands are obeyed here, empty lines skipped.

    A terminal has line editing and the history of this chat, which is kept in no file.
    """
    if terminal:
        import readline

        readline.set_auto_history(True)
    while True:
        try:
            line = input("> " if terminal else "")
        except EOFError:
            print(end="\n" if terminal else "")
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            print()
            continue
        if line.strip() == "/quit":
            return
        if line.strip() == "/help":
            print(HELP, flush=True)
        elif line.strip():
            yield line
