"""BLEU of one output: sacrebleu's sentence BLEU (13a, effective order). An evaluation reports BLEU of all rows."""

from sacrebleu.metrics.bleu import BLEU

from pi_ray.config import MetricConfig, TaskConfig
from pi_ray.protocols import Row


class SentenceBleu:
    """BLEU of each output as a share, 0 to 1."""

    def __init__(self, config: MetricConfig, task: TaskConfig):
        self.bleu = BLEU(effective_order=True)

    def score(self, row: Row, output: str) -> float:
        return min(1.0, self.bleu.sentence_score(output, [row.answer]).score / 100)
