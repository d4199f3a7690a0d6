"""NL2Bash (Lin et al., 2018): one English sentence -> one Bash command; template after the paper's Figure 7."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from itertools import zip_longest
from pathlib import Path

from pi_ray.artifact import digest
from pi_ray.config import TaskConfig
from pi_ray.errors import DataError
from pi_ray.prompt import Template
from pi_ray.protocols import SPLITS, Reject, Row
from pi_ray.tasks.metrics import exact_match
from pi_ray.tasks.source import fingerprint, limited

KINDS = ("nl", "cm")


class Nl2BashTask:
    """Line i of `<split>.nl` asks, line i of `<split>.cm` answers; both in `task.folder`. Scored by exact match; the paper reports BLEU."""

    def __init__(self, config: TaskConfig):
        self.config = config
        self.folder = Path(config.folder)

    def rows(self, split: str) -> Iterator[Row | Reject]:
        """Raises DataError when files are missing or do not run in parallel."""
        self._check()
        return limited(lambda: _read(self.folder, split), getattr(self.config.rows, split))

    def template(self) -> Template:
        return Template.parse(files("pi_ray.tasks").joinpath("nl2bash.md").read_text(encoding="utf-8"))

    def score(self, row: Row, output: str) -> dict[str, float]:
        return {"exact_match": exact_match(output, row.answer)}

    def fingerprint(self) -> str:
        return digest([self.template().text, fingerprint(self.config, self._paths())])

    def _paths(self) -> list[Path]:
        return [self.folder / f"{split}.{kind}" for split in SPLITS for kind in KINDS]

    def _check(self) -> None:
        missing = [path.name for path in self._paths() if not path.is_file()]
        if not self.config.folder or missing:
            raise DataError(
                f"task.folder '{self.config.folder}' lacks {', '.join(missing) or 'the data'}: it must hold train, dev and test, each as .nl (sentences) and .cm "
                "(commands) with parallel lines. The data set is published on GitHub as TellinaTool/nl2bash (data/bash, with scripts that make the splits)"
            )


def _read(folder: Path, split: str) -> Iterator[Row | Reject]:
    source = folder / f"{split}.nl"
    with open(source, "rb") as asked, open(folder / f"{split}.cm", "rb") as answered:
        for number, (query, answer) in enumerate(zip_longest(asked, answered), start=1):
            if query is None or answer is None:
                raise DataError(f"{folder}: {split}.nl and {split}.cm have different numbers of lines (one ends before line {number})")
            yield _row(query, answer, str(source), number, split)


def _row(query: bytes, answer: bytes, source: str, number: int, split: str) -> Row | Reject:
    try:
        texts = query.decode("utf-8").strip(), answer.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        return Reject(source, number, f"not UTF-8 ({error.reason})")
    if not all(texts) or "\0" in "".join(texts):
        return Reject(source, number, "the sentence or its command is empty or holds a NUL character")
    return Row(f"{split}-{number}", *texts)
