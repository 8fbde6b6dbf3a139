from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from tests.common.log_model import ForgetfulStorage, RecordingStorage, Workload, check_survivors, power_cut


def _worked(
    tmp_path: Path, storage: RecordingStorage, seed: int, *, resends: bool, steps: int = 120
) -> Workload:
    workload = Workload(tmp_path / "log", storage, seed, resends=resends)
    workload.run(steps)
    return workload


def _first_failure(workload: Workload, tmp_path: Path, *, rounds: int, kept: list[float], seed: int) -> str:
    rng = random.Random(seed)
    events = workload.storage.events
    for attempt in range(rounds):
        if rounds > len(events) and attempt == len(events):
            break
        at = attempt + 1 if rounds > len(events) else rng.randint(1, len(events))
        left = tmp_path / "left"
        share = rng.choice(kept)
        power_cut(events[:at], left, rng, share)
        wrong = check_survivors(workload, events[:at], left)
        if wrong:
            return f"seed {seed}, cut after event {at} of {len(events)}, share kept {share}: {wrong}"
        shutil.rmtree(left)
    return ""


@pytest.mark.parametrize("resends", [False, True], ids=["spool", "journal"])
def test_a_kill_at_any_moment_loses_nothing_that_was_synced_and_invents_nothing(tmp_path, resends):
    workload = _worked(tmp_path, RecordingStorage(), 1, resends=resends, steps=70)
    assert _first_failure(workload, tmp_path, rounds=10_000, kept=[1.0], seed=1) == ""


@pytest.mark.parametrize("resends", [False, True], ids=["spool", "journal"])
@pytest.mark.parametrize("seed", [2, 3, 4, 5, 6])
def test_a_power_cut_that_loses_unsynced_sectors_loses_nothing_that_was_synced(tmp_path, resends, seed):
    workload = _worked(tmp_path, RecordingStorage(), seed, resends=resends)
    kept = [0.0, 0.3, 0.7, 0.95, 0.99]
    assert _first_failure(workload, tmp_path, rounds=150, kept=kept, seed=seed) == ""


def test_without_fdatasync_the_same_check_sees_the_loss(tmp_path):
    workload = _worked(tmp_path, ForgetfulStorage(), 2, resends=False)
    assert "missing" in _first_failure(workload, tmp_path, rounds=150, kept=[0.0, 0.5], seed=2)
