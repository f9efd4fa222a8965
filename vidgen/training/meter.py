"""Adds up what steps did, for the rows of metrics.jsonl."""

from __future__ import annotations

import math
import os
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from vidgen.config import ConfigError
from vidgen.data.stream import FeedInfo
from vidgen.parallel.processes import Restartable

STUCK = 50  # updates skipped in a row: more are no outliers
OWN = ("grad_norm", "usual_norm", "tokens", "skipped")  # of what a step says, what is not averaged
PATIENCE = 10  # unreadable clips: fewer are no share to judge by
RECENT = 1000  # clips that are judged by themselves: of all that a long run has read, those of a disk that goes are few


def host_memory() -> float:
    """Bytes that this process holds in memory; 0 where the system does not say (it does on Linux)."""
    try:
        with open("/proc/self/statm", encoding="ascii") as f:
            return float(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0.0


class Meter:
    """From one row to the next: losses, speed, waiting, clips that could not be read.

    What goes on between steps (held-out loss, sampling, saving) does not count as time; nor does the first step, which
    compiles.
    """

    def __init__(
        self,
        lr: Callable[[int], Any],
        useful_flops: Callable[[int], float],
        peak_flops: float,
        clips_a_step: float,
        max_bad: float,
        tokens_seen: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """Starts to count.

        Args:
          lr: step → learning rate; one that asks a device would wait for the step that it is at.
          useful_flops: steps done → of the next step, for MFU.
          peak_flops: of all devices, a second.
          clips_a_step: about, against which unreadable clips are judged.
          max_bad: share of unreadable clips above which `fed` raises.
          tokens_seen: by earlier attempts of this run.
        """
        self._lr, self._useful, self._peak, self._clock = lr, useful_flops, peak_flops, clock
        self._clips_a_step, self._max_bad = clips_a_step, max_bad
        self._bad: Counter[str] = Counter()
        self._clips = 0.0
        self._recent: deque[int] = deque(maxlen=max(1, math.ceil(RECENT / max(clips_a_step, 1e-9))))
        self._n, self._last = 0, {}
        self._warm = False
        self.back_to(tokens_seen)

    def back_to(self, tokens_seen: float) -> None:
        """The run goes on from a state after so many tokens: at its start, and when it is rolled back."""
        self.tokens_seen = tokens_seen
        self._skipped, self._stuck = 2**31, 0  # what was skipped before it is not known yet
        self._begin()

    def _begin(self, now: float | None = None) -> None:
        self._start, self._aside, self._wait = self._clock() if now is None else now, 0.0, 0.0
        self._steps, self._tokens, self._flops = 0, 0.0, 0.0
        self._seen: dict[str, list[float]] = {}

    def fed(self, info: FeedInfo) -> None:
        """A batch came. Raises ConfigError if too many clips can't be read, Restartable if all at once many can't."""
        self._wait += info.wait
        self._bad.update(info.bad)
        self._clips += self._clips_a_step
        bad = sum(self._bad.values())
        self._recent.append(sum(info.bad.values()))
        lately, among, share = sum(self._recent), len(self._recent) * self._clips_a_step, self._max_bad
        usual = share * among + 6 * math.sqrt(share * (1 - share) * among)  # chance alone brings no more than that
        reasons = ", ".join(f"{reason}: {count}" for reason, count in self._bad.most_common(5))
        before = self._clips - among
        if before > RECENT and bad - lately < before / 10 and lately > PATIENCE + usual:  # what could be read can't now
            raise Restartable(
                f"{lately} of about the last {among:.0f} clips could not be read ({reasons}): is their disk there?"
            )
        if bad > PATIENCE and bad > self._max_bad * self._clips:
            raise ConfigError(
                f"{bad} of about {self._clips:.0f} clips could not be read ({reasons}), more than "
                f"config.train.max_bad={self._max_bad} allows"
            )

    def done(self, n: int, metrics: dict[str, jax.Array]) -> None:
        """Step n is done, or will be when this returns. Raises ConfigError if no step updates anything any more."""
        self._n, self._last = n, {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.tokens_seen += self._last["tokens"]
        seen = self._seen
        for name, value in self._last.items():
            if name not in OWN:
                seen.setdefault(name, []).append(value)
        if not self._warm:
            self._warm = True
            self._begin()
        else:
            self._steps += 1
            self._tokens += self._last["tokens"]
            self._flops += self._useful(n - 1)
        self._seen = seen
        skipped = int(self._last["skipped"])
        self._stuck = self._stuck + 1 if skipped > self._skipped else 0
        self._skipped = skipped
        if self._stuck >= STUCK:
            raise ConfigError(
                f"the last {STUCK} updates were skipped, at step {n} for a gradient norm of "
                f"{self._last['grad_norm']:.3g}; try a smaller config.optimizer.lr and config.optimizer.muon_lr"
            )

    def aside(self, seconds: float) -> None:
        """So much time went to something else than steps."""
        self._aside += seconds

    def row(self) -> dict[str, float]:
        """The figures since the last row, and a new start.

        The loss, and what else a task measures, are means over the steps; the other figures are the last step's.
        """
        now = self._clock()
        seconds = max(now - self._start - self._aside, 1e-9)
        values = {name: float(np.mean(values)) for name, values in self._seen.items()} | {
            "grad_norm": self._last["grad_norm"],
            "lr": float(self._lr(max(self._n - 1 - self._skipped, 0))),
            "tokens_seen": self.tokens_seen,
            "skipped_steps": self._last["skipped"],
            "unreadable_clips": float(self._bad.total()),
            "host_memory_gib": host_memory() / 2**30,
        }
        if self._steps:
            values |= {
                "tokens_per_second": self._tokens / seconds,
                "seconds_per_step": seconds / self._steps,
                "mfu": self._flops / seconds / self._peak,
                "data_wait_fraction": self._wait / seconds,
            }
        self._begin(now)
        return values
