"""A short version of benchmarks/kills.py: builds that are killed at random moments end as one that is not, and leave no worker and no file."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from killing import STAGES, Killer
from oracle import write_base


@pytest.fixture(scope="module")
def killer(tmp_path_factory) -> Killer:
    folder: Path = tmp_path_factory.mktemp("kills")
    return Killer(folder, write_base(folder / "base"))


@pytest.mark.parametrize("stage", STAGES)
def test_killed_builds_end_as_an_unbroken_one(killer, stage):
    series = killer.series(stage, stage, 2, random.Random(stage))
    assert (series.code, series.same, series.left) == (0, True, [])
    assert [(kill.alive, kill.broken) for kill in series.kills] == [(0, 0)] * 2
