"""LongLLMLingua (Jiang et al. 2023, arXiv 2310.06839): keep the tokens that a question makes likelier.

A token scores by contrastive perplexity: how much its surprisal falls once the model has read the question (their
section 4.1). A text is cut into segments, ranked by how likely the question is after each, and a segment's rate follows
its rank (4.1, 4.3). The template is the same for every query, so the question is fixed: `compress.question`. Left out
are reordering, which would change what a prompt means, and scoring on the compressed beginning instead of the whole.
The `llmlingua` package's own version does not run on current transformers.
"""

from collections.abc import Sequence
from dataclasses import replace

from pi_ray.compress import words
from pi_ray.compress.ranking import Ranking, RankingCompressor, SurprisalModel, keep_best
from pi_ray.config import CompressConfig

QUESTION = "What must be known to do this task for a new input?"
STATEMENT = " We can get the answer to this question in the given documents."  # the authors'; it steadies the ranking
SPREAD = 0.3  # how far the best segment's rate lies above the mean, and the worst one's below (their delta tau)
SEGMENT_WORDS = 60


class LongLLMLingua(RankingCompressor):
    """Compressor "longllmlingua"."""

    def __init__(self, config: CompressConfig):
        super().__init__()
        self.model = SurprisalModel(config)
        self.question = config.question or QUESTION

    def rank(self, text: str) -> Ranking:
        offsets, alone = self.model.surprisal(text)
        _, after_question = self.model.surprisal(text, self.question + "\n\n")
        pieces = words.word_spans(text)

        def question_surprisal(segment: range) -> float:
            part = text[pieces[segment.start][0] : pieces[segment.stop - 1][1]]
            return float(self.model.surprisal(self.question + STATEMENT, part + "\n\n")[1].mean())

        segments = split_segments(text, pieces)
        if len(segments) > 1:
            segments.sort(key=question_surprisal)
        return replace(Ranking.from_tokens(pieces, offsets, alone - after_question), segments=segments)

    def compress(self, text: str, rate: float) -> str:
        ranking = self.ranking(text)
        kept = [False] * len(ranking.pieces)
        for place, segment in enumerate(ranking.segments):
            part, own = slice(segment.start, segment.stop), segment_rate(rate, place, len(ranking.segments))
            kept[part] = keep_best(ranking.scores[part], ranking.sizes[part], own)
        return words.join_words(text, ranking.pieces, kept)


def split_segments(text: str, pieces: Sequence[words.Span]) -> list[range]:
    """Ranges of words: whole lines of `text`, gathered to at least SEGMENT_WORDS words; the last may be shorter."""
    found, first = [], 0
    for i in range(1, len(pieces)):
        if i - first >= SEGMENT_WORDS and "\n" in text[pieces[i - 1][1] : pieces[i][0]]:
            found.append(range(first, i))
            first = i
    return [*found, range(first, len(pieces))] if pieces else []


def segment_rate(rate: float, place: int, count: int) -> float:
    """The rate of the segment at `place` of `count`, best first: evenly spread around `rate`, between 0 and 1."""
    spread = min(SPREAD, rate, 1 - rate)
    return rate + spread * (1 - 2 * place / (count - 1)) if count > 1 else rate
