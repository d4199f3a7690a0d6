"""LongLLMLingua (Jiang et al. 2023, arXiv 2310.06839): keep what a question makes likelier.

A token scores by contrastive perplexity: how much less it surprises the model once it has read the question (their section 4.1). A text
is cut into segments, ranked by how likely the question is after each, and a segment's rate follows its rank (4.1, 4.3). The template is
the same for every query, so the question is fixed: `compress.question`. Not here: reordering, which would change what a prompt means, and
scoring on the compressed beginning instead of the whole. The `llmlingua` package's own does not run on current transformers.
"""

from __future__ import annotations

from pi_ray.compress import words
from pi_ray.compress.ranking import Ranking, RankingCompressor, keep_best
from pi_ray.compress.surprisal import SurprisalModel
from pi_ray.config import CompressConfig

QUESTION = "What must be known to do this task for a new input?"
STATEMENT = " We can get the answer to this question in the given documents."  # theirs, which steadies the ranking
SPREAD = 0.3  # how far the best segment's rate lies above the mean, and the worst one's below (their delta tau)
SEGMENT_WORDS = 60


class LongLLMLingua(RankingCompressor):
    """Compressor "longllmlingua"."""

    def __init__(self, config: CompressConfig):
        super().__init__()
        self.causal = SurprisalModel(config)
        self.question = config.question or QUESTION
        self._order: dict[str, list[range]] = {}

    def rank(self, text: str) -> Ranking:
        pieces = words.word_spans(text)
        offsets, alone = self.causal.surprise(text)
        _, asked = self.causal.surprise(text, self.question + "\n\n")
        tokens, gain = words.tokens_by_span(pieces, offsets), alone - asked
        return Ranking(pieces, [float(gain[t].mean()) if t else 0.0 for t in tokens], [len(t) for t in tokens])

    def compress(self, text: str, rate: float) -> str:
        found = self.ranking(text)
        kept = [False] * len(found.pieces)
        order = self._segments(text)
        for place, part in enumerate(order):
            own = segment_rate(rate, place, len(order))
            kept[part.start : part.stop] = keep_best(found.scores[part.start : part.stop], found.sizes[part.start : part.stop], own)
        return words.join_words(text, found.pieces, kept)

    def _segments(self, text: str) -> list[range]:
        """The segments of `text`, as ranges of its words, the one that suits the question best first."""
        if text not in self._order:
            pieces, parts = words.word_spans(text), split_segments(text)
            if len(parts) > 1:
                parts.sort(key=lambda p: self._unlikely(text[pieces[p.start][0] : pieces[p.stop - 1][1]]))
            self._order = {text: parts}  # one text at a time is asked for at many rates
        return self._order[text]

    def _unlikely(self, segment: str) -> float:
        _, loss = self.causal.surprise(self.question + STATEMENT, segment + "\n\n")
        return float(loss.mean())


def split_segments(text: str) -> list[range]:
    """Whole lines of `text`, gathered to at least SEGMENT_WORDS words, as ranges of words; the last one may be shorter."""
    pieces, found, first = words.word_spans(text), [], 0
    for i in range(1, len(pieces)):
        if i - first >= SEGMENT_WORDS and "\n" in text[pieces[i - 1][1] : pieces[i][0]]:
            found.append(range(first, i))
            first = i
    return [*found, range(first, len(pieces))] if pieces else []


def segment_rate(rate: float, place: int, count: int) -> float:
    """The rate of the segment at `place` of `count`, best first: evenly spread around `rate`, between 0 and 1."""
    spread = min(SPREAD, rate, 1 - rate)
    return rate + spread * (1 - 2 * place / (count - 1)) if count > 1 else rate
