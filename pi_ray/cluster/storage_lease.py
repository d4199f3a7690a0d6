"""The lease of a run on object storage: which group of workers may write. The group that started last has it.

Lost hosts and drivers that were started twice work on without knowing of each other. So a group takes the lease, one
small object, before its first update and renews it before each upload. Both are conditional writes (If-Match) where the
provider has them, S3 and Google Cloud Storage: of two groups that start at the same moment one gets an error, and the
renewal of a lease that another group has taken fails.
"""

import logging
import os
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

from pi_ray.errors import TrainingError
from pi_ray.run.object_storage import ObjectStorage

log = logging.getLogger("pi_ray")
ENDPOINTS = {  # of providers with conditional writes: where pyarrow reads that another server is meant
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "gcs": ("CLOUD_STORAGE_EMULATOR_ENDPOINT",),
}
ATTEMPTS = 5  # the holder that is being replaced may renew its lease meanwhile
PATIENCE = {"max_retries": 3, "retry_timeout": timedelta(seconds=30)}
TIMEOUTS = {"connect_timeout": timedelta(seconds=5), "timeout": timedelta(seconds=20)}


class StorageLease:
    """The object `key`, which holds the name of its `holder`. Made: taken.

    Raises TrainingError where another one takes it at the same time, and OSError where storage does not answer.
    """

    def __init__(self, storage: ObjectStorage, key: str, holder: str):
        self.storage, self.key, self.holder = storage, key, holder
        self._objects = _open_conditional(storage)
        self._version: dict[str, str] = {}
        if self._objects:
            self._take()
        else:
            storage.upload(holder.encode(), key)

    def renew(self) -> None:
        """Raise TrainingError where another holder has taken it since, OSError where storage does not answer."""
        if not self._objects:
            if self.storage.read(self.key) not in (self.holder.encode(), None):
                raise self._lost()
        elif not self._write(self._version):
            found, version = self._read()  # a write whose confirmation was lost counts
            if found != self.holder:
                raise self._lost()
            self._version = version

    def _take(self) -> None:
        before, version = self._read()
        for _ in range(ATTEMPTS):
            if self._write(version):
                return
            found, version = self._read()
            if found == self.holder:
                self._version = version
                return
            if found != before:
                break
        raise TrainingError(
            f"{self.storage.url}/{self.key}: another group of workers has just started on this run; this one stops"
        )

    def _read(self) -> tuple[str, dict[str, str]]:
        """(holder, version) of the object; ("", {}) where there is none."""
        import obstore
        from obstore.exceptions import BaseError, NotFoundError

        try:
            found = obstore.get(self._objects, self.key)
            return bytes(found.bytes()).decode(errors="replace"), _version_of(found.meta)
        except (NotFoundError, FileNotFoundError):
            return "", {}
        except BaseError as error:
            raise OSError(str(error)) from error

    def _write(self, version: dict[str, str]) -> bool:
        """Put the holder in place of `version`, {} for none. Returns whether that version was still there."""
        import obstore
        from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError, PreconditionError

        mode: Any = version or "create"
        try:
            put = obstore.put(self._objects, self.key, self.holder.encode(), mode=mode)
        except (AlreadyExistsError, PreconditionError, NotFoundError, FileNotFoundError):  # changed, or removed
            return False
        except BaseError as error:
            raise OSError(str(error)) from error
        self._version = _version_of(put)
        return True

    def _lost(self) -> TrainingError:
        taken = "another group of workers has taken this run over, as after a lost connection"
        return TrainingError(f"{self.storage.url}/{self.key}: {taken}; this one stops, and sends nothing more")


def _version_of(answer: Any) -> dict[str, str]:
    """The ETag or the generation of an object, by which a conditional write names its state."""
    return {name: answer[name] for name in ("e_tag", "version") if answer.get(name)}


def _open_conditional(storage: ObjectStorage) -> Any:
    """The same storage by a client with conditional writes; None where the provider has none, or refuses this client.
    """
    if storage.provider not in ENDPOINTS:
        return None
    import obstore
    from obstore.exceptions import BaseError

    try:
        client = open_client(storage)
        next(iter(obstore.list(client, chunk_size=1)), None)  # so that a login which this client cannot use shows here
        return client
    except (BaseError, OSError, ValueError) as error:
        public, reason = storage.url.partition("?")[0], str(error).splitlines()[0][:200]
        log.warning("%s: the lease is not written conditionally, since that client does not get in: %s", public, reason)
        return None


def open_client(storage: ObjectStorage) -> Any:
    """obstore's client for storage on S3 or Google Cloud, with the settings that pyarrow takes from the URL, and the
    region that pyarrow has found for a bucket. Plain HTTP only to an endpoint that says so.
    """
    from obstore.store import from_url

    parts = urlsplit(storage.url)
    options = {name: values[0] for name, values in parse_qs(parts.query).items()}
    endpoint = options.get("endpoint_override", "")
    if endpoint and "://" not in endpoint:
        endpoint = f"{options.get('scheme', 'https')}://{endpoint}"
    names = ENDPOINTS[storage.provider]
    endpoint = endpoint or next((os.environ[name] for name in names if os.environ.get(name)), "")
    client = {"allow_http": endpoint.startswith("http://"), **TIMEOUTS}
    settings: dict[str, Any] = {"client_options": client, "retry_config": PATIENCE}
    given = {"endpoint": endpoint, "region": storage.region} if storage.provider == "s3" else {"base_url": endpoint}
    settings["config"] = {name: value for name, value in given.items() if value}
    bucket = parts.netloc.rpartition("@")[2]  # pyarrow's gs://anonymous@bucket
    return from_url(f"{parts.scheme.replace('gcs', 'gs')}://{bucket}{parts.path}", **settings)
