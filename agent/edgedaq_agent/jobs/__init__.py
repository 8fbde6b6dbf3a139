"""Device jobs, one module each; ``JOBS`` is where a TOML's ``daq_job_type`` is looked up.

Adding a device is one module here, one line below, and one sample in ``configs/examples``. Jobs never import
each other.
"""

from __future__ import annotations

__all__ = ["JOBS"]

JOBS: dict[str, str] = {
    "DAQJobBenchmark": "edgedaq_agent.jobs.benchmark:DAQJobBenchmark",
    "DAQJobPCMetrics": "edgedaq_agent.jobs.pc_metrics:DAQJobPCMetrics",
    "DAQJobReplay": "edgedaq_agent.jobs.replay:DAQJobReplay",
    "DAQJobSimulatedDetector": "edgedaq_agent.jobs.simulated_detector:DAQJobSimulatedDetector",
    "DAQJobTest": "edgedaq_agent.jobs.test:DAQJobTest",
}
"""``daq_job_type`` → ``module:Class``; modules are imported only where the job runs or is checked."""
