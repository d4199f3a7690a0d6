"""Token counts of a sample of rows, from which a plan estimates time, memory and money."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from pi_ray.config import RunConfig
from pi_ray.models import load_tokenizer, preparation_digest
from pi_ray.plan import estimate
from pi_ray.prompt import Example, PromptEncoder
from pi_ray.protocols import Row, Task
from pi_ray.report.loss_plot import read_template_entries
from pi_ray.run.artifact import is_current
from pi_ray.run.directory import RunDir
from pi_ray.run.fingerprint import prepare_fingerprint
from pi_ray.run.queries import queries_digest

SAMPLE = 256  # rows whose tokens are counted


@dataclass(frozen=True)
class TokenCounts:
    """Mean token counts over a sample of training rows, and the template's."""

    head: int  # of the prompt around an empty template
    template: int  # of the whole prefix
    query: float
    shot: float
    heading: float  # of what stands once before any examples
    label: float
    achieved: dict[float, float]  # asked rate -> achieved one, of templates that are compressed
    documents: float  # of a row, uncompressed

    def shape(self, rate: float, shots: int) -> estimate.Shape:
        kept = self.achieved.get(rate, rate) * (self.template - self.head)
        row = self.query + rate * self.documents + (self.heading + shots * self.shot if shots else 0)
        return estimate.Shape(self.head + kept, row, self.label)


def count_row_tokens(task: Task, rows: Sequence[Row], config: RunConfig, all_turns: bool = False) -> TokenCounts:
    """Count over rows that are evenly spread over the file, because files are often sorted.

    With `all_turns`, the label of a conversation is all of the assistant's turns.
    """
    encoder = PromptEncoder(load_tokenizer(config.model), config.prompt)
    sample = rows[:: max(1, len(rows) // SAMPLE)][:SAMPLE]
    examples = [Example(r.query, r.answer) for r in sample]
    others = [*examples[1:], examples[0]]
    queries, labels = [len(encoder.row(r.query)) for r in sample], [len(encoder.answer(r.answer)) for r in sample]
    whole = [len(encoder.row(r.query, (), r.documents)) for r in sample]
    if all_turns:
        turns = [encoder.all_turns(r.query, r.answer) for r in sample]
        labels = [sum(i >= 0 for i in label) for _, label in turns]
        queries = whole = [len(ids) + len(label) - learned for (ids, label), learned in zip(turns, labels, strict=True)]
    pairs = list(zip(sample, others, strict=True))
    one, two = (fmean(len(encoder.row(r.query, [other] * n)) for r, other in pairs) for n in (1, 2))
    run = RunDir(config.root)
    prepared = prepare_fingerprint(config, task.fingerprint(), queries_digest(run), preparation_digest(config))
    made = is_current(run.templates, prepared)  # from exactly this config
    return TokenCounts(
        head=len(encoder.prefix("")), template=len(encoder.prefix(task.template().text)), query=fmean(queries),
        shot=two - one, heading=one - fmean(queries) - (two - one), label=fmean(labels),
        achieved={t["rate"]: t["achieved"] for t in read_template_entries(run)} if made else {},
        documents=fmean(whole) - fmean(queries),
    )
