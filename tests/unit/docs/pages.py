"""The documents as tests read them: README, its neighbours and the pages of docs/, with blocks, links, headings."""

import re
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).parents[3]
DOCS = REPO / "docs"
OTHERS = [REPO / name for name in ("README.md", "CONTRIBUTING.md", "cluster/README.md")]
PAGES = sorted([*OTHERS, *DOCS.glob("*.md")])
NAMES = [str(page.relative_to(REPO)) for page in PAGES]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.S | re.M)


@dataclass(frozen=True)
class CodeBlock:
    """A fenced block: its page (a path), language, and text without the indent of a list around it."""

    page: str
    language: str
    text: str


def code_blocks(page: str, *languages: str) -> list[CodeBlock]:
    """The fenced blocks of a page, of these languages if any are given."""
    found = []
    for indent, language, text in FENCE.findall((REPO / page).read_text()):
        if not languages or language in languages:
            found.append(CodeBlock(page, language, re.sub(rf"^{indent}", "", text, flags=re.M)))
    return found


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", (REPO / page).read_text())


def inline_code(page: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


def commands(block: CodeBlock) -> list[str]:
    """The commands of a block, one for each line, without comments; continued lines are joined as a shell does."""
    lines = block.text.replace("\\\n", "").splitlines()
    return [line for line in (re.sub(r"(^|\s+)#\s.*$", "", line).strip() for line in lines) if line]


def anchors(page: Path) -> set[str]:
    """The fragments that links to a page's headings may have, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
