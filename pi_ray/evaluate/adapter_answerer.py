"""Answers from adapters on this cluster: generated in batches, timed one by one, probed for forgetting and leaks."""

import platform
import re
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import joblib
import torch

from pi_ray import __version__
from pi_ray.config import RunConfig
from pi_ray.evaluate.columns import AnswerLengths, Answers, Column, RowWatch
from pi_ray.evaluate.generation_workers import column_prompts, median_latencies, resume_work, work_item
from pi_ray.evaluate.knowledge import Knowledge
from pi_ray.evaluate.unit_questions import plan_questions
from pi_ray.models import base_digest, load_tokenizer
from pi_ray.models.device import best_device
from pi_ray.prompt import PromptEncoder
from pi_ray.run.artifact import read_manifest, verify_artifact
from pi_ray.run.directory import RunDir
from pi_ray.run.fingerprint import evaluate_fingerprint
from pi_ray.train.lora import PACKAGES
from pi_ray.train.row_chains import chain_batches
from pi_ray.train.train_log import read_entries

QUESTIONS = "questions about units"  # beside the columns: what the trained one is asked of its prompt


class AdapterAnswerer:
    """The answerer of a run whose adapters lie in its directory. `model` is the base model's name in the summary."""

    def __init__(self, config: RunConfig):
        self.config, self.run, self.model = config, RunDir(config.root), config.model.base

    def fingerprint(self, columns: Sequence[Column]) -> str:
        """Hash all that answers and their evaluation depend on. Raises CorruptArtifactError for a damaged adapter."""
        prepared = self.run.prepared_fingerprint()
        found = [(c.name, verify_artifact(Path(c.adapter))["fingerprint"] if c.adapter else prepared) for c in columns]
        found.append(("the base", base_digest(self.config.model)))
        if self.config.schedule.floor or self.config.training_metric:  # all phases' adapters have the same fingerprint
            found += [(c.name, Path(c.adapter).name) for c in columns if c.adapter]
        return evaluate_fingerprint(self.config, found)

    def answer(self, columns: Sequence[Column], lengths: AnswerLengths, watch: RowWatch) -> dict[str, Answers]:
        """Column -> its answers to all rows."""
        settings, encoder = self.config.evaluate, PromptEncoder(load_tokenizer(self.config.model), self.config.prompt)
        prompts = {c.name: column_prompts(c, self.run, encoder, settings.split, lengths.limit) for c in columns}
        few, size = min(settings.latency_rows, *(len(rows) for _, rows in prompts.values())), settings.batch_size
        template = self.run.read_templates()[1.0] if settings.knows or settings.probe else ""
        generated = list(columns)
        trained = next((c for c in columns if c.name == "promptintern"), None)
        questions = plan_questions(self.config) if trained and template and settings.knows else None
        if trained and questions:
            prompts[QUESTIONS] = prompts[trained.name][0], questions.prompts(self.config, trained, encoder)
            generated.append(replace(trained, name=QUESTIONS))
        total = {name: len(rows) for name, (_, rows) in prompts.items()}
        work = []
        for c in generated:  # all of a column in a row, since the actor keeps the cache of one prefix
            work += [work_item(c, prompts, rows) for rows in chain_batches(prompts[c.name][1], size)]
            if c.name != QUESTIONS:
                work.append(work_item(c, prompts, range(few), timed=True))
            if c.name != QUESTIONS and settings.probe and template:
                work.append(work_item(c, prompts, [], probe=template))
        outputs: dict[str, list[Any]] = {name: [None] * n for name, n in total.items()}  # ids of each row
        seconds: dict[str, list[Any]] = {name: [] for name in total}  # of the first rows, one by one
        probes: dict[str, dict[str, Any]] = {name: {} for name in total}
        for place, result in resume_work(self.config, columns, work, lengths):
            name = work[place]["column"]
            if "probe" in work[place]:
                probes[name] = result
            elif "timed" in work[place]:
                seconds[name] += result
                watch(f"{name}, latency", len(seconds[name]), few)
            else:
                for i, ids in zip(work[place]["rows"], result, strict=True):
                    outputs[name][i] = ids
                if name != QUESTIONS:
                    watch(name, sum(ids is not None for ids in outputs[name]), total[name])
        texts = {name: [encoder.decode(ids) for ids in found] for name, found in outputs.items()}
        answers, knowledge = {}, dict[str, Knowledge]()
        if trained and questions:
            knowledge[trained.name] = questions.knowledge(texts[QUESTIONS], trained.adapter, self.config.task)
        for c in columns:
            prefix, rows = prompts[c.name]
            sent = c.gist or len(prefix)  # gist tokens are sent in place of the template
            tokens = [len(ids) for ids in outputs[c.name]]
            answers[c.name] = Answers(texts[c.name], {
                "input_tokens": sent + fmean(map(len, rows)),
                "output_tokens": fmean(n + 1 for n in tokens),
                "cut_off": fmean(n == lengths.limit for n in tokens),
                "prefix_tokens": sent,
                **median_latencies(seconds[c.name]), **probes[c.name],
            }, knowledge.get(c.name))
        return answers

    def environment(self) -> dict[str, Any]:
        versions = {"pi-ray": __version__, "python": platform.python_version(), **{p: version(p) for p in PACKAGES}}
        return {"versions": versions, "hardware": _hardware()}

    def training_facts(self, config: RunConfig) -> dict[str, Any]:
        """Sums over the log of the run's training, or its baseline's, with a teacher's seconds and answers."""
        log = list(read_entries(RunDir(config.root).train_log.read_bytes()))
        updates = [e for e in log if "loss" in e]
        events: dict[str, dict[str, Any]] = {e["event"]: e for e in log if "event" in e}
        asked = read_manifest(RunDir(config.root).queries) if config.task.generate else None
        teacher, drills = (events.get(name, {}) for name in ("teacher_answers", "drills"))
        rounds = [e for e in log if e.get("event") == "student_answers"]
        teaching = teacher.get("seconds_teaching", 0) + sum(e["seconds_writing"] for e in rounds)
        seconds = sum(e["seconds"] for e in updates) + teaching
        return {
            "updates": len(updates), "seconds": round(seconds, 1), "tokens": sum(e["tokens"] for e in updates),
            "workers": config.train.workers, **{k: drills[k] for k in ("facts",) if k in drills},
            **({"generated": asked["queries"], "writer": asked["writer"]} if asked else {}),
            **{k: teacher[k] for k in ("queries", "answered", "kept", "views", "options") if k in teacher},
            **{f"student_{k}": sum(e[k] for e in rounds) for k in ("answers", "tokens", "replaced") if rounds},
        }


def _hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    own = "Apple's GPU, " if best_device() == "mps" else ""
    facts = Path("/proc/cpuinfo")
    name = re.search(r"^model name\s*: (.*)$", facts.read_text(), re.M) if facts.exists() else None
    return f"{own}{joblib.cpu_count()} CPU cores ({name[1] if name else platform.processor()})"
