"""Fifty kills across one run; `pytest tests/slow/test_kills.py`."""

import os
from pathlib import Path

import pytest

from tests.unit.test_kills import check_kills


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_that_is_killed_fifty_times_ends_the_same(tmp_path: Path) -> None:
    check_kills(tmp_path, 50, seed=2)
