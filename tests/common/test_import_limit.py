from __future__ import annotations

import signal
import time

import pytest
from edgedaq.config_dir import load_jobs
from edgedaq.import_limit import import_limit


def test_a_users_module_that_hangs_at_import_is_a_problem_of_its_own_file(tmp_path):
    (tmp_path / "hangs.py").write_text("import time\ntime.sleep(600)\n")
    (tmp_path / "works.py").write_text("from edgedaq import DAQJob\nclass Job(DAQJob):\n    pass\n")
    for name in ("hangs", "works"):
        (tmp_path / f"{name}.toml").write_text(f'daq_job_type = "{name}.py:Job"\n')
    hangs, works = load_jobs(tmp_path, {}, {}, takes_stores=False)
    assert "its import took longer than 10 s" in hangs.problems[0]
    assert works.config is not None


def test_a_timer_that_was_set_before_goes_on_afterwards():
    rung = []
    former = signal.signal(signal.SIGALRM, lambda *_: rung.append(time.monotonic()))
    left_s, interval_s = signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        begun_s = time.monotonic()
        with pytest.raises(TimeoutError), import_limit(0.1):
            time.sleep(10)
        assert not rung
        while not rung and time.monotonic() < begun_s + 5:
            time.sleep(0.01)
        assert 0.25 < rung[0] - begun_s < 5
    finally:
        signal.signal(signal.SIGALRM, former)
        signal.setitimer(signal.ITIMER_REAL, left_s, interval_s)


def test_what_ends_in_time_leaves_no_timer_behind():
    before = signal.getitimer(signal.ITIMER_REAL)[0]
    with import_limit():
        pass
    assert (signal.getitimer(signal.ITIMER_REAL)[0] > 0) == (before > 0)
