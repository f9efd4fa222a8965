"""A trace of a few steps, for TensorBoard's profiler or Perfetto."""

from __future__ import annotations

import os
from typing import Any

import jax


class Profiler:
    """Traces steps first..last of `window` into WORKDIR/profile; an empty window traces nothing."""

    def __init__(self, window: tuple[int, ...], workdir: str):
        self._window = tuple(window)
        self._folder = os.path.join(workdir, "profile")
        self._on = False

    def before(self, n: int) -> None:
        """Call before step n."""
        if self._window and self._window[0] <= n <= self._window[1] and not self._on:
            jax.profiler.start_trace(self._folder)
            self._on = True

    def after(self, n: int, results: Any) -> None:
        """Call after step n, whose `results` are waited for before the trace ends."""
        if self._on and n >= self._window[1]:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Ends a trace that is still open."""
        if self._on:
            jax.profiler.stop_trace()
            self._on = False
