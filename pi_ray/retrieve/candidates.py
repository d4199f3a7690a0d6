"""Candidates: the bank texts whose vectors are nearest to a query's, from FAISS. The score then ranks them."""

from collections.abc import Sequence
from typing import Any

import faiss
import numpy as np

from pi_ray.protocols import Encoder

FLAT_ROWS = 20_000  # a larger bank is cut into cells, of which a query looks into the nearest
CELL_ROWS = 1_000_000  # in a still larger bank a graph finds the nearest cells
CELLS = 0.4  # cells over the square root of the number of texts
CELLS_PER_PROBE = 9  # a query looks into one cell in so many
ROUNDS, POINTS = 6, 25  # of k-means, which finds the cells, and texts a cell that it looks at
CODE_WIDTH = 4  # places of a vector in one 4-bit code: coarse, since the score ranks the candidates
LINKS = 32  # of a node of the graph
BLOCK = 65_536  # texts encoded at once


class Candidates:
    """An inner-product index over the bank: exact, or of coded vectors in cells (IVF, PQ), or with a graph (HNSW) over
    the cells; `bounds` are the largest sizes without cells and without a graph.
    """

    def __init__(self, encoder: Encoder, bank: Sequence[str], bounds: tuple[int, int] = (FLAT_ROWS, CELL_ROWS)):
        self.encoder, threads = encoder, faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)  # so that every machine builds the same
        try:
            self.index = self._build(bank, bounds)
        finally:
            faiss.omp_set_num_threads(threads)

    def _build(self, bank: Sequence[str], bounds: tuple[int, int]) -> faiss.Index:
        first = self._vectors(bank[:BLOCK])
        kind = _factory_name(first.shape[1], len(bank), bounds)
        index: Any = faiss.index_factory(first.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            index.by_residual = False  # codes of texts find more here than codes of their distance to the cell's centre
            index.cp.niter, index.cp.max_points_per_centroid, index.cp.min_points_per_centroid = ROUNDS, POINTS, 1
            index.pq.cp.niter = ROUNDS
            index.train(self._vectors(bank[:: max(1, len(bank) // (index.nlist * POINTS))]))
        index.add(first)
        for begin in range(BLOCK, len(bank), BLOCK):
            index.add(self._vectors(bank[begin : begin + BLOCK]))
        return index

    def nearest(self, texts: Sequence[str], count: int) -> np.ndarray:
        """Bank positions of the `count` nearest texts, nearest first; -1 where fewer are found.

        Shape (len(texts), min(count, bank)). A count as large as the bank gives all of it.
        """
        params = None
        if isinstance(self.index, faiss.IndexIVF):
            cells = self.index.nlist
            probes = cells if count >= self.index.ntotal else max(1, cells // CELLS_PER_PROBE)
            params = faiss.SearchParametersIVF(nprobe=probes)  # type: ignore[call-arg]  # its stub lacks the keywords
        return self.index.search(self._vectors(texts), min(count, self.index.ntotal), params=params)[1]

    def _vectors(self, texts: Sequence[str]) -> np.ndarray:
        return np.ascontiguousarray(self.encoder.encode(texts), dtype=np.float32)


def _factory_name(dimension: int, rows: int, bounds: tuple[int, int]) -> str:
    """FAISS's name of the index for so many rows."""
    flat, cells = bounds
    if rows <= flat:
        return "Flat"
    codes = next(n for n in range(dimension // CODE_WIDTH, 0, -1) if dimension % n == 0)
    return f"IVF{max(1, int(CELLS * rows**0.5))}{'' if rows <= cells else f'_HNSW{LINKS}'},PQ{codes}x4fs"
