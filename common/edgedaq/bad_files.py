"""What was set aside because nobody can take it: one ``.bad`` file each, kept for a human, bounded together.

``<stream, 16 hex>-<seq>-<number>.bad`` holds the bytes as they were, ``....txt`` beside it the reason in one
line. Beyond the limit the oldest go.
"""

from __future__ import annotations

from pathlib import Path

from edgedaq.logsetup import get_logger

__all__ = ["BadFiles"]

_LIMIT_BYTES = 64 << 20
_FILES_MAX = 1000


class BadFiles:
    """The ``.bad`` files of one process in a directory of its own. Not thread-safe.

    Never raises: what cannot be kept is counted and logged all the same.
    """

    def __init__(self, directory: Path, limit_bytes: int = _LIMIT_BYTES) -> None:
        self.directory = directory
        self.count = 0
        self._limit_bytes = limit_bytes
        self._log = get_logger()

    def add(self, stream: int, seq: int, reason: str, raw: bytes | memoryview) -> None:
        """Keep the bytes of something that was refused."""
        self.count += 1
        facts = {"stream": f"{stream:016x}", "seq": seq, "reason": reason, "size_bytes": len(raw)}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._make_room(len(raw))
            number = self.count
            while (path := self.directory / f"{stream:016x}-{seq}-{number}.bad").exists():
                number += 1
            path.with_suffix(".txt").write_text(reason.replace("\n", " ") + "\n", encoding="utf-8")
            path.write_bytes(raw)
        except OSError as e:
            self._log.error("frame.lost", problem=str(e), **facts)
            return
        self._log.error("frame.set_aside", path=str(path), **facts)

    def _make_room(self, size: int) -> None:
        held = sorted(
            (path.stat().st_mtime_ns, path.stat().st_size, path) for path in self.directory.glob("*.bad")
        )
        total = sum(item[1] for item in held) + size
        for at, (_, one, path) in enumerate(held):
            if total <= self._limit_bytes and len(held) - at < _FILES_MAX:
                break
            path.unlink(missing_ok=True)
            path.with_suffix(".txt").unlink(missing_ok=True)
            total -= one
