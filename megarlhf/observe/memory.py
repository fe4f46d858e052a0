"""Peak resident memory of a stretch of code."""

from __future__ import annotations

import re
import resource
import sys
from contextlib import suppress
from pathlib import Path

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Resident bytes at the peak above those at the start, pages of mapped files included.

    Linux can forget an earlier peak. Elsewhere the process's own is what counts, and one before the start hides a lower
    one after it.
    """

    def start(self) -> None:
        """Begin to watch."""
        forget_peak()
        self._before = _resident("VmRSS")

    def peak(self) -> int:
        """Bytes above the start."""
        return max(0, peak_resident() - self._before)


def forget_peak() -> None:
    """From here on `peak_resident` is about what comes; on Linux alone."""
    with suppress(OSError):
        _RESET.write_text("5")


def peak_resident() -> int:
    """Most resident bytes of this process so far."""
    return _resident("VmHWM")


def _resident(field: str) -> int:
    with suppress(OSError):
        found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
