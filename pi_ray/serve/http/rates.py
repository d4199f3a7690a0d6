"""Limits of keys: requests and tokens a minute, as LiteLLM's rpm_limit and tpm_limit, and tokens a month.

Each limit of a minute is a bucket that holds a minute's worth and fills evenly, so that a key that was idle may send a
burst. Each replica of the HTTP side counts for itself and allows its share of a limit.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pi_ray.serve.engine.refusal import RefusedError
from pi_ray.serve.http.keys import ApiKey
from pi_ray.serve.http.token_usage import SYNC_S, TokenUsage

MINUTE_S, DAY_S = 60.0, 86_400


@dataclass
class Bucket:
    """The rest of a limit; below zero after a request took more than there was."""

    left: float
    at: float  # when that was so

    def refill(self, limit: float, now: float) -> float:
        self.left, self.at = min(self.left + limit * (now - self.at) / MINUTE_S, _size(limit)), now
        return self.left


class KeyRates:
    """Counts the requests and tokens of each key. `shares`: by how many replicas the limits of a minute are divided.

    Tokens of a month are kept in `usage_dir`; without one, a key with such a limit is refused.
    """

    def __init__(self, shares: int = 1, usage_dir: str = "", clock: Callable[[], float] = time.monotonic):
        self._shares, self._clock = shares, clock
        self._usage = TokenUsage(Path(usage_dir)) if usage_dir else None
        self._buckets: dict[tuple[str, str], Bucket] = {}  # (digest of the key, limit's name)

    def admit(self, key: ApiKey, requests: int = 1) -> None:
        """Count what one body asks for: `requests` answers. Raises RefusedError 429, which says when to come back,
        while a limit is used up. More answers than a minute allows are admitted once the bucket is full, which then
        falls below zero: later requests wait until it has refilled.

        The tokens of a request are known only afterwards (`charge`), so it is admitted while any are left.
        """
        self._check_month(key)
        for name, limit in self._limits(key).items():
            needed = min(requests, _size(limit)) if name == "rpm_limit" else 0.0
            left = self._bucket(key, name, limit).refill(limit, self._clock())
            if left < needed or left <= 0:
                what = "requests" if name == "rpm_limit" else "tokens"
                message = f"this key may use {limit * self._shares:g} {what} a minute ({name}); come back later"
                seconds = math.ceil((max(needed, 1.0) - left) * MINUTE_S / limit)
                raise RefusedError(429, message, "rate_limit_error", "rate_limit_exceeded").come_back(seconds)
        self._take(key, "rpm_limit", requests)

    def charge(self, key: ApiKey, tokens: int) -> None:
        """Count the tokens of a request, those of its prompt and its answers."""
        self._take(key, "tpm_limit", tokens)
        if self._usage and key.digest:
            self._usage.add(key.digest, tokens)

    @asynccontextmanager
    async def keep_usage(self, _: Any = None) -> AsyncIterator[None]:
        """An app's lifespan, in which tokens of months are written and read every SYNC_S and at the end, in threads."""
        task = asyncio.create_task(self._sync_usage())
        try:
            yield
        finally:
            task.cancel()
            if self._usage:
                await asyncio.to_thread(self._usage.sync)

    async def _sync_usage(self) -> None:
        while self._usage:
            await asyncio.sleep(SYNC_S)
            await asyncio.to_thread(self._usage.sync)

    def _check_month(self, key: ApiKey) -> None:
        if not key.monthly_tokens:
            return
        if self._usage is None:
            message = "this key has a budget, which the server cannot count (serve.usage_dir)"
            raise RefusedError(503, message, "server_error", "server_fault")
        if self._usage.used(key.digest) >= key.monthly_tokens:
            message = f"this key has used its {key.monthly_tokens} tokens of this month (monthly_tokens)"
            raise RefusedError(429, message, "insufficient_quota", "insufficient_quota").come_back(DAY_S)

    def _take(self, key: ApiKey, name: str, amount: int) -> None:
        if limit := self._limits(key).get(name):
            bucket = self._bucket(key, name, limit)
            bucket.refill(limit, self._clock())
            bucket.left -= amount

    def _limits(self, key: ApiKey) -> dict[str, float]:
        limits = {"rpm_limit": key.rpm_limit, "tpm_limit": key.tpm_limit}
        return {name: limit / self._shares for name, limit in limits.items() if limit}

    def _bucket(self, key: ApiKey, name: str, limit: float) -> Bucket:
        return self._buckets.setdefault((key.digest, name), Bucket(_size(limit), self._clock()))


def _size(limit: float) -> float:
    """Size of a bucket: a minute's worth, and one request where a replica's share of the limit is less."""
    return max(limit, 1.0)
