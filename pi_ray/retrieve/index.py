"""The index of an example bank by a score: what all scores have in common, and the cosine, which needs no more."""

from collections.abc import Sequence

import numpy as np

from pi_ray.protocols import Encoder
from pi_ray.retrieve import kernel

PAIRS = 4_000_000  # pairs scored at once: bounds memory


def as_shared(*arrays: np.ndarray) -> None:
    """Make arrays read-only, as Ray's object store returns them, so that numba compiles its loops once."""
    for array in arrays:
        array.setflags(write=False)


class ScoreIndex:
    """The texts of an example bank. Texts are known by their position, 0 to len - 1.

    `groups` are numbers: a reference that has one is not compared with the texts of its own group.
    """

    def __init__(self, bank: Sequence[str], groups: np.ndarray | None = None):
        self.groups = np.full(len(bank), -1, dtype=np.int64) if groups is None else np.array(groups, dtype=np.int64)
        as_shared(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def scores(self, references: Sequence[str], candidates: np.ndarray | None = None) -> np.ndarray:
        """The scores, 0 to 100, of bank texts `candidates`, positions (q, c), or (q, bank) of all. float64."""
        raise NotImplementedError

    def top(
        self, references: Sequence[str], k: int, groups: np.ndarray | None = None, among: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The exact k best bank positions and their scores for each reference, shapes (q, k'), k' = min(k, bank).

        Ties: lower position first. `groups` are those of the references, -2 for none. `among` are the only positions
        that may be chosen, shape (q, c), -1 for none. Where these leave fewer than k', the last positions are -1.
        """
        shape = len(references), min(k, len(self))
        ids, best = np.full(shape, -1, dtype=np.int64), np.full(shape, -1.0)
        own = np.full(len(references), -2, dtype=np.int64) if groups is None else np.asarray(groups, dtype=np.int64)
        if ids.size:
            self._search(references, own, None if among is None else np.asarray(among, dtype=np.int64), ids, best)
        return ids, best

    def _search(
        self, references: Sequence[str], own: np.ndarray, among: np.ndarray | None, ids: np.ndarray, best: np.ndarray,
    ) -> None:
        """Write what `top` returns into `ids` and `best`."""
        step = max(1, PAIRS // (len(self) if among is None else among.shape[1]))
        for some in (slice(begin, begin + step) for begin in range(0, len(references), step)):
            near = None if among is None else among[some]
            found = self.scores(references[some], None if near is None else np.maximum(near, 0))
            positions = self._positions(near, len(found))
            kernel.top_of_scores(found, positions, self.groups, own[some], ids[some], best[some])

    def _positions(self, candidates: np.ndarray | None, rows: int) -> np.ndarray:
        """`candidates`, or the whole bank for each row. int64."""
        if candidates is None:
            return np.broadcast_to(np.arange(len(self)), (rows, len(self)))
        return np.asarray(candidates, dtype=np.int64)


class CosineIndex(ScoreIndex):
    """Cosine of embeddings (below 0 counts as 0), by the encoder that retrieve.encoder names."""

    def __init__(self, encoder: Encoder, bank: Sequence[str], groups: np.ndarray | None = None):
        super().__init__(bank, groups)
        self.encoder, self.vectors = encoder, encoder.encode(bank)

    def scores(self, references: Sequence[str], candidates: np.ndarray | None = None) -> np.ndarray:
        asked = self.encoder.encode(references)
        if candidates is None:
            cosines = asked @ self.vectors.T
        else:
            cosines = np.stack([self.vectors[near] @ one for near, one in zip(candidates, asked, strict=True)])
        return 100.0 * np.maximum(cosines, 0.0).astype(np.float64)
