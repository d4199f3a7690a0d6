"""The bundled task: requests in English -> alerts in OpsQL, a language that no public model has seen."""

from collections.abc import Iterator
from importlib.resources import files
from itertools import islice

from pi_ray.config import TaskConfig
from pi_ray.metrics import exact_match
from pi_ray.prompt import Template
from pi_ray.protocols import SPLITS, UNLABELLED, Row
from pi_ray.run.artifact import digest
from pi_ray.tasks.opsql.generate import generate_rows
from pi_ray.tasks.opsql.language import OpsqlError, execute_statement, parse_statement


class OpsqlTask:
    """Generated rows (always the same) and a packaged template; `task.rows.<split>: n` takes the first n."""

    def __init__(self, config: TaskConfig):
        self.config = config

    def rows(self, split: str) -> Iterator[Row]:
        return islice(generate_rows()[split], getattr(self.config.rows, split) or None)

    def template(self) -> Template:
        return Template.parse(files("pi_ray.tasks.opsql").joinpath("template.md").read_text(encoding="utf-8"))

    def score(self, row: Row, output: str) -> dict[str, float]:
        """"exact_match" of the text; "execution": the alert fires in the same minutes and tells the same route."""
        try:
            same = execute_statement(parse_statement(output)) == execute_statement(parse_statement(row.answer))
        except OpsqlError:
            same = False
        return {"exact_match": exact_match(output, row.answer), "execution": float(same)}

    def fingerprint(self) -> str:
        rows = [[[r.id, r.query, r.answer, r.group] for r in self.rows(split)] for split in (*SPLITS, UNLABELLED)]
        return digest([self.template().text, *rows])
