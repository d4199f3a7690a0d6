"""Writes what the documents take from the code: docs/configuration.md, and floors and file map of docs/architecture.md.

    python docs/site/generate.py            # write both; run it after a change of a key or of a file's docstring
    python docs/site/generate.py --check    # change nothing; exit code 1 where a page is not what it would be
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pi_ray.config import RunConfig
from pi_ray.config.block import LARGEST, Block

DOCS = Path(__file__).parents[1]
REPO = DOCS.parent
FLOORS = ("<!-- floors -->", "<!-- end of the floors -->")
MAP = ("<!-- file map: written by docs/site/generate.py -->", "<!-- end of the file map -->")
WORDS = {
    "integer": "whole number", "number": "number", "boolean": "`true`, `false`", "string": "text", "null": "nothing",
}  # fmt: skip
LIMITS = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
INTRO = """\
# Configuration

This page is written by `python docs/site/generate.py` from the classes in `pi_ray/config`, which check every run file.

A run file holds blocks of keys. `pi-ray init my-task/` writes one with the dozen keys that most people need; every key
that a file leaves out has the default of this page. `pi-ray show my-task/run.yaml` prints all keys as a run has them,
`pi-ray schema` prints the JSON Schema for an editor, and `section.key=value` on the command line overrides a key. A
mistake is answered with file, line, key and the closest match.

Paths under `task` start from the run file's folder; run directory, adapter store and keys file start from the current
folder.
"""


def configuration_page() -> str:
    """docs/configuration.md: a heading for each block and a table of its keys."""
    top = {name: field for name, field in RunConfig.model_fields.items() if _block_of(field.annotation) is None}
    sections = [INTRO, "## Top level\n\n" + _table(RunConfig, "", top)]
    for name, field in RunConfig.model_fields.items():
        sections += _sections(name, _block_of(field.annotation))
    return "\n".join(sections)


def _sections(path: str, block: type[Block] | None) -> Iterator[str]:
    """One section for the block at `path`, and one for each block inside."""
    if block is None:
        return
    own = {name: field for name, field in block.model_fields.items() if _block_of(field.annotation) is None}
    about = _paragraph(block.__dict__.get("__doc__") or "")
    yield f"{'#' * (2 + path.count('.'))} {path}\n\n{_wrapped(about)}{_table(block, path, own)}"
    for name, field in block.model_fields.items():
        yield from _sections(f"{path}.{name}", _block_of(field.annotation))


def _block_of(annotation: Any) -> type[Block] | None:
    """The block class of a key that holds one block, or None; a list of blocks (schedule.list) is a value."""
    if typing.get_origin(annotation) is tuple:
        return None
    options = (annotation, *typing.get_args(annotation))
    return next((a for a in options if isinstance(a, type) and issubclass(a, Block)), None)


def _table(block: type[Block], path: str, fields: dict[str, Any]) -> str:
    schema = block.model_json_schema()
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        key = f"{path}.{name}" if path else name
        default = "**required**" if field.is_required() else f"`{_yaml(field.get_default(call_default_factory=True))}`"
        values = _type(schema["properties"][name], schema)
        lines.append(f"| `{key}` | {values} | {default} | {_cell(field.description or '')} |")
    return "\n".join(lines) + "\n"


def _type(schema: dict[str, Any], whole: dict[str, Any]) -> str:
    """The values that a key takes, in words."""
    if "$ref" in schema:
        return _type(whole["$defs"][schema["$ref"].rpartition("/")[2]], whole)
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_type(option, whole) for option in schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(f"`{_yaml(value)}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{_yaml(schema['const'])}`"
    kind = schema.get("type")
    if kind == "array":
        return f"list of {_plural(_type(schema.get('items') or (schema.get('prefixItems') or [{}])[0], whole))}"
    if kind == "object" and "properties" in schema:
        return "{" + ", ".join(schema["properties"]) + "}"
    if kind == "object":
        return f"name: {_type(schema.get('additionalProperties') or {}, whole)}"
    limits = [f"{word} {schema[key]:g}" for key, word in LIMITS.items() if schema.get(key, LARGEST) != LARGEST]
    return " ".join([WORDS.get(str(kind), "any value"), *limits])


def _plural(words: str) -> str:
    return {"text": "texts", "whole number": "whole numbers"}.get(words, words)


def _yaml(value: Any) -> str:
    """A default as a run file would write it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, Block):
        return "see its own section"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_yaml(v) for v in value) + "]"
    if isinstance(value, str):
        return value.replace("\n", "\\n") if value and value.strip() == value else f'"{value}"'
    return str(value) if value != {} else "{}"


def _cell(text: str) -> str:
    """Text for a table's cell: what Markdown would take for markup is escaped, outside of `code`."""
    parts = " ".join(text.split()).replace("|", "\\|").split("`")
    return "`".join(part if i % 2 else part.replace("<", "&lt;").replace("*", "\\*") for i, part in enumerate(parts))


def _wrapped(text: str) -> str:
    """A paragraph of at most 120 columns and the empty line behind it; "" for no text."""
    return "\n".join(textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False)) + "\n\n" if text else ""


def _paragraph(docstring: str) -> str:
    """The first paragraph of a docstring on one line."""
    return " ".join(docstring.strip().partition("\n\n")[0].split())


def first_sentence(path: Path) -> str:
    """The first sentence of a module's docstring; "" without one."""
    text = _paragraph(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")
    return re.split(r"(?<=[a-z0-9)`\]\"'])\.\s+(?=[A-Z`\"])", text, maxsplit=1)[0].rstrip(".")


def file_map() -> str:
    """A heading for each folder of pi_ray, its docstring, and a table with a line for each module, by whole path."""
    folders: dict[Path, list[Path]] = {}
    for path in sorted((REPO / "pi_ray").rglob("*.py")):
        folders.setdefault(path.parent, []).append(path)
    parts = []
    for folder, files in sorted(folders.items()):
        about = _paragraph(ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or "")
        lines = ["| file | contents |", "|---|---|"]
        lines += [f"| `{p.relative_to(REPO)}` | {_cell(first_sentence(p))} |" for p in files if p.name != "__init__.py"]
        table = "\n".join(lines) + "\n" if len(lines) > 2 else ""
        parts.append(f"### {folder.relative_to(REPO)}\n\n{_wrapped(_cell(about))}{table}")
    return "\n".join(parts)


def floors() -> str:
    """The floors of tests/unit/test_architecture.py as a numbered list, from the top down."""
    tree = ast.parse((REPO / "tests" / "unit" / "test_architecture.py").read_text(encoding="utf-8"))
    assigned = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    paths = [[Path("pi_ray", *name.split(".")) for name in floor] for floor in ast.literal_eval(assigned["FLOORS"])]
    named = [", ".join(f"`{p if (REPO / p).is_dir() else p.with_suffix('.py')}`" for p in floor) for floor in paths]
    return "".join(f"1. {line}\n" for line in reversed(named))


def architecture_page(text: str) -> str:
    """docs/architecture.md with its floors and file map written anew; the rest of it is written by hand."""
    for (begin, end), content in ((FLOORS, floors()), (MAP, file_map())):
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n\n{content}\n{end}{rest.partition(end)[2]}"
    return text


def pages() -> dict[Path, str]:
    """Path -> the text that the page should have."""
    architecture = DOCS / "architecture.md"
    text = architecture.read_text(encoding="utf-8")
    return {DOCS / "configuration.md": configuration_page(), architecture: architecture_page(text)}


def stale() -> list[Path]:
    """Pages that are not what the code says."""
    return [path for path, text in pages().items() if not path.exists() or path.read_text(encoding="utf-8") != text]


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit("\n".join(f"{path} is not current: run python docs/site/generate.py" for path in stale()) or 0)
    for page, content in pages().items():
        page.write_text(content, encoding="utf-8")
