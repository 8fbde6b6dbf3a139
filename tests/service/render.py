"""Writes ``systemd/``: what install-service installs, for those who package it."""

from __future__ import annotations

from edgedaq.install_service import service_files

from tests.common.test_install_service import SERVICES, sample_of


def main() -> None:
    """Write every file."""
    for name, service in SERVICES.items():
        for path, text in service_files(service, ["dialout"]).items():
            if name != "instance" or path.suffix == ".service":
                sample = sample_of(path)
                sample.parent.mkdir(parents=True, exist_ok=True)
                sample.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
