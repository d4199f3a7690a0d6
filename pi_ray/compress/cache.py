"""Results of compression, one JSON file for each content hash in the cache folder; runs share them."""

import json
from pathlib import Path
from typing import Any

from pi_ray.models import base_files
from pi_ray.run.artifact import digest, write_atomic


def load_result(key: str) -> Any | None:
    """The result stored under `key`, a hex digest of its inputs; None where there is none or its file is damaged."""
    try:
        stored = json.loads(_path(key).read_bytes())
        return stored["result"] if stored["sha256"] == digest(stored["result"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def store_result(key: str, result: Any) -> None:
    """Keep `result`, a value that JSON can hold. Its hash tells a damaged file, so that no file is synced."""
    text = json.dumps({"sha256": digest(result), "result": result}, ensure_ascii=False, indent=1)
    write_atomic(_path(key), text, sync=False)


def _path(key: str) -> Path:
    return base_files.cache_dir() / "compress" / f"{key}.json"
