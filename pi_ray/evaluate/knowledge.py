"""Knowledge of an adapter of its prompt, unit by unit: knows.json, written by the evaluation and published with it.

It quotes the prompt, so who can read it can read the prompt. Files of it may come from elsewhere: they are validated.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pi_ray.errors import CorruptArtifactError
from pi_ray.units import Kind

KNOWLEDGE_FILE = "knows.json"
MAX_TEXT = 500  # characters of a unit, a query or an answer
MAX_NAMES = 12  # that a sentence lists
NAME_WORDS = 6
Verdict = Literal["not known", "teacher unsure", "known", "not asked"]
VERDICTS: tuple[Verdict, ...] = ("not known", "teacher unsure", "known", "not asked")  # the worst first
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Number = Annotated[int, Field(ge=0, strict=True)]


class AnsweredQuestion(BaseModel):
    """A query, what it should be answered with by its label or by the teacher, and what the adapter answered."""

    model_config = ConfigDict(frozen=True)
    query: Text
    expected: Text
    source: Literal["teacher", "label"]
    answer: Text
    right: bool


class UnitKnowledge(BaseModel):
    """One unit of the prompt. `rows` and `queries` are the labelled rows and unlabelled queries that touch it.

    Of the queries the teacher gave `sure` the same answer under all of its views. The adapter was `asked` about the
    unit, by held-out queries and dev rows, and gave the expected answer to `agreed` of these.
    """

    model_config = ConfigDict(frozen=True)
    section: Text
    text: Text
    kind: Kind
    rows: Number
    queries: Number
    sure: Number
    asked: Number
    agreed: Number
    examples: Annotated[tuple[AnsweredQuestion, ...], Field(max_length=3)] = ()

    @property
    def verdict(self) -> Verdict:
        """Known: most questions were answered as expected. What the teacher is not sure of is no question."""
        if self.asked:
            return "known" if 2 * self.agreed > self.asked else "not known"
        return "teacher unsure" if self.queries and not self.sure else "not asked"

    @property
    def name(self) -> str:
        """The text before the first colon or cell of an item, else the first words."""
        if self.kind == "item":
            first = self.text.split(":")[0].split("|")[0].strip()
            if first and len(first.split()) <= NAME_WORDS:
                return first
        words = self.text.split()
        return " ".join(words[:NAME_WORDS]) + (" …" if len(words) > NAME_WORDS else "")


class Knowledge(BaseModel):
    """The content of knows.json. `adapter_sha256`: the hash in the manifest of the adapter that was asked."""

    model_config = ConfigDict(frozen=True)
    format: Literal[1] = 1
    adapter_sha256: Annotated[str, Field(max_length=64)]
    units: tuple[UnitKnowledge, ...]

    @property
    def worst_first(self) -> list[UnitKnowledge]:
        return sorted(self.units, key=lambda u: (VERDICTS.index(u.verdict), u.agreed / max(1, u.asked)))

    @property
    def sentence(self) -> str:
        """Say what is known and what to ask for, such as "37 of 40 facts are known; ask again for: ads, feeds."."""
        unknown = [u.name for u in self.worst_first if u.verdict in ("not known", "teacher unsure")]
        known = sum(u.verdict == "known" for u in self.units)
        left = len(self.units) - known - len(unknown)
        if not known + len(unknown):
            return "No dev row or held-out query is about a unit of the prompt, so what is known cannot be said."
        again = f"; ask again for: {_list_names(unknown)}" if unknown else ""
        unasked = f" {left} {'was' if left == 1 else 'were'} not asked about." if left else ""
        return f"{known} of {known + len(unknown)} facts are known{again}.{unasked}"


def _list_names(names: Sequence[str]) -> str:
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


def read_knowledge(folder: Path) -> Knowledge | None:
    """The knows.json of an evaluation's or a published adapter's folder; None where there is none.

    Raises CorruptArtifactError where it is not as the evaluation writes it.
    """
    path = folder / KNOWLEDGE_FILE
    try:
        return Knowledge.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        found = error.errors()[0]["msg"][:200]
        raise CorruptArtifactError(f"{path}: not as 'pi-ray evaluate' writes it ({found}); evaluate again") from error
