"""NL2Bash (Lin et al., 2018): one English sentence -> one Bash command; template after the paper's Figure 7."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files
from itertools import zip_longest
from pathlib import Path

from pi_ray.config import TaskConfig
from pi_ray.errors import DataError
from pi_ray.prompt import Template
from pi_ray.protocols import SPLITS, Reject, Row
from pi_ray.run.artifact import digest
from pi_ray.tasks.dataset import fingerprint_files, load_hub_rows, most_used, select_rows
from pi_ray.tasks.metrics import exact_match

KINDS = ("nl", "cm")
HUB = "jiacheng-ye/nl2bash"  # the same split: 8,090 / 609 / 606


class Nl2BashTask:
    """Line i of `<split>.nl` asks, line i of `<split>.cm` answers; both in `task.folder`, or without it from the hub.

    With `task.docs`, a folder of tldr pages, the template's documents are pages of the most used utilities. Scored by exact match; the paper reports BLEU.
    """

    def __init__(self, config: TaskConfig):
        self.config = config
        self.folder = Path(config.folder)

    def rows(self, split: str) -> Iterator[Row | Reject]:
        """Raises DataError when files are missing or do not run in parallel, or the hub cannot be had."""
        return select_rows(self._read, self.config, split)

    def template(self) -> Template:
        """Raises DataError when `task.docs` has no page to use."""
        template = Template.parse(files("pi_ray.tasks").joinpath("nl2bash.md").read_text(encoding="utf-8"))
        return Template(template.instruction, self._documents()) if self.config.docs else template

    def score(self, row: Row, output: str) -> dict[str, float]:
        return {"exact_match": exact_match(output, row.answer)}

    def fingerprint(self) -> str:
        return digest([self.template().text, fingerprint_files(self.config, self._paths() if self.config.folder else ())])

    def _documents(self) -> tuple[str, ...]:
        """Pages of the utilities that all training commands use most, whatever the row limits. A page that nobody needs is not read."""
        pages = {path.stem: path for path in Path(self.config.docs).glob("*.md")}
        commands = (row.answer for row in self._read("train") if isinstance(row, Row))
        chosen = most_used((u for command in commands for u in utilities(command)), pages, self.config.docs_count)
        if not chosen:
            raise DataError(
                f"task.docs '{self.config.docs}' holds no page of a utility in the training commands: it must be a folder of tldr pages (find.md, grep.md). "
                "They are published on GitHub as tldr-pages/tldr (pages/common). Without task.docs the documents that ship with the task are used"
            )
        return tuple(_document(pages[utility], self.config.docs_examples) for utility in chosen)

    def _paths(self) -> list[Path]:
        return [self.folder / f"{split}.{kind}" for split in SPLITS for kind in KINDS]

    def _read(self, split: str) -> Iterator[Row | Reject]:
        if not self.config.folder:
            for number, row in enumerate(load_hub_rows(HUB, split), start=1):
                yield _row(row["nl"], row["bash"], HUB, number, split)
            return
        missing = [path.name for path in self._paths() if not path.is_file()]
        if missing:
            raise DataError(
                f"task.folder '{self.config.folder}' lacks {', '.join(missing)}: it must hold train, dev and test, each as .nl (sentences) and .cm "
                "(commands) with parallel lines. The data set is published on GitHub as TellinaTool/nl2bash (data/bash, with scripts that make the splits)"
            )
        yield from _lines(self.folder, split)


def utilities(command: str) -> list[str]:
    """The first word of each piece between pipes. Simple on purpose: it only ranks documents, for which quoted pipes, `sudo` and `$(...)` do not matter."""
    return [words[0] for piece in command.split("|") if (words := piece.split())]


def _document(path: Path, examples: int) -> str:
    """A tldr page -> name, first sentence of the description, and the first examples, each on a line with its command."""
    try:
        page = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error})") from None
    about = re.search(r"^> (.+)", page, flags=re.M)
    if not about:
        raise DataError(f"{path}: not a tldr page, for it has no description after '> '; take it out of task.docs")
    shown = re.findall(r"^- (.+)\n\n`(.+)`$", page, flags=re.M)[:examples]
    return "\n".join([f"## {path.stem}", about[1], *(f"- {what} `{_plain(command)}`" for what, command in shown)])


def _plain(command: str) -> str:
    """{{path/to/file}} -> path/to/file, and of alternatives the first: {{[-n|--max-args]}} -> -n, {{f|d}} -> f."""
    return re.sub(r"\{\{(.*?)\}\}(?!\})", lambda m: re.sub(r"^\[(-.*)\]$", r"\1", m[1]).split("|")[0], command)


def _lines(folder: Path, split: str) -> Iterator[Row | Reject]:
    source = folder / f"{split}.nl"
    with open(source, "rb") as asked, open(folder / f"{split}.cm", "rb") as answered:
        for number, (query, answer) in enumerate(zip_longest(asked, answered), start=1):
            if query is None or answer is None:
                raise DataError(f"{folder}: {split}.nl and {split}.cm have different numbers of lines (one ends before line {number})")
            try:
                yield _row(query.decode("utf-8"), answer.decode("utf-8"), str(source), number, split)
            except UnicodeDecodeError as error:
                yield Reject(str(source), number, f"not UTF-8 ({error.reason})")


def _row(query: str, answer: str, source: str, number: int, split: str) -> Row | Reject:
    texts = query.strip(), answer.strip()
    if not all(texts) or "\0" in "".join(texts):
        return Reject(source, number, "the sentence or its command is empty or holds a NUL character")
    return Row(f"{split}-{number}", *texts)
