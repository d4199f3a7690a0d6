"""The evaluation of a run on its held-out rows: ask every column, score the answers, and write the summary."""

import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from pi_ray import hosted
from pi_ray.config import RunConfig
from pi_ray.evaluate.adapter_answerer import AdapterAnswerer
from pi_ray.evaluate.columns import LABELS, Column, RowWatch, answer_lengths, columns_of, require_examples
from pi_ray.evaluate.hosted_answerer import HostedAnswerer
from pi_ray.evaluate.judge import add_judgements, confirm_judging, judges_of
from pi_ray.evaluate.knowledge import KNOWLEDGE_FILE
from pi_ray.evaluate.scoring import ScoredAnswers, clusters_of, output_lines
from pi_ray.protocols import Task
from pi_ray.registry import tasks
from pi_ray.run.answered import answered_facts
from pi_ray.run.artifact import MANIFEST_HASH, is_current, read_manifest, staged
from pi_ray.run.directory import RunDir
from pi_ray.run.lock import run_lock
from pi_ray.run.phases import plain_finetuning_config
from pi_ray.tasks.dataset import score_rows
from pi_ray.train.floor import decide_floor


def evaluate_run(
    config: RunConfig, watch: RowWatch = lambda column, done, total: None, columns: Sequence[Column] = (),
    answerer: AdapterAnswerer | HostedAnswerer | None = None, confirm: Callable[[str], bool] = hosted.ask_on_terminal,
) -> dict[str, Any]:
    """Write eval/summary.json, samples.jsonl, outputs.jsonl and, of a trained adapter, knows.json; return the summary.

    Skipped when columns, adapters, metrics and the evaluate block are those of the last time. `confirm` is asked before
    a judge (task.metric) costs money. Raises CorruptArtifactError for a damaged adapter, DataError where fewer examples
    were retrieved than evaluate.shots, TrainingError where nothing was prepared or tuned and where the judge's cost is
    declined, StorageError while another process has the run directory's lock.
    """
    run, columns = RunDir(config.root), columns or columns_of(config)
    if answerer is None:
        answerer = HostedAnswerer(config) if hosted.is_hosted(config) else AdapterAnswerer(config)
    fingerprint = answerer.fingerprint(columns)
    if is_current(run.evaluation, fingerprint):
        return json.loads((run.evaluation / "summary.json").read_text())
    require_examples(config, columns)
    with run_lock(config.root, "is evaluating this run"):  # two would pay for the same answers
        return _evaluate(config, watch, columns, answerer, fingerprint, confirm)


def _evaluate(
    config: RunConfig, watch: RowWatch, columns: Sequence[Column], answerer: AdapterAnswerer | HostedAnswerer,
    fingerprint: str, confirm: Callable[[str], bool],
) -> dict[str, Any]:
    run, split = RunDir(config.root), config.evaluate.split
    task: Task = tasks[config.task.name](config.task)
    rows, bank = run.read_rows(split), run.read_rows("train")
    lengths, metric = answer_lengths(config, rows, bank), config.task.metric
    clusters = clusters_of(config, [row.id for row in rows])
    judges = judges_of(config)
    confirm_judging(config, judges, rows, len(columns), lengths.limit, confirm)
    answers = answerer.answer(columns, lengths, watch)
    scored, judged = dict[str, ScoredAnswers](), dict[str, dict[str, Any]]()
    for name, a in answers.items():
        scores, judged[name] = add_judgements(judges, metric[:1], rows, a.texts, score_rows(task, rows, a.texts))
        has_bleu = not metric or "bleu" in scores[0]
        scored[name] = ScoredAnswers(
            rows, a.texts, scores, config.evaluate.bootstrap, config.train.seed, clusters, has_bleu,
        )
    facts = answered_facts(config)
    groups = dict(Counter(r.group for r in rows if r.group))
    trainings = {"promptintern": config, "plain": plain_finetuning_config(config)}
    summary: dict[str, Any] = {
        "run": config.name, "task": config.task.name, "model": answerer.model, "seed": config.train.seed,
        "fingerprint": fingerprint, "command": "pi-ray " + " ".join(sys.argv[1:]),
        "train_rows": len(bank), "split": split, "test_rows": len(rows),
        "max_new_tokens": lengths.limit, "latency_new_tokens": lengths.typical,
        **({"metrics": [*next(iter(scored.values())).scores[0]]} if metric else {}),
        "groups": groups, **answerer.environment(), **({"answered": facts} if facts else {}),
        "train": {name: answerer.training_facts(c) for name, c in trainings.items() if name in answers},
    }
    if config.schedule.floor and "promptintern" in answers:
        summary["floor"] = decide_floor(config).facts()
    for name, column in scored.items():
        measured = {**answers[name].measured, **judged[name]}
        own = {**column.summarise(), **measured, "groups": column.summarise_groups(groups)}
        summary[name] = {"label": LABELS.get(name, name), **own}
    if mine := scored.get("promptintern"):
        asked = next(c.adapter for c in columns if c.name == "promptintern")
        summary["adapter_sha256"] = (read_manifest(Path(asked)) or {}).get(MANIFEST_HASH, "")
        summary["paired"] = {name: mine.compare(other) for name, other in scored.items() if other is not mine}
    with staged(run.evaluation, fingerprint=fingerprint) as tmp:
        (tmp / "summary.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        for knowledge in filter(None, (a.knowledge for a in answers.values())):
            (tmp / KNOWLEDGE_FILE).write_text(knowledge.model_dump_json(indent=1) + "\n", encoding="utf-8")
        (tmp / "outputs.jsonl").write_text("".join(output_lines(rows, scored)))
        (tmp / "samples.jsonl").write_text("".join(islice(output_lines(rows, scored), config.evaluate.samples)))
    return summary
