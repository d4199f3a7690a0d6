"""LongLLMLingua (Jiang et al. 2023, arXiv 2310.06839): keep the tokens that a question makes likelier.

A token scores by contrastive perplexity: how much its surprisal falls once the model has read the question (their
section 4.1). A text is cut into segments, ranked by how likely the question is after each, and a segment's rate follows
its rank (4.1, 4.3). The template is the same for every query, so the question is fixed: `compress.question`. Left out
are reordering, which would change what a prompt means, and scoring on the compressed beginning instead of the whole.
The `llmlingua` package's own version does not run on current transformers.
"""

from __future__ import annotations

from pi_ray.compress import words
from pi_ray.compress.ranking import Ranking, RankingCompressor, keep_best
from pi_ray.compress.surprisal import SurprisalModel
from pi_ray.config import CompressConfig

QUESTION = "What must be known to do this task for a new input?"
# the authors', which steadies the ranking
STATEMENT = " We can get the answer to this question in the given documents."
SPREAD = 0.3  # how far the best segment's rate lies above the mean, and the worst one's below (their delta tau)
SEGMENT_WORDS = 60


class LongLLMLingua(RankingCompressor):
    """Compressor "longllmlingua"."""

    def __init__(self, config: CompressConfig):
        super().__init__()
        self.model = SurprisalModel(config)
        self.question = config.question or QUESTION
        self._order: dict[str, list[range]] = {}

    def rank(self, text: str) -> Ranking:
        offsets, alone = self.model.surprisal(text)
        _, after_question = self.model.surprisal(text, self.question + "\n\n")
        return Ranking.from_tokens(words.word_spans(text), offsets, alone - after_question)

    def compress(self, text: str, rate: float) -> str:
        ranking = self.ranking(text)
        kept = [False] * len(ranking.pieces)
        order = self._segments(text)
        for place, segment in enumerate(order):
            part = slice(segment.start, segment.stop)
            kept[part] = keep_best(ranking.scores[part], ranking.sizes[part], segment_rate(rate, place, len(order)))
        return words.join_words(text, ranking.pieces, kept)

    def _segments(self, text: str) -> list[range]:
        """The segments of `text`, as ranges of its words, the one that suits the question best first."""
        if text not in self._order:
            pieces, segments = words.word_spans(text), split_segments(text)
            if len(segments) > 1:
                segments.sort(key=lambda s: self._question_surprisal(text[pieces[s.start][0] : pieces[s.stop - 1][1]]))
            self._order = {text: segments}  # one text at a time is compressed at many rates
        return self._order[text]

    def _question_surprisal(self, segment: str) -> float:
        return float(self.model.surprisal(self.question + STATEMENT, segment + "\n\n")[1].mean())


def split_segments(text: str) -> list[range]:
    """Ranges of words: whole lines of `text`, gathered to at least SEGMENT_WORDS words; the last may be shorter."""
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
