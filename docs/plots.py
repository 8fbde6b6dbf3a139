"""Plot a pulse and a temperature curve from what a demo has stored: ``python docs/plots.py OUT [PICTURES]``.

After ``make demo``, ``.venv/bin/python docs/plots.py out`` writes ``pulse.png`` and ``temperature.png``. The
pulse is read from the raw file, which is an array of numpy as it lies; the temperatures with the types that
they were put with, from whatever store has them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from edgedaq_aggregator.reading import open_out
from matplotlib.figure import Figure

NODE = "demo-node"
SAMPLING_NS = 8
WAVEFORM = np.dtype([("event", "<u8"), ("t_ns", "<i8"), ("adc", "<i2", 512)])
"""One raw message of ``DAQJobSimulatedDetector`` with its defaults."""

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}
SIZE_INCHES = (6.4, 3.0)
DOTS_PER_INCH = 110


def main() -> int:
    """Plot both; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="where a demo has stored")
    parser.add_argument("pictures", type=Path, nargs="?", default=Path(__file__).parent / "pictures")
    options = parser.parse_args()
    options.pictures.mkdir(parents=True, exist_ok=True)
    for name, plot in (("pulse", plot_pulse), ("temperature", plot_temperature)):
        path = options.pictures / f"{name}.png"
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
            plot(options.out, figure.subplots())
            figure.savefig(path)
        sys.stdout.write(f"{path}\n")
    return 0


def plot_pulse(out: Path, axes: Any) -> None:
    """Plot the newest event in which a muon stopped and decayed (a second pulse), or the newest of all."""
    files = sorted((out / NODE).glob("*waveforms.bin"))
    waveforms = np.concatenate([np.fromfile(path, WAVEFORM) for path in files])
    waveform = waveforms[find_decay(waveforms["adc"])]
    times_us = (np.arange(len(waveform["adc"])) * SAMPLING_NS) / 1000
    axes.plot(times_us, waveform["adc"], linewidth=1, color="tab:blue")
    when = np.datetime_as_string(waveform["t_ns"].astype("datetime64[ns]"), unit="ms")
    axes.set_title(
        f"A muon in the simulated detector: event {waveform['event']}, {when.replace('T', ' ')} UTC",
        loc="left",
    )
    axes.set_xlabel("time (µs)")
    axes.set_ylabel("amplitude (ADC counts)")
    axes.margins(x=0)


def find_decay(adc: Any) -> int:
    """Return the index of the newest waveform with two pulses of size, the last one if there is none."""
    height = adc.astype(float) - np.median(adc, axis=1, keepdims=True)
    is_high = height > 0.4 * height.max(axis=1, keepdims=True)
    rises = (np.diff(is_high.astype(np.int8), axis=1) > 0).sum(axis=1)
    late = is_high[:, 2 * adc.shape[1] // 5 :].any(axis=1)
    found = np.flatnonzero((rises == 2) & late & (height.max(axis=1) > 300))
    return int(found[-1]) if len(found) else len(adc) - 1


def plot_temperature(out: Path, axes: Any) -> None:
    """Plot the newest life of the thermometer, and when its heater was on."""
    stored = open_out(out)
    newest = stored.streams(node=NODE, job="thermometer")[-1]
    table = stored.read(stream=newest.stream)
    columns = {name: table.column(name).to_numpy() for name in table.column_names}
    times = columns["timestamp"]
    seconds = (times - times[0]) / np.timedelta64(1, "s")
    axes.plot(seconds, columns["temperature"], color="tab:red", linewidth=1, label="vessel")
    axes.plot(seconds, columns["room"], color="tab:blue", linewidth=1, label="room")
    axes.fill_between(
        seconds,
        *(0, 1),
        where=columns["is_heating"].astype(bool),
        transform=axes.get_xaxis_transform(),
        color="tab:orange",
        alpha=0.15,
        linewidth=0,
        label="heater on",
    )
    begin = np.datetime_as_string(times[0], unit="s").replace("T", " ")
    axes.set_title(f"The simulated thermometer, from {begin} UTC", loc="left")
    axes.set_xlabel("time (s)")
    axes.set_ylabel("temperature (°C)")
    axes.margins(x=0)
    axes.set_ylim(top=float(columns["temperature"].max()) + 1.5)
    axes.legend(loc="upper center", ncols=3)


if __name__ == "__main__":
    sys.exit(main())
