"""Refusals: errors in the words that a client is shown, with their HTTP status."""

import logging
import re
from typing import Self

from pi_ray.errors import AdapterError, ModelError, PiRayError
from pi_ray.store.adapters import StoreUnavailableError, UnknownAdapterError

log = logging.getLogger("ray.serve")
# Group 1 of a path of this machine is all of it that a client may see.
SERVER_PATH = re.compile(r"(?<![\w:/.])/(?=[^\s/:'\"])(?:[^\s/:'\"]+/)*([^\s/:'\"]*)")


class RefusedError(Exception):
    """HTTP status and OpenAI's `type`, `code` and `param` of a refusal. Survives pickling between processes."""

    def __init__(
        self, status: int, message: str, kind: str = "invalid_request_error", code: str | None = None,
        param: str | None = None,
    ):
        super().__init__(status, message, kind, code, param)
        self.status, self.message, self.kind, self.code, self.param = status, message, kind, code, param
        self.retry_after = 1  # seconds, which 429 and 503 tell the client

    def come_back(self, seconds: int) -> Self:
        """The same refusal, with another `retry_after`."""
        self.retry_after = max(seconds, 1)
        return self


def as_refused_error(error: PiRayError) -> RefusedError:
    """404: unknown adapter. 503: store out of reach. 422: refused adapter, or a prompt format not allowed.

    Anything else, such as a full disk, is the server's own fault: 503, and only the log says what it is.
    """
    if isinstance(error, UnknownAdapterError):
        return RefusedError(404, str(error), code="model_not_found", param="model")
    if isinstance(error, StoreUnavailableError):
        return RefusedError(503, str(error), "server_error", "store_unavailable")
    if not isinstance(error, (AdapterError, ModelError)):
        log.error("a request could not be prepared", exc_info=error)
        message = "the server cannot answer at present, and its log says why; come back later"
        return RefusedError(503, message, "server_error", "server_fault")
    code = "adapter_refused" if isinstance(error, AdapterError) else "model_refused"
    return RefusedError(422, SERVER_PATH.sub(r"\1", str(error)), code=code, param="model")
