"""What an agent that has little to do takes of memory; ``benchmarks.start`` times its start."""

from __future__ import annotations

import pytest

from benchmarks.start import JOB, proportional_bytes
from tests.system.harness import Site


@pytest.mark.parametrize(("jobs_count", "limit_mb"), [(1, 60), (10, 200)])
def test_an_agent_with_idle_jobs_is_small(tmp_path, runtime_dir, jobs_count, limit_mb):
    with Site(tmp_path, runtime_dir) as site:
        (site.agent_dir / "idle.py").write_text(JOB)
        for number in range(jobs_count):
            (site.agent_dir / f"idle{number}.toml").write_text('daq_job_type = "idle.py:Idle"\n')
        site.agent.start()
        site.agent.wait(lambda: all(job["total"] for job in site.agent.jobs().values()), 60, "all report")
        held_mb = proportional_bytes(site.agent.process.pid) / 1e6
        site.agent.stop()
    assert held_mb <= limit_mb
