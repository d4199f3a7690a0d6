"""Families of open models: each is trained, published and served, and docs/models.md says what pi-ray does with it."""

import pytest

from tests.bench.families import BEGIN, END, FAMILIES, PAGE, examine, table


@pytest.fixture(scope="module")
def rows():
    """Family -> its row in docs/models.md."""
    written = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    return {line.split(" | ")[0].removeprefix("| "): line for line in written.strip().splitlines()[2:]}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_trained_and_served_as_the_page_says(family, rows, tmp_path):
    assert table([examine(family, tmp_path)]).splitlines()[2] == rows[family], "python -m tests.bench.families --write"


def test_the_page_has_every_family_and_no_other(rows):
    assert list(rows) == list(FAMILIES)
