"""Names of metrics in tables and sentences."""

import pytest

from pi_ray.metrics.names import metric_in_sentence, metric_name


@pytest.mark.parametrize("metric, name, within", [
    ("exact_match", "Exact match", "exact match"), ("bleu", "BLEU", "BLEU"), ("f1", "F1", "F1"),
    ("json", "JSON field match", "JSON field match"), ("pass_at_1", "Pass at 1", "pass at 1"),
    ("judge", "Judge's grade", "judge's grade"),
])  # fmt: skip
def test_names_are_words_and_abbreviations_keep_their_capitals(metric, name, within):
    assert (metric_name(metric), metric_in_sentence(metric)) == (name, within)
