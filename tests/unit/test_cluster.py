"""Joining Ray quietly: one known line is left out, everything else is heard."""

import os

import pytest

from pi_ray.cluster import _muted


def test_only_the_named_line_is_left_out_even_when_the_block_fails(capfd):
    with pytest.raises(RuntimeError), _muted("log level"):
        os.write(2, b"Set ray log level to 3\nno space left on device\n")
        raise RuntimeError
    assert capfd.readouterr().err == "no space left on device\n"
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"
