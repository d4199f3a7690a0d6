"""Deaths at every change of the disk (a sample of them here, all in `python -m tests.bench.crash`): the next try ends
with the same bits, or says what is wrong.
"""

import pytest

from tests.crash_steps import STEPS, copy_root, make_ready, outcome
from tests.crashing import run_step

pytestmark = pytest.mark.fault
SAMPLE = {"train": 47, "publish": 4, "release": 2}  # every so many points


@pytest.fixture(scope="module")
def roots(tiny_model, tmp_path_factory):
    return make_ready(tmp_path_factory.mktemp("roots"), tiny_model)


@pytest.mark.parametrize("torn", [False, True], ids=["killed", "torn"])
@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_died_ends_as_one_that_did_not(roots, tmp_path, step, torn):
    undisturbed = copy_root(roots[step], tmp_path / "undisturbed")
    changes = run_step(STEPS[step], undisturbed)
    expected = outcome(undisturbed)
    assert changes and not expected["left"]
    points = range(1 + torn, len(changes) + 1, SAMPLE[step])
    if torn:
        points = [at for at, change in enumerate(changes, 1) if change.startswith("fsync")][:: SAMPLE[step]]
    for at in points:
        root = copy_root(roots[step], tmp_path / f"died-{at}")
        assert run_step(STEPS[step], root, at, torn) is None, f"it was to die at {changes[at - 1]}"
        run_step(STEPS[step], root)
        assert outcome(root) == expected, f"after a death at {changes[at - 1]}"
