"""Answers from a service that has the models: tuned ones with the prompt of the last phase, and the base model."""

import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from statistics import fmean, median
from typing import Any
from urllib.parse import urlsplit

from pi_ray import __version__, hosted
from pi_ray.config import RunConfig
from pi_ray.evaluate.columns import AnswerLengths, Answers, Column, RowWatch
from pi_ray.hosted.client import OPENAI, PARALLEL, replies, unpaid_places
from pi_ray.hosted.price import confirm_cost, is_confirmed
from pi_ray.models import load_tokenizer
from pi_ray.prompt import PromptEncoder, render_prompt
from pi_ray.run.artifact import digest
from pi_ray.run.directory import RunDir
from pi_ray.run.fingerprint import metric_fingerprints
from pi_ray.run.phases import ColumnPrompt


class HostedAnswerer:
    """The answerer of a run whose models a service has. Answers that are there already are not asked for again.

    The cost of the others is confirmed here, unless that was done before the models were tuned.
    """

    def __init__(
        self, config: RunConfig, confirm: Callable[[str], bool] = hosted.ask_on_terminal,
        wait: Callable[[float], None] = time.sleep,
    ):
        self.config, self.run, self.model = config, RunDir(config.root), config.closed.model
        self.confirm, self.wait = confirm, wait

    def fingerprint(self, columns: Sequence[Column]) -> str:
        """Raises TrainingError where nothing was prepared."""
        asked = [(c.name, c.adapter or self.model, c.template, c.shots) for c in columns]
        settings = self.config.evaluate.model_dump(mode="json")
        prepared, metrics = self.run.prepared_fingerprint(), metric_fingerprints(self.config)
        return digest([self.config.closed.base_url, asked, prepared, settings, *metrics])

    def answer(self, columns: Sequence[Column], lengths: AnswerLengths, watch: RowWatch) -> dict[str, Answers]:
        """Raises TrainingError when the cost is declined or the service cannot be reached."""
        config, split = self.config, self.config.evaluate.split
        encoder = PromptEncoder(load_tokenizer(config.model), config.prompt)
        bank, answers, sent_of = {r.id: r for r in self.run.read_rows("train")}, {}, {}
        for c in columns:
            shots, rows = self.run.read_shots(split, bank, c.shots), self.run.read_rows(split, c.rate)
            asked = [render_prompt(config.prompt, r.query, c.template, shots.get(r.id, ()), r.documents) for r in rows]
            sent_of[c.name] = shots, rows, asked
        missing = partial(unpaid_places, config, limit=lengths.limit)
        unpaid = [c for c in columns if missing(c.adapter or self.model, sent_of[c.name][2])]
        if unpaid and not (is_confirmed(config) and any(c.adapter for c in columns)):
            prompts = [ColumnPrompt(c.template, c.shots, c.rate) for c in unpaid]
            confirm_cost(config, (), prompts, lambda sentence: None, self.confirm)
        for c in columns:
            shots, rows, asked = sent_of[c.name]
            found = replies(config, c.adapter or self.model, asked, lengths.limit, partial(watch, c.name), self.wait)
            # the tokenizer's counts give the share of the prefix, and stand in where the service counts nothing
            prefix = len(encoder.prefix(c.template))
            counts = [prefix + len(encoder.row(r.query, shots.get(r.id, ()), r.documents)) for r in rows]
            sent = fmean(n if r.input_tokens is None else r.input_tokens for r, n in zip(found, counts, strict=True))
            output = (len(encoder.answer(r.text)) if r.output_tokens is None else r.output_tokens for r in found)
            answers[c.name] = Answers([r.text for r in found], {
                "input_tokens": sent,
                "output_tokens": fmean(output),
                "prefix_tokens": round(sent * prefix / fmean(counts)),
                "latency_s": median(r.seconds for r in found),
            })
        return answers

    def environment(self) -> dict[str, Any]:
        host = urlsplit(self.config.closed.base_url or OPENAI).hostname
        return {
            "versions": {"pi-ray": __version__, "python": platform.python_version(), "openai": version("openai")},
            "hardware": f"{host}, asked {PARALLEL} at a time",
        }

    def training_facts(self, config: RunConfig) -> dict[str, Any]:
        """The sums over the tuning jobs; "money" is the service's price for them."""
        phases = hosted.tuned_phases(config)
        total = {key: sum(phase.get(key, 0) for phase in phases) for key in ("updates", "seconds", "tokens")}
        return {**total, "workers": 1, "money": total["tokens"] * config.closed.train_price / 1e6}
