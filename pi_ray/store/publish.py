"""Publish: the run's best adapter -> the next version in the adapter store, with hashes, a model card, and what the drift guard needs.

    store/<name>/v0001/   adapter_model.safetensors, adapter_config.json, pi_ray.json, prompt.json, README.md, manifest.json
    store/<name>/latest.json
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from pi_ray.config import PromptConfig, RunConfig
from pi_ray.errors import AdapterError
from pi_ray.models import PACKAGED, base_name
from pi_ray.run.artifact import digest, seal, verify, write_atomic
from pi_ray.run.directory import RunDir
from pi_ray.store import prompt_guard
from pi_ray.store.adapters import NAME, AdapterStore
from pi_ray.store.aliases import LATEST
from pi_ray.store.verify import CARD, CONFIG, WEIGHTS, check, read_json

log = logging.getLogger(__name__)
COLUMNS = {"base": "base, query alone", "base_full_prompt": "base, full prompt", "plain": "plain fine-tuning, query alone", "promptintern": "this adapter, query alone"}


def publish(run: RunDir, config: RunConfig, name: str = "") -> Path:
    """The version's folder: in the store, or of a store behind a URL this machine's copy. An adapter that is there already is only made the latest.

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
    prompt = _prompt(run, read_json(source / CARD)) if config.serve.drift_guard else None
    if config.serve.drift_guard and not prompt:
        log.warning(
            "'%s' is published without %s: this run directory has no template that it was trained with, or one longer than %d characters, so clients that still send "
            "the prompt will not be recognised. Prepare, train and publish in one directory, or say with serve.drift_guard: false that this is wanted",
            name, prompt_guard.PROMPT, prompt_guard.MAX_TEMPLATE,
        )  # fmt: skip
    made_from = {file: files[file]["sha256"] for file in (WEIGHTS, CONFIG, CARD)}
    fingerprint = digest({**made_from, prompt_guard.PROMPT: digest(prompt)} if prompt else made_from)
    place = AdapterStore(config.store).place
    with place.lock(name):
        version = place.find(name, fingerprint) or _add(place, name, source, fingerprint, run, prompt)
        place.write(name, LATEST, json.dumps({"version": version}) + "\n")
    return place.version(name, version)


def _add(place: Any, name: str, source: Path, fingerprint: str, run: RunDir, prompt: dict[str, Any] | None) -> str:
    """Check, copy, describe and check again, and only then give the folder its name."""
    check(source)
    version = f"v{int(next(iter(reversed(place.versions(name))), 'v0')[1:]) + 1:04d}"
    with place.stage(name, version, fingerprint) as tmp:
        card = read_json(source / CARD)
        shutil.copyfile(source / WEIGHTS, tmp / WEIGHTS)
        shutil.copyfile(source / CARD, tmp / CARD)
        config = {**read_json(source / CONFIG), "base_model_name_or_path": _public_base(card["base"])}
        write_atomic(tmp / CONFIG, json.dumps(config, indent=1, sort_keys=True) + "\n")
        if prompt:
            write_atomic(tmp / prompt_guard.PROMPT, json.dumps(prompt, indent=1, ensure_ascii=False) + "\n")
        write_atomic(tmp / "README.md", model_card(name, version, card, config, _scores(run), bool(prompt)))
        seal(tmp)  # `check` reads the manifest; leaving `stage` writes it again, with its facts
        check(tmp)
    return version


def _prompt(run: RunDir, card: dict[str, Any]) -> dict[str, Any] | None:
    """prompt.json, from the run's templates and training rows; None where the run has another template now than the adapter was trained with, or one too long."""
    try:
        templates = json.loads((run.templates / "templates.json").read_bytes())
    except FileNotFoundError:
        return None
    full = next(t["text"] for t in templates if t["rate"] == 1)
    if card.get("full_template_sha256") not in {digest(t["text"]) for t in templates} or len(full) > prompt_guard.MAX_TEMPLATE:
        return None
    compressed = [{"rate": t["rate"], "achieved": t["achieved"], "text": t["text"]} for t in templates if 0 < t["rate"] < 1]
    form = PromptConfig(**card["prompt"]).example
    rows = run.read_rows("train") if (run.rows / "train.parquet").is_file() else []
    return prompt_guard.record(full, compressed, [prompt_guard.worded(form, row.query, row.answer) for row in rows])


def _public_base(base: str) -> str:
    """The name by which others find the base model: training may have written the path of a cache folder instead."""
    return PACKAGED[base][2] if base in PACKAGED else base_name(base)


def _scores(run: RunDir) -> dict[str, Any]:
    try:
        return read_json(run.evaluation / "summary.json")
    except FileNotFoundError:
        return {}


def model_card(name: str, version: str, card: dict[str, Any], config: dict[str, Any], scores: dict[str, Any], prompt: bool = False) -> str:
    """README.md in Markdown, with the front matter that model hubs read. `prompt`: whether prompt.json is published too."""
    guard = f"`{prompt_guard.PROMPT}` holds the template, so that a client which still sends it is recognised: the server takes it away." if prompt else ""
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
{guard}

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

`{name}@{version}` asks for this version, whichever one is released (`pi-ray release {name}`).

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
