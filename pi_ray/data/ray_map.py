"""Fan out: the same work on many items through Ray Data.

What a user did wrong may only show in a worker. There a PiRayError is returned instead of raised, and raised again here: otherwise Ray
would retry it, and bury the one sentence that helps under its own traceback.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from pi_ray import errors
from pi_ray.cluster import session
from pi_ray.cluster.storage_sync import Mirror

Work = Callable[[dict[str, Any]], Any]


def fan_out(items: Sequence[dict[str, Any]], make: Callable[..., Work], *args: Any, actors: int = 0, mirror: Mirror | None = None, **options: Any) -> list[Any]:
    """`make(*args)(item)` for each item, in the order of the items. See `stream`."""
    return [value for _, value in sorted(stream(items, make, *args, actors=actors, mirror=mirror, **options), key=lambda pair: pair[0])]


def stream(
    items: Sequence[dict[str, Any]], make: Callable[..., Work], *args: Any, actors: int = 0, mirror: Mirror | None = None, **options: Any,
) -> Iterator[tuple[int, Any]]:
    """(place of the item, `make(*args)(item)`) as they are done. Items and results are what JSON can hold. No items: Ray is not touched.

    With `actors`, at most that many processes call `make` once and end with the job: for work that loads something large. Without, Ray's running
    workers call it once for each item: it should be cheap there. `mirror` brings the run directory, once to each process, and takes what they write there.
    `options` are Ray's, of each actor or task: num_cpus, num_gpus, resources, label_selector (see cluster.options).
    """
    if not items:
        return
    session.connect()
    import ray

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    join = partial(mirror.join, uuid.uuid4().hex) if mirror else None
    numbered = [{"place": i, "item": json.dumps(item)} for i, item in enumerate(items)]
    dataset = ray.data.from_items(numbered, override_num_blocks=len(items))
    if actors:
        pool = ray.data.ActorPoolStrategy(min_size=1, max_size=actors)
        dataset = dataset.map_batches(_Worker, batch_size=1, compute=pool, fn_constructor_args=(make, args, join), **options)
    else:
        dataset = dataset.map_batches(_once, batch_size=1, fn_kwargs={"make": make, "args": args, "join": join}, **options)
    for row in dataset.iter_rows():
        yield row["place"], _result(json.loads(row["answer"]))
    if mirror:
        mirror.pull()


class _Worker:
    def __init__(self, make: Callable[..., Work], args: tuple[Any, ...], join: Callable[[], None] | None = None):
        self.make, self.args, self.join = make, args, join
        self.work: Work | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"place": batch["place"], "answer": [self._answer(json.loads(item)) for item in batch["item"]]}

    def _answer(self, item: dict[str, Any]) -> str:
        try:
            if self.join and not self.work:
                self.join()
            self.work = self.work or self.make(*self.args)
            return json.dumps({"value": self.work(item)})
        except errors.PiRayError as error:
            return json.dumps({"error": type(error).__name__, "message": str(error)})


def _once(batch: dict[str, Any], make: Callable[..., Work], args: tuple[Any, ...], join: Callable[[], None] | None) -> dict[str, Any]:
    return _Worker(make, args, join)(batch)


def _result(answer: dict[str, Any]) -> Any:
    if "error" in answer:
        raise getattr(errors, answer["error"], errors.PiRayError)(answer["message"])
    return answer["value"]
