"""The documents: links resolve, generated pages are current, named files exist, the site builds without a warning."""

import importlib.util
import re
import subprocess
import sys

import pytest

from tests.unit.docs.pages import DOCS, NAMES, REPO, anchors, inline_code, prose

README = (REPO / "README.md").read_text()
ARCHITECTURE = (DOCS / "architecture.md").read_text()
MODULES = sorted(p.relative_to(REPO).as_posix() for p in (REPO / "pi_ray").rglob("*.py") if p.name != "__init__.py")
KINDS = "py|md|html|yaml|yml|json|css|txt|j2|sh|svg"


def generator():
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "site" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_has_at_most_a_thousand_words_one_picture_and_one_table():
    assert len(README.split()) <= 1000
    assert len(re.findall(r"!\[[^\]]+\]\(", README)) == 1
    assert len(re.findall(r"^\|[-|]+\|$", README, re.M)) == 1


@pytest.mark.parametrize("page", NAMES)
def test_relative_links_and_images_resolve(page):
    path = REPO / page
    for text, target in re.findall(r"!?\[([^\]]*)\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        name, _, fragment = target.partition("#")
        there = (path.parent / name).resolve() if name else path
        assert there.exists(), f"{page}: [{text}] leads to {target}, which does not exist"
        assert there.is_relative_to(REPO)
        if fragment:
            assert fragment in anchors(there), f"{page}: {target} names no heading of {there.name}"
        if DOCS in path.parents:
            assert DOCS in there.parents, f"{page}: {target} is outside of the site"


@pytest.mark.parametrize("page", NAMES)
def test_every_file_that_a_page_names_exists(page):
    """By whole path from the repository's root: pi_ray/..., jobs/..., cluster/..., serve/..., tests/..., docs/..."""
    text, top = (REPO / page).read_text(), "(?:pi_ray|jobs|cluster|serve|tests|docs)"
    named = re.findall(rf"(?<![\w/.-])({top}/[\w./-]*\.(?:{KINDS}))(?![\w*])", text)
    folders = re.findall(rf"`({top}(?:/[\w-]+)*/?)`", text)
    missing = sorted({name for name in (*named, *folders) if not (REPO / name).exists()})
    assert not missing, f"{page} names what does not exist: {', '.join(missing)}"


@pytest.mark.parametrize("module", MODULES)
def test_every_module_stands_in_the_file_map_by_its_whole_path(module):
    assert f"| `{module}` |" in ARCHITECTURE, f"{module} is not in the file map: run python docs/site/generate.py"


def test_the_file_map_lists_nothing_else():
    assert sorted(re.findall(r"^\| `(pi_ray/[^`]+\.py)` \|", ARCHITECTURE.partition("## File map")[2], re.M)) == MODULES


def test_every_line_of_the_file_map_says_something():
    assert re.findall(r"^\| `(pi_ray/[^`]+)` \| +\|$", ARCHITECTURE, re.M) == []


def test_where_is_it_answers_twenty_questions_with_files_that_exist():
    table = ARCHITECTURE.partition("## Where is it?")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+\?) \| ([^|]+) \|$", table, re.M)
    assert len(rows) >= 20 and len({question for question, _ in rows}) == len(rows)
    for question, answer in rows:
        files = re.findall(r"`([^`]+)`", answer)
        assert files and all((REPO / name).is_file() for name in files), f"{question} {answer}"


def test_the_run_directory_holds_what_the_page_says(tmp_path):
    from pi_ray.run.directory import RunDir

    (listing,) = re.findall(r"^runs/NAME/\n(.*?)\n\n", ARCHITECTURE, re.S | re.M)
    listed = {line.split()[0].partition("/")[0] for line in listing.splitlines()}
    known = {path.relative_to(tmp_path).parts[0] for path in vars(RunDir(tmp_path)).values() if path != tmp_path}
    assert known <= listed and listed - known <= {"loss.svg", "baselines"}


def test_generated_pages_are_current():
    stale = generator().stale()
    assert not stale, f"{', '.join(p.name for p in stale)}: run python docs/site/generate.py, which writes them"
    check = [sys.executable, DOCS / "site" / "generate.py", "--check"]
    done = subprocess.run(check, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_generator_notices_a_page_that_is_not_current(tmp_path, monkeypatch):
    generate = generator()
    (tmp_path / "configuration.md").write_text(generate.configuration_page().replace("`train.lr`", "`train.rate`"))
    (tmp_path / "architecture.md").write_text(ARCHITECTURE.replace("`pi_ray/prompt.py` |", "`pi_ray/prompts.py` |"))
    monkeypatch.setattr(generate, "DOCS", tmp_path)
    assert {path.name for path in generate.stale()} == {"configuration.md", "architecture.md"}


def test_configuration_lists_every_key_once():
    from pi_ray.config import RunConfig

    text = (DOCS / "configuration.md").read_text()
    keys = set(_keys(RunConfig.model_validate({"name": "x"}).model_dump()))
    listed = re.findall(r"^\| `([\w.]+)` \|", text, re.M)
    assert len(listed) == len(set(listed)) and keys <= set(listed), sorted(keys - set(listed))


def _keys(values, path=""):
    """Dotted keys of a dumped run file; a mapping that people fill, such as cluster.labels, is a value."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _keys(value, f"{path}{key}.")
        else:
            yield f"{path}{key}"


@pytest.mark.parametrize("page", NAMES)
def test_keys_that_a_page_names_exist(page):
    """Such as `train.lr` or `schedule.steps: [3, 3, 12]`; a block with a key that nobody knows is a mistake."""
    from pi_ray.config import RunConfig

    blocks = {name for name, field in RunConfig.model_fields.items() if hasattr(field.annotation, "model_fields")}
    known = set(re.findall(r"^\| `([\w.]+)` \|", (DOCS / "configuration.md").read_text(), re.M))
    known |= {key.rpartition(".")[0] for key in known} | {key.rpartition(".")[0].rpartition(".")[0] for key in known}
    named = {m for code in inline_code(page) for m in re.findall(r"^([a-z_]+(?:\.[a-z_]+)+)(?=$|[:= ])", code)}
    keys = {key for key in named if key.partition(".")[0] in blocks and not re.search(rf"\.({KINDS}|jsonl)$", key)}
    assert keys <= known, f"{page}: {', '.join(sorted(keys - known))}"


def test_readme_repeats_the_benchmarks_word_for_word():
    """Numbers have one home; README's table is a copy that this keeps true."""

    def rows(text: str) -> list[str]:
        return [line for line in text.partition("<!-- result:")[2].splitlines()[1:7] if line.startswith("|")]

    benchmarks = (DOCS / "benchmarks.md").read_text()
    assert len(rows(README)) == 5 and rows(README) == rows(benchmarks)
    for number in re.findall(r"[\d.]+ times|[\d.]+ BLEU|\d+ labelled rows|\d+ test\s+rows", README):
        assert number.split()[0] in benchmarks, f"README says {number!r}, docs/benchmarks.md does not"


def test_readmes_folders_are_those_of_the_repository():
    tracked = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    top = {p.partition("/")[0] for p in tracked.splitlines() if "/" in p and not p.startswith(".")}
    assert set(re.findall(r"^- `(\w+)/` ", README, re.M)) == top


def test_every_page_is_in_the_navigation_and_reached_from_readme():
    nav = (DOCS / "site" / "mkdocs.yml").read_text()
    for page in DOCS.glob("*.md"):
        assert page.name in nav
        assert f"docs/{page.name}" in README or page.name == "index.md"


def test_the_site_builds_without_a_warning(tmp_path):
    settings = DOCS / "site" / "mkdocs.yml"
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-f", settings, "-d", tmp_path]
    environment = {"PATH": "/usr/bin:/bin", "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=REPO, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "how-it-works" / "index.html").is_file() and not list(tmp_path.rglob("generate.py"))
    html = "".join(p.read_text() for p in tmp_path.rglob("*.html"))
    asked = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"?(https?://[^\" >]+)", html)
    assert asked == [], "a page asks another server for something"


def test_the_picture_is_drawn_for_light_and_dark_pages():
    svg = (DOCS / "images" / "phases.svg").read_text()
    assert "@media (prefers-color-scheme: dark)" in svg and "<title" in svg and "<desc" in svg
    assert not re.search(r"(?:href|src|url\()\s*=?\s*[\"']?https?:", svg)


@pytest.mark.parametrize("page", [name for name in NAMES if not name.endswith("configuration.md")])
def test_prose_keeps_to_120_columns(page):
    long = [line for line in prose(page).splitlines() if len(line) > 120]
    long = [line for line in long if not line.lstrip().startswith(("|", "<!--"))]
    assert not long, f"{page}: {long[0]}"


def test_how_it_works_has_a_line_for_each_part_of_the_paper():
    text = (DOCS / "how-it-works.md").read_text()
    first = [line.split("|")[1] for line in text.splitlines() if line.startswith("| ")]
    parts = ["Section 3", "Section 4.1", "Section 4.2", "Section 4.3", "Section 5.1", "Section 5.5", "Tables 1 to 8"]
    parts += [f"quation {i}" for i in range(1, 5)] + [f"Appendix {a}" for a in ("A.2", "A.3", "A.4", "B", "C.1", "C.2")]
    parts += [f"lines {lines}" for lines in ("1 to 7", "8 to 12", "13 and 14")]
    assert [part for part in parts if not any(part in cell for cell in first)] == []
    for reason in ("Middle rates", "Constants of exp", "MBPP", "answer tokens", "best adapter", "Ray Data's iterators"):
        assert reason in text, f"where we differ: {reason}"
