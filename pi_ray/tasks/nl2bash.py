"""NL2Bash (Lin et al., 2018): one English sentence -> one Bash command; template after the paper's Figure 7."""

import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from pi_ray.errors import DataError
from pi_ray.protocols import SPLITS, Reject, Row
from pi_ray.tasks.dataset import DatasetTask

HUB = "jiacheng-ye/nl2bash"  # the same split: 8,090 / 609 / 606


class Nl2BashTask(DatasetTask):
    """Line i of `<split>.nl` asks, line i of `<split>.cm` answers; both in `task.folder`, or without it from the hub.

    Scored by exact match, while the paper reports BLEU. `task.docs` is a folder of tldr pages, of which those of the
    most used utilities become the template's documents.
    """

    template_file = "nl2bash.md"
    data_files = tuple(f"{split}.{kind}" for split in SPLITS for kind in ("nl", "cm"))
    must_hold = (
        "train, dev and test, each as .nl (sentences) and .cm (commands) with parallel lines. The data set is "
        "published on GitHub as TellinaTool/nl2bash (data/bash, with scripts that make the splits)"
    )

    def documents(self) -> tuple[str, ...]:
        """Pages of the utilities that the training commands use most. Other pages are not read."""
        pages = {path.stem: path for path in Path(self.config.docs).glob("*.md")}
        unused = (
            "holds no page of a utility in the training commands: it must be a folder of tldr pages (find.md, "
            "grep.md), published on GitHub as tldr-pages/tldr (pages/common); leave it empty for the task's own"
        )
        chosen = self.most_used(utilities, pages, unused)
        return tuple(_document(pages[utility], self.config.docs_examples) for utility in chosen)

    def read_split(self, split: str) -> Iterator[Row | Reject]:
        if not self.config.folder:
            for number, row in enumerate(self.load_hub_rows(HUB, split), start=1):
                yield _row(row["nl"], row["bash"], HUB, number, split)
            return
        self.require_files()
        source = self.folder / f"{split}.nl"
        with open(source, "rb") as queries, open(self.folder / f"{split}.cm", "rb") as answers:
            for number, (query, answer) in enumerate(zip_longest(queries, answers), start=1):
                if query is None or answer is None:
                    problem = f"have different numbers of lines (one ends before line {number})"
                    raise DataError(f"{self.folder}: {split}.nl and {split}.cm {problem}")
                try:
                    yield _row(query.decode("utf-8"), answer.decode("utf-8"), str(source), number, split)
                except UnicodeDecodeError as error:
                    yield Reject(str(source), number, f"not UTF-8 ({error.reason})")


def utilities(command: str) -> list[str]:
    """The first word of each piece between pipes. Quoted pipes and `sudo` do not matter: this only ranks documents."""
    return [words[0] for piece in command.split("|") if (words := piece.split())]


def _document(path: Path, examples: int) -> str:
    """A tldr page -> name, first sentence of the description, and the first examples, each with its command."""
    try:
        page = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error})") from None
    description = re.search(r"^> (.+)", page, flags=re.M)
    if not description:
        raise DataError(f"{path}: not a tldr page, for it has no description after '> '; take it out of task.docs")
    shown = re.findall(r"^- (.+)\n\n`(.+)`$", page, flags=re.M)[:examples]
    lines = [f"- {purpose} `{_fill_placeholders(command)}`" for purpose, command in shown]
    return "\n".join([f"## {path.stem}", description[1], *lines])


def _fill_placeholders(command: str) -> str:
    """{{path/to/file}} -> path/to/file, and of alternatives the first: {{[-n|--max-args]}} -> -n, {{f|d}} -> f."""
    return re.sub(r"\{\{(.*?)\}\}(?!\})", lambda m: re.sub(r"^\[(-.*)\]$", r"\1", m[1]).split("|")[0], command)


def _row(query: str, answer: str, source: str, number: int, split: str) -> Row | Reject:
    texts = query.strip(), answer.strip()
    if not all(texts) or "\0" in "".join(texts):
        return Reject(source, number, "the sentence or its command is empty or holds a NUL character")
    return Row(f"{split}-{number}", *texts)
