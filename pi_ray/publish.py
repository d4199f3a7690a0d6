"""Publish: the run's best adapter -> the next version in the adapter store, with hashes and a model card.

    store/<name>/v0001/   adapter_model.safetensors, adapter_config.json, pi_ray.json, README.md, manifest.json
    store/<name>/latest.json
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pi_ray.artifact import digest, seal, staged, verify, write_atomic
from pi_ray.config import RunConfig
from pi_ray.errors import AdapterError, CorruptArtifactError
from pi_ray.models import PACKAGED
from pi_ray.rundir import RunDir
from pi_ray.serving.adapters import NAME, VERSION
from pi_ray.serving.completion import base_name
from pi_ray.serving.verify import CARD, CONFIG, WEIGHTS, check, read_json

COLUMNS = {"base": "base, query alone", "base_full_prompt": "base, full prompt", "plain": "plain fine-tuning, query alone", "promptintern": "this adapter, query alone"}


def publish(run: RunDir, config: RunConfig, name: str = "") -> Path:
    """The version folder in the store. An adapter that is there already is not copied again, only made the latest.

    Raises AdapterError (bad name, nothing trained, not servable) or CorruptArtifactError (the trained adapter was changed on disk).
    """
    name = name or config.name
    if not NAME.fullmatch(name):
        raise AdapterError(f"'{name}' cannot name an adapter; take 1 to 64 of a-z, 0-9, '.', '_' and '-', starting with a letter or digit")
    if not run.best.is_dir():
        raise AdapterError(f"{run.best}: no trained adapter; 'pi-ray train' makes one")
    source = run.best.resolve()
    files = verify(source)["files"]
    missing = {WEIGHTS, CONFIG, CARD} - set(files)
    if missing:
        raise AdapterError(f"{source}: {', '.join(sorted(missing))} missing; train again")
    fingerprint = digest({file: files[file]["sha256"] for file in (WEIGHTS, CONFIG, CARD)})
    folder = Path(config.store) / name
    with _locked(folder):
        version = _existing(folder, fingerprint) or _add(folder, source, fingerprint, run, name)
        write_atomic(folder / "latest.json", json.dumps({"version": version}) + "\n")
    return folder / version


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One publisher at a time, so that two do not take the same version number. The lock goes with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _versions(folder: Path) -> list[str]:
    return sorted((p.name for p in folder.iterdir() if VERSION.fullmatch(p.name)), key=lambda v: int(v[1:]))


def _existing(folder: Path, fingerprint: str) -> str:
    """The version that holds this adapter undamaged, or ""."""
    for version in reversed(_versions(folder)):
        try:
            if verify(folder / version).get("fingerprint") == fingerprint:
                return version
        except CorruptArtifactError:
            continue  # left for its owner to look at; serving refuses it
    return ""


def _add(folder: Path, source: Path, fingerprint: str, run: RunDir, name: str) -> str:
    """Check, copy, describe and check again, and only then give the folder its name."""
    check(source)
    version = f"v{int(next(iter(reversed(_versions(folder))), 'v0')[1:]) + 1:04d}"
    with staged(folder / version, fingerprint=fingerprint, adapter=name, version=version) as tmp:
        card = read_json(source / CARD)
        shutil.copyfile(source / WEIGHTS, tmp / WEIGHTS)
        shutil.copyfile(source / CARD, tmp / CARD)
        config = {**read_json(source / CONFIG), "base_model_name_or_path": _public_base(card["base"])}
        write_atomic(tmp / CONFIG, json.dumps(config, indent=1, sort_keys=True) + "\n")
        write_atomic(tmp / "README.md", model_card(name, version, card, config, _scores(run)))
        seal(tmp)  # `check` reads the manifest; leaving `staged` writes it again, with its facts
        check(tmp)
    return version


def _public_base(base: str) -> str:
    """The name by which others find the base model: training may have written the path of a cache folder instead."""
    return PACKAGED[base][2] if base in PACKAGED else base_name(base)


def _scores(run: RunDir) -> dict[str, Any]:
    try:
        return read_json(run.evaluation / "summary.json")
    except FileNotFoundError:
        return {}


def model_card(name: str, version: str, card: dict[str, Any], config: dict[str, Any], scores: dict[str, Any]) -> str:
    """README.md in Markdown, with the front matter that model hubs read."""
    full, own = card["full_prompt_tokens"], card["query_prompt_tokens"]
    sent = "the query alone" if not card["template"] else f"the query after a template compressed to rate {card.get('rate', 0):g} (the server adds it)"
    return f"""---
library_name: peft
base_model: {json.dumps(config["base_model_name_or_path"])}
tags: [lora, pi-ray, prompt-internalization]
---

# {name} {version}

A LoRA adapter (rank {config["r"]}) that has taken in the prompt of the task `{card.get("task", "")}`: its template and examples need not be sent any more.
Trained by pi-ray (PromptIntern) in the run `{card.get("run", "")}`, phase {card.get("phase", "")}.

| | mean input tokens per query |
|---|---|
| full prompt (template, examples, query) | {full:,.0f} |
| this adapter | {own:,.0f} |

## Prompt

Send {sent}, as one user message. Format: `chat: {card["prompt"].get("chat", "model")}`, query worded as `{json.dumps(card["prompt"].get("query", "{query}"))[1:-1]}`.
Decoding is greedy unless the request says otherwise. Answers were at most {card["max_answer_tokens"]} tokens long in training.

## Scores on held-out rows

{_score_table(scores)}

## Serve

    pi-ray serve run.yaml

    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{{"model": "{name}", "messages": [{{"role": "user", "content": "YOUR QUERY"}}]}}'

```python
from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
print(client.chat.completions.create(model="{name}", messages=[{{"role": "user", "content": "YOUR QUERY"}}]).choices[0].message.content)
```

`{name}@{version}` asks for this version even after a newer one is published.

## Licence

The adapter adds to weights of the base model, whose licence applies to its use. What it learned comes from the task's template and rows, whose owner decides who may have it:
an internalised prompt can be drawn out again, so treat the adapter as you would treat the prompt.
"""


def _score_table(scores: dict[str, Any]) -> str:
    rows = [(label, scores[key]) for key, label in COLUMNS.items() if isinstance(scores.get(key), dict)]
    if not rows:
        return "Not evaluated before it was published."
    lines = [f"| {label} | {_number(s, 'exact_match', '.1%')} | {_number(s, 'bleu', '.1f')} | {_number(s, 'input_tokens', ',.0f')} | {_number(s, 'latency_s', '.2f')} |" for label, s in rows]
    return "\n".join(["| | exact match | BLEU | input tokens | latency (s) |", "|---|---|---|---|---|", *lines])


def _number(scores: dict[str, Any], key: str, form: str) -> str:
    value = scores.get(key)
    return format(value, form) if isinstance(value, int | float) else "–"
