"""The template at each rate of the schedule, paper equation 2: actors compress (text, rate) pairs side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from pi_ray.cluster import placement, session, storage_sync
from pi_ray.compress.rate_control import CompressedTemplate
from pi_ray.compress.template import TemplatePart, cached_template, combine_parts, compress_template, split_template
from pi_ray.config import RunConfig
from pi_ray.data.ray_map import fan_out
from pi_ray.models import load_tokenizer
from pi_ray.prompt import Template
from pi_ray.run.artifact import staged
from pi_ray.run.directory import RunDir, rate_name
from pi_ray.run.phases import distinct_rates

MAX_THREADS = 4  # of an actor: more make a small model no faster


class CompressParts:
    """Inside an actor: compresses any of `parts`, each compressor's model loaded once."""

    def __init__(self, config: RunConfig, parts: list[TemplatePart], threads: int):
        import torch

        torch.set_num_threads(threads)
        self.parts, self.tokenizer = parts, load_tokenizer(config.model)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        part = self.parts[item["part"]]
        return asdict(compress_template(part.template, part.rate, self.tokenizer, part.config))


def compress_templates(
    config: RunConfig, template: Template, tokenizer: Any, run: RunDir, fingerprint: str,
    progress: Callable[[str], None],
) -> None:
    """Write the artifact templates/: templates.json and one readable file for each rate. Cached parts need no actor."""
    parts = {rate: split_template(template, rate, config.compress) for rate in distinct_rates(config)}
    made: list[tuple[TemplatePart, CompressedTemplate]] = []
    missing: list[TemplatePart] = []
    for part in (part for some in parts.values() for part in some):
        cached = cached_template(part.template, part.rate, tokenizer, part.config)
        if cached is not None:
            made.append((part, cached))
        elif part not in missing:
            missing.append(part)
    made += zip(missing, _compress(config, missing, run), strict=True)
    entries = []
    with staged(run.templates, fingerprint=fingerprint) as folder:
        for rate, some in parts.items():
            found = [next(c for p, c in made if p == part) for part in some]
            result = combine_parts(template, tokenizer, some, found)
            file = f"rate-{rate_name(rate)}.txt"
            entries.append({"rate": rate, "compressor": config.compress.label, "file": file, **asdict(result)})
            (folder / file).write_text(result.text + "\n", encoding="utf-8")
            note = f"; {result.note}" if result.note else ""
            achieved = f"achieved {result.achieved:.2f} ({result.tokens} of {result.full_tokens} tokens)"
            progress(f"templates: rate {rate:g} -> {achieved}{note}")
        text = json.dumps(entries, indent=1, ensure_ascii=False) + "\n"
        (folder / "templates.json").write_text(text, encoding="utf-8")


def _compress(config: RunConfig, parts: list[TemplatePart], run: RunDir) -> list[CompressedTemplate]:
    """Compress each part in an actor of its own, as far as CPUs allow; nothing else runs in this step."""
    if not parts:
        return []
    session.connect()
    cpus = [int(node.get("CPU", 0)) for node in placement.cluster_nodes()]
    threads = max(1, min(MAX_THREADS, sum(cpus) // len(parts), max(cpus)))
    options: dict[str, Any] = {"num_cpus": threads, **placement.worker_options(config, "prepare")}
    options |= {"actors": len(parts), "sync": storage_sync.sync_for(run.root)}
    items = [{"part": i} for i in range(len(parts))]
    found = fan_out(items, CompressParts, config, parts, max(1, int(options["num_cpus"])), **options)
    return [CompressedTemplate(**result) for result in found]
