"""Verbs of published adapters: serving, chat, which version answers, keys of clients."""

import argparse

from pi_ray.cli.verbs import OVERRIDES, RUN, argument, load_config, verb


@verb("serve the store's adapters behind an OpenAI-compatible API", RUN, OVERRIDES)
def serve(args: argparse.Namespace) -> None:
    from pi_ray.serve import app

    app.run_server(load_config(args))


@verb(
    "choose the version that answers: for all, for a share of requests, or roll back",
    argument("name", metavar="NAME", help="the adapter"),
    argument("--version", default="", help="such as v0003, or latest"),
    argument("--canary", default="", metavar="PERCENT", help="only for this share of the requests; "
        "without --version: of the present canary, else of the newest"),
    argument("--rollback", action="store_true", help="end the canary; without one, go back to the previous version"),
    argument("--alias", default="prod", help="alias to set, which clients ask for as NAME@ALIAS; "
        "default: %(default)s, which NAME alone means"),
    argument("--store", default="store", help="folder or URL; default: store under the current folder"),
)
def release(args: argparse.Namespace) -> None:
    """Choose which version of an adapter answers. Without options: print which one does.

      pi-ray release NAME --version v0003      every request
      pi-ray release NAME --canary 10          a canary for 10% of the requests
      pi-ray release NAME --rollback           end the canary, or go back to the previous version
    """
    from pi_ray.store import release as step
    from pi_ray.store.adapters import AdapterStore

    store = AdapterStore(args.store)
    canary = step.parse_percent(args.canary) if args.canary else None
    aliases = step.release_version(store, args.name, args.version, canary, args.rollback, args.alias)
    step.print_aliases(store, args.name, aliases, lambda line: args.console.print(line, markup=False))


def positive(text: str) -> int:
    """An argument that must be a number from 1 on; argparse names this function where it is not."""
    if (value := int(text)) < 1:
        raise ValueError
    return value


@verb(
    "write an adapter for other tools: peft, vLLM, transformers, llama.cpp, Ollama, mlx-lm",
    argument("name", metavar="NAME", help="the adapter: NAME, NAME@VERSION or NAME@ALIAS"),
    argument("--to", default="merged", metavar="KIND",
             help="peft, vllm, merged, gguf, ollama or mlx; default: %(default)s"),
    argument("--out", default="", metavar="FOLDER", help="default: NAME-KIND under the current folder"),
    argument("--no-check", action="store_true", help="do not load the result and compare its logits, which takes the "
        "memory of the base model twice"),
    argument("--store", default="store", help="folder or URL; default: store under the current folder"),
)
def export(args: argparse.Namespace) -> None:
    """Write a published adapter for other tools.

      pi-ray export NAME --to peft      for peft and LoRAX, beside the base model that they have
      pi-ray export NAME --to vllm      the same, and the command that serves it
      pi-ray export NAME --to merged    a model of its own in the transformers layout, file by file
      pi-ray export NAME --to gguf      the adapter alone for llama.cpp
      pi-ray export NAME --to ollama    a Modelfile, with the text around a request, and the weights
      pi-ray export NAME --to mlx       the adapter alone for mlx-lm
    """
    from pathlib import Path

    from pi_ray.store.adapters import AdapterStore
    from pi_ray.store.export import export_adapter

    adapter = AdapterStore(args.store).open(args.name)
    folder = Path(args.out or f"{adapter.name}-{args.to}")
    export_adapter(adapter, args.to, folder, lambda line: args.console.print(line, markup=False), not args.no_check)
    args.console.print(f"[bold]Exported[/]  {folder}; its README.md says what to send", highlight=False)


@verb(
    "make an API key for a client of the server",
    argument("name", metavar="NAME", help="whose key it is"),
    argument("--adapters", nargs="+", default=[], metavar="ADAPTER", help="adapters that it may use; default: all"),
    argument("--rpm", type=positive, metavar="N", help="requests that it may send a minute; default: any number"),
    argument("--tpm", type=positive, metavar="N", help="tokens that its requests may take a minute, with answers"),
    argument("--monthly-tokens", type=positive, metavar="N", help="tokens a month (UTC); needs serve.usage_dir"),
    argument("--full-prompt", action="store_true", help="it may ask for pi_ray.full_prompt, which shows templates"),
)
def key(args: argparse.Namespace) -> None:
    """Make an API key (a bearer token): print it once, and the line with its hash for the file serve.keys_file."""
    from pi_ray.serve.http import keys

    made = keys.new_key()
    print(f"the key, shown this once:\n  {made}\nits line for the file that serve.keys_file names:")
    limits = args.rpm, args.tpm, args.monthly_tokens
    print(f"  {keys.keys_file_line(made, args.name, args.adapters, args.full_prompt, *limits)}")


@verb(
    "try an adapter on the terminal, without a server",
    argument("adapter", metavar="RUN_OR_ADAPTER", help="a run directory, or an adapter's name in the store"),
    OVERRIDES,
)
def chat(args: argparse.Namespace) -> None:
    """Answer queries from the terminal with an adapter, in this process; shows tokens and milliseconds of each."""
    from pi_ray.serve.chat import chat as chat_on_terminal

    chat_on_terminal(args.adapter, args.overrides)
