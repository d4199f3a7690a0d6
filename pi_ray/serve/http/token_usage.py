"""Tokens that each key used in the present month (UTC), kept in files of serve.usage_dir, so that a restart keeps them.

Each replica of the HTTP side writes a file of its own there, {"month": "2026-11", "tokens": {digest of a key: tokens}},
and reads the others' every SYNC_S, so what a crash loses, and what replicas do not know of each other, is that recent.
"""

import json
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pi_ray.errors import StorageError
from pi_ray.run.artifact import write_atomic

log = logging.getLogger("ray.serve")
SYNC_S = 10.0


class TokenUsage:
    """The tokens of all keys, by their digests. `clock` gives seconds since 1970."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time):
        self._file, self._clock = folder / f"{uuid.uuid4().hex}.json", clock
        self._month, self._synced_at = "", float("-inf")
        self._own: Counter[str] = Counter()
        self._others: Counter[str] = Counter()

    def used(self, digest: str) -> int:
        """Tokens of this month."""
        self._sync()
        return self._own[digest] + self._others[digest]

    def add(self, digest: str, tokens: int) -> None:
        self._sync()
        self._own[digest] += tokens

    def flush(self) -> None:
        """Write what this replica counted. A folder that cannot be written is reported, and tried again later."""
        try:
            write_atomic(self._file, json.dumps({"month": self._month, "tokens": self._own}))
        except (OSError, StorageError) as error:
            log.error("the tokens of keys cannot be kept: %s", error)

    def _sync(self) -> None:
        month, now = time.strftime("%Y-%m", time.gmtime(self._clock())), self._clock()
        if month == self._month and now - self._synced_at < SYNC_S:
            return
        if month != self._month:
            self._month, self._own = month, Counter()
        elif self._own:
            self.flush()
        self._synced_at, self._others = now, Counter()
        for path in self._file.parent.glob("*.json"):
            if path != self._file:
                self._others += self._read(path)

    def _read(self, path: Path) -> Counter[str]:
        """Another replica's tokens of this month; its file of an earlier one is removed."""
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            found = json.loads(path.read_bytes())
            if found["month"] == self._month:
                return Counter({str(digest): int(tokens) for digest, tokens in found["tokens"].items()})
            if found["month"] < self._month:
                path.unlink(missing_ok=True)
        return Counter()
