"""Names of metrics as people read them, in tables and within sentences."""

METRIC_NAMES = {
    "exact_match": "Exact match", "bleu": "BLEU", "execution": "Execution match", "normalized": "Normalized match",
    "contains": "Containment", "regex": "Pattern match", "number": "Number match", "choice": "Choice match", "f1": "F1",
    "rouge_l": "ROUGE-L", "json": "JSON field match", "tool_call": "Tool-call match", "judge": "Judge's grade",
}


def metric_name(metric: str) -> str:
    return METRIC_NAMES.get(metric, metric.replace("_", " ").capitalize())


def metric_in_sentence(metric: str) -> str:
    """The name within a sentence: small letters, but for an abbreviation at its front."""
    name = metric_name(metric)
    return name if name.split()[0].isupper() else name.lower()
