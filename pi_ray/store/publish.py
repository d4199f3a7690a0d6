"""Publish: the run's best adapter -> the next version in the adapter store, with hashes and a model card."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from pi_ray.config import PromptConfig, RunConfig
from pi_ray.conversation import content_text, load_messages
from pi_ray.errors import AdapterError
from pi_ray.evaluate.knowledge import KNOWLEDGE_FILE, read_knowledge
from pi_ray.metrics.names import metric_in_sentence
from pi_ray.models import base_name
from pi_ray.models.base_files import PACKAGED
from pi_ray.prompt import format_example
from pi_ray.run.answered import reference_teacher
from pi_ray.run.artifact import MANIFEST_HASH, digest, seal_folder, verify_artifact, write_atomic
from pi_ray.run.directory import CARD_FILE, RunDir
from pi_ray.store.adapters import NAME, AdapterStore
from pi_ray.store.local import LATEST_FILE, LocalStore
from pi_ray.store.prompt_guard import MAX_TEMPLATE, PROMPT_FILE, prompt_record
from pi_ray.store.remote import RemoteStore
from pi_ray.store.varying_values import find_value_names
from pi_ray.store.verify import CONFIG_FILE, MAX_JSON_BYTES, WEIGHTS_FILE, read_json, verify_adapter

log = logging.getLogger(__name__)
COLUMNS = {
    "base": "base, query alone", "base_full_prompt": "base, full prompt", "plain": "plain fine-tuning, query alone",
    "promptintern": "this adapter",
}


def publish_adapter(run: RunDir, config: RunConfig, name: str = "") -> Path:
    """The version's folder in the store, or this machine's copy of one behind a URL.

    An adapter that is published already, with what it knows, only becomes the latest. Raises AdapterError (bad name,
    nothing trained, not servable) or CorruptArtifactError (the trained adapter was changed on disk).
    """
    name = name or config.name
    if not NAME.fullmatch(name):
        allowed = "1 to 64 of a-z, 0-9, '.', '_' and '-', starting with a letter or digit"
        raise AdapterError(f"'{name}' cannot name an adapter; take {allowed}")
    if not run.best.is_dir():
        raise AdapterError(f"{run.root}: no trained adapter; 'pi-ray train' makes one")
    source = run.best
    manifest = verify_artifact(source)
    files = manifest["files"]
    if missing := {WEIGHTS_FILE, CONFIG_FILE, CARD_FILE} - set(files):
        raise AdapterError(f"{source}: {', '.join(sorted(missing))} missing; train again")
    prompt = _prompt_record(run, read_json(source / CARD_FILE)) if config.serve.drift_guard else None
    if config.serve.drift_guard and not prompt:
        why = f"this run directory has no template that it was trained with, or one above {MAX_TEMPLATE} characters"
        effect = "clients that still send the prompt will not be recognised"
        cure = "Prepare, train and publish in one directory, or say with serve.drift_guard: false that this is wanted"
        log.warning("'%s' is published without %s: %s, so %s. %s", name, PROMPT_FILE, why, effect, cure)
    quotes = config.serve.knows and config.serve.drift_guard  # knows.json quotes the template
    knowledge = _knowledge(run, manifest.get(MANIFEST_HASH, "")) if quotes else ""
    hashes = {file: files[file]["sha256"] for file in (WEIGHTS_FILE, CONFIG_FILE, CARD_FILE)}
    hashes |= {PROMPT_FILE: digest(prompt)} if prompt else {}
    fingerprint = digest(hashes | ({KNOWLEDGE_FILE: digest(knowledge)} if knowledge else {}))
    backend = AdapterStore(config.store).backend
    with backend.lock(name):
        same = backend.find_version(name, fingerprint)
        version = same or _add(backend, name, source, fingerprint, _scores(run, manifest), prompt, knowledge)
        backend.write(name, LATEST_FILE, json.dumps({"version": version}) + "\n")
    if read_json(source / CONFIG_FILE).get("target_parameters"):
        log.warning("'%s' adapts experts: serve it alone with serve.merge=%s, or export it --to merged", name, name)
    folder = backend.version_folder(name, version)
    if folder is None:
        raise AdapterError(f"{config.store}: '{name}@{version}' was removed while it was published")
    return folder


def _add(
    backend: LocalStore | RemoteStore, name: str, source: Path, fingerprint: str, scores: dict[str, Any],
    prompt: dict[str, Any] | None, knowledge: str,
) -> str:
    """Add the next version: check, copy, describe and check again, and only then give the folder its name."""
    card = verify_adapter(source)
    base = card["base"]  # training may have written the path of a cache folder instead of the model's public name
    config = read_json(source / CONFIG_FILE)
    config["base_model_name_or_path"] = PACKAGED[base].hub_id if base in PACKAGED else base_name(base)
    version = f"v{int(next(reversed(backend.versions(name)), 'v0')[1:]) + 1:04d}"
    with backend.stage_version(name, version, fingerprint) as tmp:
        shutil.copyfile(source / WEIGHTS_FILE, tmp / WEIGHTS_FILE)
        shutil.copyfile(source / CARD_FILE, tmp / CARD_FILE)
        write_atomic(tmp / CONFIG_FILE, json.dumps(config, indent=1, sort_keys=True) + "\n")
        if prompt:
            write_atomic(tmp / PROMPT_FILE, json.dumps(prompt, indent=1, ensure_ascii=False) + "\n")
        if knowledge:
            write_atomic(tmp / KNOWLEDGE_FILE, knowledge)
        write_atomic(tmp / "README.md", model_card(name, version, card, config, scores, bool(prompt)))
        seal_folder(tmp)  # verification reads the manifest; leaving `stage_version` writes it again, with its facts
        verify_adapter(tmp)
    return version


def _scores(run: RunDir, manifest: dict[str, Any]) -> dict[str, Any]:
    """The summary of the run's evaluation; nothing where it measured another adapter than that with this manifest."""
    summary = run.evaluation / "summary.json"
    scores, adapter = read_json(summary) if summary.is_file() else {}, manifest.get(MANIFEST_HASH, "")
    return scores if scores.get("adapter_sha256", adapter) == adapter else {}


def _prompt_record(run: RunDir, card: dict[str, Any]) -> dict[str, Any] | None:
    """prompt.json, from templates and rows; None where the template is too long or not the adapter's own."""
    try:
        templates = json.loads((run.templates / "templates.json").read_bytes())
    except FileNotFoundError:
        return None
    full = next(t["text"] for t in templates if t["rate"] == 1)
    if card.get("full_template_sha256") not in {digest(t["text"]) for t in templates} or len(full) > MAX_TEMPLATE:
        return None
    compressed = [{k: t[k] for k in ("rate", "achieved", "text")} for t in templates if 0 < t["rate"] < 1]
    wording = PromptConfig(**card["prompt"])
    rows = run.read_rows("train") if (run.rows / "train.parquet").is_file() else []
    examples = [] if wording.conversation else [format_example(wording.example, r.query, r.answer) for r in rows]
    begins = [content_text(load_messages(row.query)[0]["content"]) for row in rows]
    return prompt_record(full, compressed, examples, find_value_names(full, begins))


def _knowledge(run: RunDir, adapter: str) -> str:
    """knows.json of the run's evaluation; "" where it asked another adapter than that with this manifest hash."""
    found = read_knowledge(run.evaluation)
    text = found.model_dump_json(indent=1) + "\n" if found and found.adapter_sha256 == adapter else ""
    if len(text.encode()) > MAX_JSON_BYTES:
        log.warning("%s is larger than %s bytes and is not published", KNOWLEDGE_FILE, MAX_JSON_BYTES)
        return ""
    return text


def model_card(
    name: str, version: str, card: dict[str, Any], config: dict[str, Any], scores: dict[str, Any], prompt: bool,
) -> str:
    """README.md, with the front matter that model hubs read. `prompt`: whether prompt.json is published."""
    import jinja2

    template = (Path(__file__).parent / "model_card.md.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(template).render(
        name=name, version=version, card=card, config=config, prompt_file=PROMPT_FILE if prompt else "",
        base=json.dumps(config["base_model_name_or_path"]), rate=f"{card.get('rate', 0):g}",
        wording=json.dumps(card["prompt"].get("query", "{query}"))[1:-1],
        teacher=reference_teacher(scores).get("teacher", ""),
        verdict=scores.get("floor", {}).get("sentence", ""),
        columns=[(label, scores[key]) for key, label in COLUMNS.items() if isinstance(scores.get(key), dict)],
        metrics=[(metric, metric_in_sentence(metric)) for metric in scores.get("metrics", ("exact_match", "bleu"))],
    )
