"""Ingest: the task's rows, checked, into rows/{train,dev,test}.parquet and rejects.jsonl.

Checked are the number of bad rows, ids that are not unique, empty splits, and training queries that are also in dev or
test, which would make every score a lie. Rows go to disk as they come; memory holds their ids and shortened queries.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from pi_ray.config import TaskConfig
from pi_ray.data.context import ConversationContext
from pi_ray.errors import DataError
from pi_ray.protocols import SPLITS, UNLABELLED, Reject, Row, Task
from pi_ray.retrieve.neighbours import normalised, question_of
from pi_ray.run.artifact import staged, translate_disk_errors, write_atomic
from pi_ray.run.directory import RunDir
from pi_ray.run.queries import generated_rows
from pi_ray.run.row_store import StoredRows, write_rows

DEV_SHARE = 0.1  # of the training rows, when the task has no dev rows
SHOWN = 3  # examples named in an error
KEY_CHARACTERS = 64  # of a query that are held


class RowKey(NamedTuple):
    """The part of a row that the checks need. `query` is normalised, with a hash of documents; a long one becomes its
    beginning and a hash. `bare` is the same without documents, "" for a row that has none.
    """

    id: str
    query: str
    bare: str = ""


Splits = dict[str, list[Any]]  # split -> its rows, or their keys


def ingest(
    task: Task, config: TaskConfig, run: RunDir, fingerprint: str, progress: Callable[[str], None],
    names: Sequence[str] = SPLITS, context: ConversationContext | None = None,
) -> None:
    """Write the rows artifact: the splits in `names`, conversations as `context` cuts them. rejects.jsonl is written in
    any case.

    Raises DataError when the rows cannot be used, StorageError when the disk does not take them.
    """
    with translate_disk_errors(run.rows):
        run.root.mkdir(parents=True, exist_ok=True)
        for left in run.root.glob(".rows-*.read"):
            shutil.rmtree(left, ignore_errors=True)  # a run was killed
        with TemporaryDirectory(prefix=".rows-", suffix=".read", dir=run.root, ignore_cleanup_errors=True) as folder:
            keys, rejects, documents = _store(task, config, run, names, Path(folder), context)
            write_atomic(run.rejects, "".join(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in rejects))
            notes = check_splits(keys, rejects, config, run) + (context.notes() if context else [])
            counts = {split: len(kept) for split, kept in keys.items()}
            facts = {"rows": counts, "rejected": len(rejects), "notes": notes, "documents": documents}
            with staged(run.rows, fingerprint=fingerprint, **facts) as made:
                # train last: dev rows may come out of it
                for split in sorted(keys, key=lambda split: split == "train"):
                    _write_kept(split, keys[split], Path(folder), made / f"{split}.parquet")
    parts = [f"rows: {', '.join(f'{n} {split}' for split, n in counts.items())}, {len(rejects)} rejected"]
    progress("; ".join([*parts, *([f"{documents} documents come with rows"] if documents else []), *notes]))


def _store(
    task: Task, config: TaskConfig, run: RunDir, names: Sequence[str], folder: Path,
    context: ConversationContext | None,
) -> tuple[dict[str, list[RowKey]], list[Reject], int]:
    """Write all rows of each split, in the task's order; return their keys, the rejects and the number of documents."""
    keys: dict[str, list[RowKey]] = {split: [] for split in names}
    rejects: list[Reject] = []
    documents = 0

    def keyed(split: str) -> Iterator[Row]:
        nonlocal documents
        generates = split == UNLABELLED and config.generate
        own = _accepted(task, split, rejects, context) if config.queries or not generates else ()
        for row in chain(own, generated_rows(run) if generates else ()):
            keys[split].append(_key(row))
            documents += len(row.documents)
            yield row

    for split in names:
        write_rows(folder / f"{split}.parquet", keyed(split))
    return keys, rejects, documents


def _accepted(
    task: Task, split: str, rejects: list[Reject], context: ConversationContext | None = None
) -> Iterator[Row]:
    """The rows of a split, as they fit into `context`; its rejects are added to `rejects`."""
    for row in task.rows(split):
        fitted = context.fit(row) if context else row
        if isinstance(fitted, Reject):
            rejects.append(fitted)
        elif fitted:  # None: left out
            if context:
                context.remember(row, split)
            yield fitted


def _key(row: Row) -> RowKey:
    return RowKey(row.id, _shortened(question_of(row)), _shortened(normalised(row.query)) if row.documents else "")


def _shortened(query: str) -> str:
    if len(query) <= KEY_CHARACTERS:
        return query
    digest = blake2b(query.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return f"{query[:KEY_CHARACTERS].rstrip()}... {digest}"


def _write_kept(split: str, kept: Sequence[RowKey], folder: Path, final: Path) -> None:
    """Write the stored rows that the checks kept; the file as it is, unless rows were taken out or became dev rows."""
    own = StoredRows(folder / f"{split}.parquet")
    if len(own) == len(kept):
        os.rename(own.path, final)
        return
    wanted = {key.id for key in kept}
    source = own if len(own) else StoredRows(folder / "train.parquet")
    write_rows(final, (row for row in source if row.id in wanted))


def read_splits(
    task: Task, names: Sequence[str] = SPLITS, context: ConversationContext | None = None
) -> tuple[dict[str, list[Row]], list[Reject]]:
    """All rows of each split, held in memory, and all rejects, in the task's order."""
    rejects: list[Reject] = []
    return {split: list(_accepted(task, split, rejects, context)) for split in names}, rejects


def check_splits(splits: Splits, rejects: Sequence[Reject], config: TaskConfig, run: RunDir) -> list[str]:
    """Make `splits` fit to train and score on: a dev split if there is none, no query on both sides. Returns notes.

    Splits hold rows or their keys: anything with `id` and `query`. Raises DataError for too many rejects, ids that are
    not unique, an overlap that is not to be dropped, an empty split. Writes nothing.
    """
    if len(rejects) > config.max_bad_rows:
        first = "\n".join(f"  {r.source}:{r.line}: {r.reason}" for r in rejects[:SHOWN])
        cure = f"Mend the rows or raise task.max_bad_rows; 'pi-ray prepare' lists all of them in {run.rejects}"
        raise DataError(f"{len(rejects)} bad rows, and task.max_bad_rows is {config.max_bad_rows}:\n{first}\n{cure}")
    require_unique_ids(splits)
    notes = separate_splits(splits, config.overlap)  # before training rows may become dev rows
    notes += _make_dev(splits) + _shared_held_out(splits) + _told_apart_by_documents(splits) + _new_queries(splits)
    for split in SPLITS:
        if not splits[split]:
            counted = "; ".join([f"{len(rejects)} rows were rejected, see {run.rejects}", *notes])
            raise DataError(f"task '{config.name}' has no {split} rows; {counted}")
    return notes


def require_unique_ids(splits: Splits) -> None:
    """Raises DataError for an id that more than one row has."""
    repeated = [i for i, n in Counter(r.id for rows in splits.values() for r in rows).items() if n > 1]
    if repeated:
        places = "train, dev, test and queries" if splits.get(UNLABELLED) else "train, dev and test"
        found = f"{len(repeated)} ids stand more than once over {places}"
        raise DataError(f"{found}, such as {', '.join(map(repr, repeated[:SHOWN]))}; make them unique")


def _make_dev(splits: Splits) -> list[str]:
    """Without dev rows the last tenth of train becomes dev; other training rows with the same queries are dropped."""
    if splits["dev"] or len(splits["train"]) < 2:
        return []
    size = max(1, int(len(splits["train"]) * DEV_SHARE))
    splits["train"], splits["dev"] = splits["train"][:-size], splits["train"][-size:]
    dropped = _drop(splits, {question_of(r) for r in splits["dev"]})
    note = f"no dev rows: the last {size} train rows serve as dev"
    return [note + (f" ({dropped} more with the same queries left out of train)" if dropped else "")]


def separate_splits(splits: Splits, overlap: str) -> list[str]:
    """Refuse (DataError), or drop from train, the queries that also stand in dev or test. Returns notes."""
    splits_of = {question_of(r): s for s in ("dev", "test") for r in splits[s]}
    shared = [r for r in splits["train"] if question_of(r) in splits_of]
    if not shared:
        return []
    if overlap == "error":
        examples = "\n".join(
            f"  train row {r.id!r}, also in {splits_of[question_of(r)]}: {r.query[:100]!r}" for r in shared[:SHOWN]
        )
        found = f"{len(shared)} train queries also stand in dev or test, so scores would measure memory"
        raise DataError(f"{found}:\n{examples}\nRemove them, or set task.overlap: drop to leave them out of train")
    _drop(splits, set(splits_of))
    return [f"{len(shared)} train rows dropped, because their queries also stand in dev or test"]


def _shared_held_out(splits: Splits) -> list[str]:
    """Say how many dev queries also stand in test: dev rows choose the adapter that test rows then measure."""
    tested = {question_of(row) for row in splits["test"]}
    shared = sum(question_of(row) in tested for row in splits["dev"])
    return [f"{shared} dev queries also stand in test, which favours what dev rows choose"] if shared else []


def _told_apart_by_documents(splits: Splits) -> list[str]:
    """Say how many dev and test rows have a training row's query: a last phase at rate 0 sends no documents."""

    def bare(row: Any) -> str:
        return (row.bare or row.query) if isinstance(row, RowKey) else normalised(row.query)

    trained = {bare(row) for row in splits["train"]}
    shared = sum(bare(row) in trained for split in ("dev", "test") for row in splits[split])
    said = "dev and test rows have a train row's query and differ in its documents alone, which rate 0 does not send"
    return [f"{shared} {said}"] if shared else []


def _new_queries(splits: Splits) -> list[str]:
    """Unlabelled queries that no split has, each once: a teacher must never be asked what is evaluated."""
    known = {question_of(r) for s in SPLITS for r in splits[s]}
    rows, fresh = splits.get(UNLABELLED, []), []
    for row in rows:
        if (query := question_of(row)) not in known:
            known.add(query)
            fresh.append(row)
    if len(fresh) == len(rows):
        return []
    splits[UNLABELLED] = fresh
    return [f"{len(rows) - len(fresh)} of {len(rows)} unlabelled queries left out, since they stand elsewhere too"]


def _drop(splits: Splits, queries: set[str]) -> int:
    before = len(splits["train"])
    splits["train"] = [r for r in splits["train"] if question_of(r) not in queries]
    return before - len(splits["train"])
