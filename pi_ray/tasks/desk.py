"""A routing desk: people's messages -> the code of their subject, which stands in the template alone, or its name.

The messages are those of banking77 (Casanueva et al., 2020) or CLINC150 (Larson et al., 2019), whose subjects get
made-up codes. Some subjects are hidden: no labelled row has them, so that a query-only adapter can know their codes
from the template alone. With `task.labels: names` it is the everyday list of labels, as classifiers are prompted.
"""

import csv
import json
from collections.abc import Iterator
from hashlib import sha256
from heapq import nsmallest
from itertools import count
from string import ascii_lowercase

from pi_ray.config import TaskConfig
from pi_ray.errors import DataError
from pi_ray.prompt import Template
from pi_ray.protocols import Reject, Row
from pi_ray.tasks.dataset import DatasetTask

CLINC, BANKING = "data.json", ("train.csv", "test.csv")
DEV_SHARE = 10  # one of so many training messages of banking77 is a dev row, since it has none


class DeskTask(DatasetTask):
    """`task.folder` holds train.csv and test.csv (text, category) or data.json ({train, val, test}: [[text, subject]]).

    `task.subjects` of them are used, and `task.hidden` of these are in no labelled row; which ones, and their codes,
    follow from hashes of their names. Unlabelled are all training messages without a label, those of hidden ones too.
    """

    must_hold = (
        "train.csv and test.csv of banking77 (published on GitHub as PolyAI-LDN/task-specific-datasets), or CLINC150's "
        "data_full.json as data.json (clinc/oos-eval)"
    )

    def __init__(self, config: TaskConfig):
        super().__init__(config)
        self.template_file = "desk.md" if config.labels == "codes" else "desk-names.md"
        self.data_files = (CLINC,) if (self.folder / CLINC).is_file() else BANKING
        self.require_files()
        names = sorted({subject for split in ("train", "test") for _, subject in self._messages(split)})
        chosen = nsmallest(config.subjects or len(names), names, key=_hash)
        if config.hidden >= len(chosen):
            raise DataError(f"task.hidden {config.hidden} leaves none of the {len(chosen)} subjects for labelled rows")
        self.codes = _codes(sorted(chosen)) if config.labels == "codes" else {n: _words(n) for n in sorted(chosen)}
        self.unseen = tuple(self.codes[name] for name in nsmallest(config.hidden, chosen, lambda n: _hash(f"hide {n}")))

    def template(self) -> Template:
        with_code = self.config.labels == "codes"
        lines = [f"{_words(name)}: {code}" if with_code else f"- {code}" for name, code in self.codes.items()]
        return Template(super().template().instruction, ("\n".join(["## Subjects", "", *lines]),))

    def read_split(self, split: str) -> Iterator[Row | Reject]:
        for number, (text, subject) in enumerate(self._messages(split)):
            if subject in self.codes:
                yield Row(f"{split}-{number}", text.strip(), self.codes[subject])

    def _messages(self, split: str) -> Iterator[tuple[str, str]]:
        """(message, its subject's name) of a split. Raises DataError for a file of another kind."""
        try:
            if CLINC in self.data_files:
                data = json.loads((self.folder / CLINC).read_text(encoding="utf-8"))
                yield from ((text, subject) for text, subject in data["val" if split == "dev" else split])
                return
            with open(self.folder / BANKING[split == "test"], encoding="utf-8", newline="") as file:
                for row in csv.DictReader(file):
                    is_dev = split != "test" and int(_hash(row["text"]), 16) % DEV_SHARE == 0
                    if is_dev == (split == "dev"):
                        yield row["text"], row["category"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{self.folder}: not {self.must_hold} ({type(error).__name__}: {error})") from None


def _hash(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def _words(name: str) -> str:
    return name.replace("_", " ").strip().lower()


def _codes(names: list[str]) -> dict[str, str]:
    """Name -> code, a letter and two digits, each once."""
    codes: dict[str, str] = {}
    for name in names:
        drawn = (int(_hash(f"code {turn} {name}"), 16) for turn in count())
        made = (f"{ascii_lowercase[number % 26]}{number // 26 % 100:02d}" for number in drawn)
        codes[name] = next(code for code in made if code not in codes.values())
    return codes
