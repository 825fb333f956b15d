"""As many threads as the machine has to spare: two threads on one free core wait for each other at every layer."""

import os
import time
from pathlib import Path

import torch

LOOK_SECONDS = 3.0


class SpareThreads:
    """Call it between updates: it sets torch's thread count to the cores that other processes leave free, at least one."""

    def __init__(self) -> None:
        self.cores = os.cpu_count() or 1
        self.before = self._now()

    def _now(self) -> tuple[float, float, float]:
        """Wall clock, seconds that all cores together were busy, seconds that this process was."""
        busy = sum(
            int(v) for i, v in enumerate(Path("/proc/stat").read_text().split("\n")[0].split()[1:9]) if i not in (3, 4)
        )
        return time.time(), busy / os.sysconf("SC_CLK_TCK"), time.process_time()

    def __call__(self) -> None:
        wall, busy, own = (now - before for now, before in zip(self._now(), self.before, strict=True))
        if wall < LOOK_SECONDS:
            return
        self.before = self._now()
        others = max(0.0, busy - own) / wall  # cores
        threads = max(1, self.cores - round(others + 0.1))
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)
