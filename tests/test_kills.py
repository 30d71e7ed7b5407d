"""A short version of benchmarks/kills.py: builds that are killed in each of their stages end as one that is not, and leave no worker and no file."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from killing import CHECKS, STAGES, Killer
from oracle import write_base


@pytest.fixture(scope="module")
def killer(tmp_path_factory) -> Killer:
    folder: Path = tmp_path_factory.mktemp("kills")
    return Killer(folder, write_base(folder / "base"))


def test_a_build_that_is_killed_in_each_stage_ends_as_an_unbroken_one(killer):
    series = killer.series("each", (CHECKS, *STAGES), random.Random("each"))
    assert (series.code, series.same, series.left) == (0, True, [])
    assert series.kills
    assert {(kill.alive, kill.broken) for kill in series.kills} == {(0, 0)}
