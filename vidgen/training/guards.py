"""What a run does about steps that went wrong: it remembers which, and goes back where the loss has run away.

All decisions are functions of the numbers that steps report, which are the same on every process, and of a few numbers
that checkpoints keep: all processes decide alike, and a run that was stopped decides as one that was not.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vidgen import config as configs
from vidgen.config import ConfigError
from vidgen.parallel import fingerprints
from vidgen.plain import plain
from vidgen.studio import media
from vidgen.training import incidents

FOLDER = "bad_steps"  # of a workdir
KINDS = {"skipped": "skipped step", "spike": "spike"}  # of incidents
MOST_FILES = 100  # in it
WINDOW = 128  # steps that the running mean of the loss looks back, about
SETTLED = 32  # losses before which none is judged
IN_A_ROW = 3  # losses that must stand out: one alone may be a hard batch
SPREADS = 4.0  # standard deviations that a loss must be out as well, so that a noisy one is left alone

Jumps = tuple[tuple[int, int], ...]


def check(config: ConfigDict) -> None:
    """Raises ConfigError for settings that mean nothing."""
    if 0 < config.train.spike <= 1:
        raise ConfigError(
            f"config.train.spike={config.train.spike}: expected more than 1, such as 2.0 for a loss that doubles, or 0"
        )


def batch_step(done: int, jumps: Jumps) -> int:
    """Which batch of the plan, from 0, the step after `done` steps takes.

    `jumps`: ((steps done, batches left out in all from there on), …), the steps growing.
    """
    return done + next((offset for start, offset in reversed(jumps) if start <= done), 0)


class Verdict(NamedTuple):
    """What is to be said of a step.

    Attributes:
      step: from 1.
      kind: "": all is well; "skipped": its update was left out; "spike": the loss has run away.
      why: in words.
      numbers: what it reported.
      before: of a spike: steps done up to which states are from before it.
    """

    step: int
    kind: str
    why: str
    numbers: dict[str, float]
    before: int = 0


@dataclasses.dataclass(frozen=True)
class Detector:
    """A running view of the logarithm of the loss.

    Attributes:
      count: losses in it.
      mean, square: of their logarithms, and of the squares of what these are off the mean: running ones.
      high: losses in a row, up to now, that stand out; they are in neither.
    """

    count: int = 0
    mean: float = 0.0
    square: float = 0.0
    high: int = 0

    def after(self, loss: float, factor: float) -> Detector:
        """With one more loss, of which those `factor` times the mean stand out. One that is not finite does as well."""
        finite = math.isfinite(loss)
        if finite and loss <= 0:
            return dataclasses.replace(self, high=0)  # has no logarithm, and is not too large
        off = math.log(loss) - self.mean if finite else math.inf
        out = max(math.log(factor), SPREADS * math.sqrt(self.square))
        if not finite or (self.count >= SETTLED and off > out):
            return dataclasses.replace(self, high=self.high + 1)
        rate = 1.0 / min(self.count + 1, WINDOW)
        mean = self.mean + rate * off
        # What `off` is from the old mean and from the new: unbiased while the mean itself still moves.
        square = self.square + rate * (off * (math.log(loss) - mean) - self.square)
        return Detector(self.count + 1, mean, max(square, 0.0), 0)


class Guards:
    """Looks at what each step reports, one after the other.

    Attributes:
      jumps: see `batch_step`.
      rollbacks: so far.
    """

    def __init__(self, config: ConfigDict, facts: Mapping[str, Any] | None = None):
        """`facts` of the checkpoint that the run goes on from; None or without "guards": it begins."""
        kept = (facts or {}).get("guards", {})
        self._config = config
        self._factor = config.train.spike
        self._detector = Detector(**kept.get("detector", {}))
        self._skipped = kept.get("skipped", 0)
        self.jumps: Jumps = tuple((start, offset) for start, offset in kept.get("jumps", ()))
        self.rollbacks = kept.get("rollbacks", 0)

    def facts(self) -> dict[str, Any]:
        """What a checkpoint is to keep, saved after the step that was seen last."""
        return {
            "guards": {
                "detector": dataclasses.asdict(self._detector),
                "skipped": self._skipped,
                "jumps": [list(jump) for jump in self.jumps],
                "rollbacks": self.rollbacks,
            }
        }

    def seen(self, n: int, metrics: Mapping[str, Any]) -> Verdict:
        """Looks at what step n reported; every step in turn. `metrics` are numbers, or arrays of one that are ready."""
        numbers = {name: float(value) for name, value in metrics.items()}
        skipped, self._skipped = int(numbers["skipped"]) > self._skipped, int(numbers["skipped"])
        if self._factor:
            usual = math.exp(self._detector.mean)
            self._detector = self._detector.after(numbers["loss"], self._factor)
            if self._detector.high >= IN_A_ROW:
                why = f"a loss of {numbers['loss']:.4g}, the {IN_A_ROW}rd in a row far above the mean of {usual:.4g}"
                # The first of them was computed with weights that the step before may have ruined.
                return Verdict(n, "spike", why, numbers, max(n - IN_A_ROW - 1, 0))
        return Verdict(n, "skipped", _reason(numbers), numbers) if skipped else Verdict(n, "", "", numbers)

    def target(self, verdict: Verdict, checkpoints: Sequence[int]) -> int:
        """Steps done at which to go on after a spike: those of a checkpoint, or 0 where there is none yet.

        Checkpoints by time are passed over, so that where a run goes back to does not depend on the clock.
        Raises ConfigError if the run has been rolled back often enough, or no checkpoint is from before the spike.
        """
        c, n = self._config.train, verdict.step
        if self.rollbacks >= c.rollbacks:
            raise ConfigError(
                f"step {n}: {verdict.why}; the run has been rolled back {self.rollbacks} times, as often as "
                "config.train.rollbacks allows; try a smaller config.optimizer.lr and config.optimizer.muon_lr, or "
                f"look at the clips with vidgen replay --step {n}"
            )
        by_step = [step for step in checkpoints if step % c.checkpoint_every == 0]
        before = [step for step in by_step if step <= verdict.before]
        if by_step and not before:
            raise ConfigError(
                f"step {n}: {verdict.why}; the oldest checkpoint left, of step {min(by_step)}, is not from before it; "
                "expected more of them in config.train.keep"
            )
        return max(before, default=0)

    def rolled_back(self, verdict: Verdict, to: int, facts: Mapping[str, Any] | None) -> Guards:
        """Those of the run that goes on from `to` steps after a spike: all batches since are left out.

        `facts`: of the checkpoint of `to` steps; None where it is the beginning.
        """
        new = Guards(self._config, facts)
        used = batch_step(verdict.step, self.jumps) + 1  # with the one after it, which may be under way
        new.jumps = (*(jump for jump in self.jumps if jump[0] < to), (to, used - to))
        new.rollbacks = self.rollbacks + 1
        return new


def _reason(numbers: Mapping[str, float]) -> str:
    """Why an update was left out."""
    loss, norm = numbers["loss"], numbers["grad_norm"]
    if not numbers["tokens"]:
        return "no clip of it could be read"
    for name, value in (("loss", loss), ("gradient", norm)):
        if not math.isfinite(value):
            return f"the {name} is not finite"
    return f"a gradient norm of {norm:.4g}, an outlier beside the usual {numbers['usual_norm']:.4g}"


def clips(source: Any, row: Sequence[Any]) -> list[dict[str, Any]]:
    """The clips of a row as people find them again: "index", "pass", "name"."""
    return [{"index": piece.clip, "pass": piece.epoch, "name": source.name(piece.clip)} for piece in row]


class BadSteps:
    """Writes down which clips were in a step that went wrong: WORKDIR/bad_steps/<step>.json."""

    def __init__(
        self,
        workdir: str,
        config: ConfigDict,
        source: Any,
        rows: Callable[[int], Sequence[Sequence[Any]]],
        say: Callable[[str], None],
    ):
        """Writes nothing yet.

        Args:
          workdir, config: of the run.
          source: of its clips.
          rows: batch of the plan, from 0 → of each row what is in it, as `vidgen.training.planned.rows_of` makes it.
          say: takes a line for the user.
        """
        self._folder, self._config, self._say = os.path.join(workdir, FOLDER), config, say
        self._workdir, self._source, self._rows = workdir, source, rows
        self._written: set[str] | None = None
        self._told = False

    def write(self, verdict: Verdict, jumps: Jumps, checkpoints: Sequence[int]) -> None:
        """Says what went wrong and writes the clips of the step. A disk that is full, too, is only said.

        `jumps` and `checkpoints` as they were when the step was taken.
        """
        n = verdict.step
        path = os.path.join(self._folder, f"{n}.json")
        self._say(f"Step {n}: {verdict.why}; {'its update is left out' if verdict.kind == 'skipped' else 'a spike'}")
        incidents.record(self._workdir, n, KINDS[verdict.kind], verdict.why)
        if self._written is None:
            self._written = set(os.listdir(self._folder)) if os.path.isdir(self._folder) else set()
        if len(self._written) >= MOST_FILES and os.path.basename(path) not in self._written:
            self._once(f"{self._folder} holds {MOST_FILES} files; the clips of more such steps are not written there")
            return
        batch = batch_step(n - 1, jumps)
        about = {
            "step": n,
            "kind": verdict.kind,
            "why": verdict.why,
            "numbers": {name: told(value) for name, value in verdict.numbers.items()},
            "seed": self._config.seed,
            "batch": batch,
            "jumps": jumps,
            "config": fingerprints.of(configs.to_json(self._config))[:16],
            "checkpoint": max((step for step in checkpoints if step < n), default=0),
            "replay": f"vidgen replay --workdir {self._workdir} --step {n}",
            "rows": [clips(self._source, row) for row in self._rows(batch)],
        }
        try:
            media.write(path, json.dumps(plain(about), indent=1, ensure_ascii=False).encode())
            self._written.add(os.path.basename(path))
        except ConfigError as e:
            self._once(f"{e}; training goes on, and the clips of such steps are not written down")

    def _once(self, text: str) -> None:
        if not self._told:
            self._told = True
            self._say(text)


def told(value: float) -> float | str:
    """A number as JSON has it; "nan", "inf" and "-inf", for which it has none, as text."""
    return value if math.isfinite(value) else str(value)


def read(workdir: str, step: int) -> dict[str, Any] | None:
    """What `BadSteps` wrote of a step; None where there is nothing. Raises ConfigError if it can't be read."""
    path = os.path.join(workdir, FOLDER, f"{step}.json")
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path}: {e}; expected what a run writes of a step that went wrong") from None
