"""Tokens that each key used in the present month (UTC), kept in files of serve.usage_dir, so that a restart keeps them.

Each replica of the HTTP side writes a file of its own there, {"month": "2026-11", "tokens": {digest of a key: tokens}},
and reads the others' every SYNC_S, so what a crash loses, and what replicas do not know of each other, is that recent.
"""

import json
import logging
import threading
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
        self._syncing = threading.Lock()  # one thread at a time: the one that counted last also writes last
        self._lock = threading.Lock()  # of the three that follow
        self._month = ""
        self._own: Counter[str] = Counter()
        self._others: Counter[str] = Counter()
        self.sync()

    def used(self, digest: str) -> int:
        """Tokens of this month."""
        with self._lock:
            self._begin_month()
            return self._own[digest] + self._others[digest]

    def add(self, digest: str, tokens: int) -> None:
        with self._lock:
            self._begin_month()
            self._own[digest] += tokens

    def sync(self) -> None:
        """Write what this replica counted and read what others did. It waits for the disk: call it in a thread.

        A folder that cannot be written is reported, and tried again by the next call.
        """
        with self._syncing:
            with self._lock:
                self._begin_month()
                month, own = self._month, dict(self._own)
            try:
                if own:
                    write_atomic(self._file, json.dumps({"month": month, "tokens": own}))
            except (OSError, StorageError) as error:
                log.error("the tokens of keys cannot be kept: %s", error)
            others: Counter[str] = Counter()
            for path in self._file.parent.glob("*.json"):
                if path != self._file:
                    others += self._read(path, month)
            with self._lock:
                if month == self._month:
                    self._others = others

    def _begin_month(self) -> None:
        if (month := time.strftime("%Y-%m", time.gmtime(self._clock()))) != self._month:
            self._month, self._own, self._others = month, Counter(), Counter()

    def _read(self, path: Path, month: str) -> Counter[str]:
        """Another replica's tokens of `month`; its file of an earlier one is removed."""
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            found = json.loads(path.read_bytes())
            if found["month"] == month:
                return Counter({str(digest): int(tokens) for digest, tokens in found["tokens"].items()})
            if found["month"] < month:
                path.unlink(missing_ok=True)
        return Counter()
