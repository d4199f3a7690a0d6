"""Which adapter of a run is best is a file's word, which may come from a bucket that others write."""

import pytest

from pi_ray.errors import CorruptArtifactError
from pi_ray.run.directory import RunDir


def test_the_adapter_that_was_chosen_last_is_the_best_and_before_there_is_none(tmp_path):
    run = RunDir(tmp_path)
    assert not run.best.exists()
    run.choose_best(0)
    run.choose_best(2)
    assert run.best == run.adapter(2)


@pytest.mark.parametrize("content", [
    b"", b"{}", b"[]", b"7", b'{"adapter": 1}', b'{"adapter": "../phase-1"}', b'{"adapter": "/etc"}', b"\xff",
    b'{"adapter": "phase-1/.."}', b"[" * 100_000,
])  # fmt: skip
def test_a_file_that_names_no_phases_adapter_is_refused(tmp_path, content):
    run = RunDir(tmp_path)
    run.adapters.mkdir()
    run.best_file.write_bytes(content)
    with pytest.raises(CorruptArtifactError, match="names no adapter of a phase"):
        run.best  # noqa: B018
