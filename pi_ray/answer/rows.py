"""The step `answer`: queries and a template -> answered/, the train, dev and test rows that a teacher made."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pi_ray import __version__
from pi_ray.answer.base_teacher import answer_by_base
from pi_ray.answer.endpoint import answer_by_endpoint, confirm_answers
from pi_ray.answer.split import draw_splits, split_queries
from pi_ray.answer.teacher_answer import TeacherAnswer
from pi_ray.config import RunConfig
from pi_ray.data.ingest import read_splits, require_unique_ids, separate_splits
from pi_ray.errors import DataError
from pi_ray.metrics import RowScorer
from pi_ray.models import base_digest, base_name, context_length, load_tokenizer
from pi_ray.prompt import PromptEncoder
from pi_ray.protocols import SPLITS, UNLABELLED, Row, Task
from pi_ray.registry import tasks
from pi_ray.retrieve.neighbours import question_of
from pi_ray.run.answered import has_labelled, labelled_splits
from pi_ray.run.artifact import digest, is_current, read_manifest, staged
from pi_ray.run.directory import RunDir
from pi_ray.run.fingerprint import metric_fingerprints
from pi_ray.run.lock import run_lock
from pi_ray.run.queries import generated_rows

SHORTEST_LIMIT = 16  # tokens that an answer must have room for
FEWEST = {"train": 8, "dev": 1, "test": 2}  # answered queries without which a run says nothing

Tell = Callable[[str], None]


def make_answered_rows(
    config: RunConfig, confirm: Callable[[str], bool], tell: Tell, watch: Callable[[int, int], None]
) -> dict[str, Any]:
    """Write the artifact answered/ unless it is there, and return its facts.

    `confirm` is asked before money is spent; `watch` gets (answered, all queries). The caller has joined the cluster.
    Raises DataError for an empty template, one that the model cannot read, and too few usable queries or answers,
    StorageError while another process has the run directory's lock.
    """
    with run_lock(config.root, "is answering the queries of this run"):  # two would pay for the same answers
        return _make_answered_rows(config, confirm, tell, watch)


def _make_answered_rows(
    config: RunConfig, confirm: Callable[[str], bool], tell: Tell, watch: Callable[[int, int], None]
) -> dict[str, Any]:
    run, task = RunDir(config.root), tasks[config.task.name](config.task)
    template = task.template().text
    labelled, queries = read_queries_to_answer(config, task)
    held_out = read_held_out(config, task)
    fingerprint = _fingerprint(config, template, labelled, queries, held_out)
    if is_current(run.answered, fingerprint):
        tell("answer: nothing to do, the answers are there")
        return (read_manifest(run.answered) or {})["facts"]
    limit = answer_limit(config, template, queries)
    asked, copies = split_queries(queries, template, held_out)
    rows = [row for some in asked.values() for row in some]
    teacher, views = config.train.distill.teacher, 1
    if teacher == "endpoint":
        confirm_answers(config, rows, template, limit, confirm, tell)
        answers = answer_by_endpoint(config, rows, template, limit, watch)
    else:
        answers, views = answer_by_base(config, rows, template, limit, watch)
    kept = {row.id: replace(row, answer=a.text) for row, a in zip(rows, answers, strict=True) if is_kept(config, a)}
    made = {split: [kept[row.id] for row in some if row.id in kept] for split, some in asked.items()}
    unscored = _drop_unscored(config, made)
    facts = {
        "teacher": config.closed.model if teacher == "endpoint" else base_name(config.model.base), "views": views,
        "by": teacher, "queries": len(queries), "near_copies": copies, "asked": {s: len(r) for s, r in asked.items()},
        "answered": sum(answer.ended and bool(answer.text) for answer in answers), "limit": limit,
        "kept": {split: len(some) for split, some in made.items()}, "labelled": len(labelled),
        **({"unscored": unscored} if unscored else {}),
    }
    _check(config, facts)
    made["train"] = [*labelled, *made["train"]]
    with staged(run.answered, fingerprint=fingerprint, facts=facts) as folder:
        for split, some in made.items():
            _write_jsonl(folder / f"{split}.jsonl", some)
    tell(describe_answers(facts))
    return facts


def read_queries_to_answer(
    config: RunConfig, task: Task, generated: Iterable[Row] | None = None
) -> tuple[list[Row], list[Row]]:
    """(labelled training rows, queries for the teacher). A query that a labelled row has is left out, and copies are.

    `generated` stands for the generated queries; None: those that are there.

    Raises DataError for what preparation would refuse when the answers are paid for: a named file that is missing, more
    bad rows than task.max_bad_rows, ids that are not unique, and training rows that are also in dev or test; and where
    no query is left.
    """
    names = labelled_splits(config)
    splits, rejects = read_splits(task, [*names, *([UNLABELLED] if config.task.queries else [])])
    if len(rejects) > config.task.max_bad_rows:
        worst = "\n".join(f"  {reject.source}:{reject.line}: {reject.reason}" for reject in rejects[:3])
        raise DataError(f"{len(rejects)} bad rows, and task.max_bad_rows is {config.task.max_bad_rows}:\n{worst}")
    known = {question_of(row) for name in names for row in splits[name]}
    queries = []
    if generated is None:
        generated = generated_rows(RunDir(config.root)) if config.task.generate else ()
    for row in [*splits.get(UNLABELLED, ()), *generated]:
        if (query := question_of(row)) not in known:
            known.add(query)
            queries.append(row)
    if not queries:
        file = f"{config.task.queries}: " if config.task.queries else ""
        raise DataError(f"{file}no query for the teacher to answer; write one a line as {{\"query\": ...}} into the "
            "file that task.queries names, or set task.queries=generate")
    separate_splits({**{split: [] for split in SPLITS}, **splits}, config.task.overlap)
    require_unique_ids({**splits, UNLABELLED: queries})
    return splits.get("train", []), queries


def planned_splits(config: RunConfig, task: Task, stand_ins: Sequence[Row] = ()) -> dict[str, list[Row]]:
    """Split -> the rows that a run will have if every query gets an answer; those of queries have an empty one.

    `stand_ins` are counted for queries that are not generated yet; what would be near copies is then not known.
    """
    labelled, queries = read_queries_to_answer(config, task, stand_ins or None)
    template = task.template().text
    held_out = read_held_out(config, task)
    asked = draw_splits(queries, held_out) if stand_ins else split_queries(queries, template, held_out)[0]
    return {**asked, **held_out, "train": [*labelled, *asked["train"]]}


def is_answered(config: RunConfig, task: Task) -> bool:
    """Whether the rows of answered/ are there and were made from what the config names."""
    labelled, queries = read_queries_to_answer(config, task)
    held_out, template = read_held_out(config, task), task.template().text
    return is_current(RunDir(config.root).answered, _fingerprint(config, template, labelled, queries, held_out))


def read_held_out(config: RunConfig, task: Task) -> dict[str, list[Row]]:
    """Split -> people's rows, of dev and test where they have labelled some: no query is held out there."""
    return read_splits(task, [split for split in ("dev", "test") if has_labelled(config, split)])[0]


def answer_limit(config: RunConfig, template: str, queries: Sequence[Row]) -> int:
    """Tokens that an answer may have: train.distill.max_tokens, or what the context leaves behind the whole prompt.

    Raises DataError where the prompt does not fit the base's context. It must also where an endpoint answers: the
    evaluation compares with the base that reads it.
    """
    encoder, context = PromptEncoder(load_tokenizer(config.model), config.prompt), context_length(config.model)
    prompt = len(encoder.prefix(template))
    longest = max(len(encoder.row(row.query, (), row.documents)) for row in queries)
    room = context - prompt - longest
    if room < SHORTEST_LIMIT:
        raise DataError(f"the prompt has {prompt:,} tokens and the longest query {longest:,}, and {config.model.base} "
            f"reads {context:,} in all: shorten them, or take a model.base with a longer context")
    return min(config.train.distill.max_tokens, room)


def is_kept(config: RunConfig, answer: TeacherAnswer) -> bool:
    """Whether an answer becomes a row: it ended, all views give it (where agreement is a filter), and is sure enough.
    """
    distill = config.train.distill
    agreed = answer.agreement == 1 or distill.agreement == "off"
    sure = distill.confidence is None or answer.confidence >= distill.confidence
    return answer.ended and bool(answer.text) and agreed and sure


def describe_answers(facts: dict[str, Any]) -> str:
    """The facts of answered/ in words."""
    asked, kept = sum(facts["asked"].values()), sum(facts["kept"].values())
    agreed = f", {kept:,} of them the same in all {facts['views']} orders of the prompt" if facts["views"] > 1 else ""
    rows = ", ".join(f"{facts['kept'][split]:,} {split}" for split in SPLITS if split in facts["kept"])
    copies = f"; {facts['near_copies']:,} near copies of held-out queries left out" if facts["near_copies"] else ""
    left_out = copies + _describe_unscored(facts)
    return f"{facts['teacher']} answered {facts['answered']:,} of {asked:,} queries{agreed}; rows: {rows}{left_out}"


def _describe_unscored(facts: dict[str, Any]) -> str:
    count = facts.get("unscored")
    return f"; {count:,} dev and test answers left out, which task.metric cannot score" if count else ""


def _drop_unscored(config: RunConfig, made: dict[str, list[Row]]) -> int:
    """Take dev and test rows away whose answer task.metric cannot score, as preparation would refuse; their number."""
    if not config.task.metric:
        return 0
    scorer, before = RowScorer(config.task), sum(map(len, made.values()))
    for split in made.keys() - {"train"}:
        made[split] = [row for row in made[split] if not scorer.check(row)]
    return before - sum(map(len, made.values()))


def _check(config: RunConfig, facts: dict[str, Any]) -> None:
    kept = {split: n + (facts["labelled"] if split == "train" else 0) for split, n in facts["kept"].items()}
    if all(n >= FEWEST[split] for split, n in kept.items()):
        return
    asked, limit = sum(facts["asked"].values()), facts["limit"]
    found = f"{facts['answered']:,} of {asked:,} queries have an answer that ends within {limit} tokens"
    found += f", and {sum(facts['kept'].values()):,} have the same one in each of {facts['views']} orders of the prompt"
    found += _describe_unscored(facts)
    needs = ", ".join(f"{n} {split}" for split, n in FEWEST.items())
    raise DataError(
        f"too few answered queries for a run ({needs} at least): {found}. Give more queries (task.queries, or "
        "ask.queries where they are generated), ask the prompt for shorter answers, raise train.distill.max_tokens, or "
        "take a teacher that reads the prompt better: a larger model.base, or train.distill.teacher=endpoint. "
        "The answers so far are kept"
    )


def _fingerprint(
    config: RunConfig, template: str, labelled: Iterable[Row], queries: Iterable[Row], held_out: dict[str, list[Row]]
) -> str:
    distill = config.train.distill
    teacher: list[Any] = [config.closed.base_url, config.closed.model]
    if distill.teacher == "base":
        teacher = [config.model.model_dump(mode="json"), base_digest(config.model)]
    settings = [distill.teacher, distill.views, distill.agreement, distill.confidence, distill.max_tokens]
    rows = [[[row.id, row.query, row.answer, row.group, row.documents] for row in some] for some in (labelled, queries)]
    files = [split for split in SPLITS if has_labelled(config, split)]
    parts = [
        __version__, teacher, settings, config.prompt.model_dump(mode="json"), config.train.seed, template, rows, files,
    ]
    # near copies of people's rows are no queries, and a metric says which answers it can score
    parts += [[[split, row.query] for split, some in held_out.items() for row in some]] if held_out else []
    return digest([*parts, *(metric_fingerprints(config) if config.task.metric else [])])


def _write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    def line(row: Row) -> str:
        fields = {"id": row.id, "query": row.query, "answer": row.answer, "group": row.group}
        return json.dumps({**fields, "documents": list(row.documents)}, ensure_ascii=False) + "\n"

    path.write_text("".join(map(line, rows)), encoding="utf-8")
