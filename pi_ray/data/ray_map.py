"""The same work on many items by Ray Data actors, with errors of workers as the one sentence that helps.

A user's mistake may only show in a worker. There a PiRayError is returned instead of raised, and raised again by the
driver: otherwise Ray Data would wrap it and append its own advice to the sentence.
"""

import json
import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from pi_ray import errors
from pi_ray.cluster import session
from pi_ray.cluster.storage_sync import StorageSync

Work = Callable[[dict[str, Any]], Any]
Attach = Callable[[], None]  # makes a process of a node fetch the run directory, and send what it writes


def fan_out(items: Sequence[dict[str, Any]], make: Callable[..., Work], *args: Any, **options: Any) -> list[Any]:
    """`make(*args)(item)` for each item, in the order of the items. See `stream`."""
    return [value for _, value in sorted(stream(items, make, *args, **options), key=lambda pair: pair[0])]


def stream(
    items: Sequence[dict[str, Any]], make: Callable[..., Work], *args: Any, actors: int,
    sync: StorageSync | None = None, **options: Any,
) -> Iterator[tuple[int, Any]]:
    """Yield (place of the item, `make(*args)(item)`) as they are done, by at most so many actors, which `make` once.

    Items and results are JSON values. Without items Ray is not touched. `sync` brings the run directory to each actor
    and takes what it writes there. `options` are Ray's for each actor (placement.worker_options).
    """
    if not items:
        return
    session.connect()
    import ray

    numbered = [{"place": i, "item": json.dumps(item)} for i, item in enumerate(items)]
    with quiet_context(ray):
        dataset = ray.data.from_items(numbered, override_num_blocks=len(items)).map_batches(
            ItemActor, batch_size=1, compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors),
            fn_constructor_args=(make, args, attach_of(sync)), **options,
        )
        for row in dataset.iter_rows():
            answer = json.loads(row["answer"])
            if "error" in answer:
                raise from_payload(answer["error"])
            yield row["place"], answer["value"]
    if sync:
        sync.pull()


@contextmanager
def quiet_context(ray: Any) -> Iterator[Any]:
    """Ray Data's settings meanwhile: silent. Yields them, to be changed."""
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    with ray.data.DataContext.current(context):
        yield context


@contextmanager
def raise_worker_errors() -> Iterator[None]:
    """Raise the PiRayError of a plain Ray task as itself."""
    import ray

    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, errors.PiRayError):
            raise error.cause from None
        raise


def attach_of(sync: StorageSync | None) -> Attach | None:
    """The function that each worker of one job calls before it works; each process fetches once a job."""
    return partial(sync.attach_worker, uuid.uuid4().hex) if sync else None


def fetch_on_nodes(sync: StorageSync) -> None:
    """Fetch the run directory on every node that the cluster has now, for actors that are not pi-ray's, as vLLM's are.

    Raises StorageError and CorruptArtifactError as `StorageSync.pull` does.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    fetch = ray.remote(num_cpus=0)(lambda: sync.pull(unfinished=False))
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    strategies = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
    with raise_worker_errors():
        ray.get([fetch.options(scheduling_strategy=strategy).remote() for strategy in strategies])


def to_payload(error: errors.PiRayError) -> list[str]:
    """An error as a JSON value that `from_payload` makes the same error of."""
    return [type(error).__name__, str(error)]


def from_payload(payload: Sequence[str]) -> errors.PiRayError:
    return getattr(errors, payload[0], errors.PiRayError)(payload[1])


class ItemActor:
    """Inside an actor: makes the work when the first item comes, then does one item at a time."""

    def __init__(self, make: Callable[..., Work], args: tuple[Any, ...], attach: Attach | None = None):
        self.make, self.args, self.attach = make, args, attach
        self.work: Work | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"place": batch["place"], "answer": [self._answer(json.loads(item)) for item in batch["item"]]}

    def _answer(self, item: dict[str, Any]) -> str:
        try:
            if self.attach and not self.work:
                self.attach()
            self.work = self.work or self.make(*self.args)
            return json.dumps({"value": self.work(item)})
        except errors.PiRayError as error:
            return json.dumps({"error": to_payload(error)})
