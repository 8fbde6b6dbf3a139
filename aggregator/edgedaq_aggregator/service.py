"""What is particular about an aggregator as a service, and about its host."""

from __future__ import annotations

from pathlib import Path

from edgedaq.doctor import Finding, check_disk, check_listen
from edgedaq.doctor_command import examine_host, user_of
from edgedaq.errors import ConfigError
from edgedaq.main_config import read_main, resolve_dir
from edgedaq.runtime_dir import holder

from edgedaq_aggregator import app
from edgedaq_aggregator.config import FILE_NAME, AggregatorConfig

__all__ = ["examine", "install_facts"]

_OUT_DIR = "/srv/edgedaq"
_MAIN_FILE = f"""\
# The control room. Every other .toml file of this directory is a store (or a job of the aggregator itself);
# `edgedaq-aggregator check` finds mistakes. If out_dir changes, install the service again.
supervisor_id = "aggregator"
listen = "tcp://127.0.0.1:7770"
out_dir = "{_OUT_DIR}"
"""


def install_facts(config_dir: Path, root: Path) -> tuple[tuple[str, str], list[Path]]:
    """Return a first main file, and the directories outside of its own that the service writes to.

    Raises:
        ConfigError: There is a main file, and it is broken or names no ``out_dir``.
    """
    path = root / config_dir.relative_to("/") / FILE_NAME
    main_file = (FILE_NAME, _MAIN_FILE)
    if not path.exists():
        return main_file, [Path(_OUT_DIR)]
    config = read_main(AggregatorConfig, path)
    if not config.out_dir:
        message = f"{path}: out_dir is missing; a service must be told where data goes, e.g. {_OUT_DIR!r}"
        raise ConfigError(message)
    given = [config.out_dir, *([config.state_dir] if config.state_dir else [])]
    return main_file, [resolve_dir(one, config_dir, config_dir) for one in given]


def examine(config_dir: Path) -> list[Finding]:
    """Return what is so with a control room: configuration, host, disks, port.

    Raises:
        ConfigError: ``aggregator.toml`` itself is broken.
    """
    aggregator = app.load(config_dir)
    place = aggregator.place
    found = [Finding("problem", FILE_NAME, problem, "edit it") for problem in aggregator.problems]
    found += [Finding("warning", FILE_NAME, warning) for warning in aggregator.warnings]
    found += examine_host(
        aggregator.files,
        user_of(config_dir),
        runtime_dir=place.runtime_dir,
        disks=[("journal", place.state_dir, *aggregator.journal)],
    )
    found += check_disk("out_dir", place.out_dir, 0, aggregator.journal[1])
    return found + check_listen(aggregator.listen, is_running=holder(place.runtime_dir) is not None)
