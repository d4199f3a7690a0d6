"""Generated queries on disk: the artifact queries/, whose rows become a run's unlabelled ones."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pi_ray.config import AskKind
from pi_ray.errors import DataError
from pi_ray.protocols import UNLABELLED, Row
from pi_ray.run.artifact import read_manifest, verify_artifact
from pi_ray.run.directory import RunDir
from pi_ray.run.row_store import PARQUET, read_range

FILE = "queries.parquet"
SCHEMA = pa.schema({
    "id": pa.string(), "query": pa.string(), "kind": pa.string(), "units": pa.list_(pa.int32()),
})


class Asked(NamedTuple):
    """A generated query: its kind (`ask.kinds`), and the places of the units that it asks about, in the manifest's
    list of units.
    """

    id: str
    query: str
    kind: AskKind
    units: tuple[int, ...]


def write_queries(folder: Path, queries: Iterable[Asked]) -> None:
    """Write the queries' file into a folder that `run.artifact.staged` seals."""
    pq.write_table(pa.Table.from_pylist([asked._asdict() for asked in queries], SCHEMA), folder / FILE, **PARQUET)


def read_queries(run: RunDir) -> list[Asked]:
    """The run's generated queries. Raises DataError where there are none, CorruptArtifactError for damaged ones."""
    if read_manifest(run.queries) is None:
        raise DataError(f"{run.root}: no queries are generated yet; run 'pi-ray ask' or 'pi-ray run' first")
    verify_artifact(run.queries)
    rows = read_range(run.queries / FILE).to_pylist()
    return [Asked(**{**values, "units": tuple(values["units"])}) for values in rows]


def generated_rows(run: RunDir) -> Iterator[Row]:
    """The generated queries as unlabelled rows."""
    return (Row(f"{UNLABELLED}-{asked.id}", asked.query, "") for asked in read_queries(run))


def queries_digest(run: RunDir) -> str:
    """The hash of the generated queries; "" where there are none yet."""
    manifest = read_manifest(run.queries)
    return manifest["files"][FILE]["sha256"] if manifest else ""
