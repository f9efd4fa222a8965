"""Checkpoints: Orbax, asynchronous, with checksums, restored straight onto any mesh."""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from ml_collections import ConfigDict

from vidgen import config as configs
from vidgen.config import ConfigError
from vidgen.parallel import processes
from vidgen.training import checksums, locations, provenance, retention
from vidgen.training.retention import Keep
from vidgen.training.state import TrainState

ITEMS = ("state", "ema", "facts")
FACTS = ocp.args.Composite(facts=ocp.args.JsonRestore())
LISTED = ("metrics", "_CHECKPOINT_METADATA")  # of a checkpoint, what Orbax reads to list it
DAMAGED = "damaged"
AT_ONCE = 32  # of a state so much is on its way at once while it is restored: one part in so many

# Settings that don't decide what is trained; that the clips, and weights of other directories, are the same is checked
# by their fingerprint and digests.
MAY_CHANGE = (
    "train.",
    "mesh.",
    "sample.",
    "data.source",
    "data.threads",
    "data.prefetch",
    "data.latents",
    "tokenizer.weights",
    "text.weights",
    "model.weights",
    "model.attention",
    "model.remat",
    "model.unroll",
    "vae.remat",
)


_asked = itertools.count()


class Checkpoints:
    """The checkpoints of a run: `WORKDIR/checkpoints/<step>/`, or where `config.train.checkpoints` says.

    A checkpoint has the state without its moving average, the moving average on its own, so that a sampler reads no
    more than it needs, a few facts as JSON, and checksums of all that. One that doesn't agree with its checksums is
    never used and never deleted: a run that goes on moves it aside, to `<step>.damaged-<n>`.
    """

    def __init__(self, workdir: str, train: ConfigDict | None = None, read_only: bool = False):
        """Opens, and makes where missing, the folder of checkpoints.

        Args:
          workdir: of the run.
          train: `config.train`; None: what WORKDIR/config.json says of where they lie, and the defaults.
          read_only: to read what another process may be writing.

        Raises ConfigError where there is no such place, or it can't be written.
        """
        self._directory = locations.directory(workdir, None if train is None else train.checkpoints)
        self._keep, self._read_only = Keep.from_config(train) if train is not None else Keep(), read_only
        self._failures: list[BaseException] = []
        self._unsaid: list[str] = []  # of what was moved aside
        self._told = False  # that a save has failed
        logger = logging.getLogger("absl")
        logger.removeFilter(_told_elsewhere)  # to be asked last
        logger.addFilter(self._heard)
        logger.addFilter(_told_elsewhere)
        if read_only:
            # Of those that may be damaged nothing is read yet.
            options = ocp.CheckpointManagerOptions(
                read_only=True, create=False, save_interval_steps=0, lightweight_initialize=True
            )
        else:
            provenance.here()
            options = ocp.CheckpointManagerOptions(
                preservation_policy=self._keep,
                best_fn=_of_no_use,  # so that figures are saved
                cleanup_tmp_directories=True,
                temporary_path_class=checksums.committed(self._directory),
            )
        try:
            if not read_only:
                self._clear()
            self._manager = ocp.CheckpointManager(self._directory, options=options, item_names=ITEMS)
        except (OSError, ImportError) as e:
            reason = (e.strerror if isinstance(e, OSError) else "") or " ".join(str(e).split())[:200]
            wanted = "the extra [gcs] of vidgen" if isinstance(e, ImportError) else "a directory that can be written"
            raise ConfigError(f"{self._directory}: {reason}; expected {wanted}") from e

    @property
    def where(self) -> str:
        """The directory, or URL, that they lie in."""
        return str(self._directory)

    @property
    def latest(self) -> int | None:
        """The newest finished checkpoint's step, good or not."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """The finished checkpoints, oldest first, good or not."""
        return sorted(self._manager.all_steps())

    def newest_good(self, say: Callable[[str], None] | None = None, items: Sequence[str] = ()) -> int | None:
        """The newest checkpoint that agrees with its checksums; None where there are none at all.

        Each newer one is told of in a line, and moved aside unless this is to read only. Every process calls it, shares
        the work, and gets the same answer.

        Args:
          say: what to tell it with; on stderr unless given.
          items: "state", "ema", "facts": those that matter; empty: all.

        Raises ConfigError where there are some and none is good.
        """
        bad = []
        while self._unsaid:
            _tell(say, self._unsaid.pop(0))
        for step in reversed(processes.agree(self.steps)):  # listings of a shared disk may differ for a moment
            damage = self.damage(step, items)
            if not damage:
                return step
            if not processes.agree((self._directory / str(step)).exists()):
                continue  # the run that writes there has newer ones by now
            now = "" if self._read_only else f"; moved to {self.set_aside(step)}"
            bad.append(f"{step}/{damage}")
            _tell(say, f"Skipping the checkpoint of step {step}: {self._directory}/{step}/{damage}{now}")
        aside = processes.agree(sorted(path.name for path in self._aside()))
        if bad or aside:
            raise ConfigError(
                f"{self._directory}: none of the checkpoints is good ({'; '.join(bad or aside)}); put one back from a "
                "copy, or take another workdir to start from nothing"
            )
        return None

    def damage(self, step: int, items: Sequence[str] = ()) -> str:
        """What is wrong with a checkpoint's files; empty: nothing. Every process calls it, and gets the same answer."""
        share = jax.process_index(), jax.process_count()
        found = str(checksums.find(self._directory / str(step), items, *share) or "")
        if processes.alone():
            return found
        told = processes.gathered(f"vidgen/damage/{next(_asked)}", found)
        return processes.agree(next(filter(None, told), ""))

    def set_aside(self, step: int, word: str = DAMAGED) -> str:
        """Moves a checkpoint out of the way, as `<step>.<word>-<n>`, for its step to be saved again; the new name.

        Every process calls it. What was moved is never deleted, and counts for nothing.
        """
        name = processes.agree(self._moved(step, word) if processes.is_lead() else "")
        self._manager.reload()
        return name

    def _moved(self, step: int, word: str) -> str:
        n = 1
        while (to := self._directory / f"{step}.{word}-{n}").exists():
            n += 1
        (self._directory / str(step)).rename(to)
        return to.name

    def _clear(self) -> None:
        """Moves aside what Orbax can't even list: it reads the figures of each checkpoint when it opens the folder."""
        if processes.is_lead() and self._directory.is_dir():
            for path in self._directory.iterdir():
                if path.name.isdigit() and path.is_dir():
                    damage = checksums.find(path, LISTED)
                    if damage:
                        step, moved = path.name, self._moved(int(path.name), DAMAGED)
                        self._unsaid.append(
                            f"Skipping the checkpoint of step {step}: {path}/{damage}; moved to {moved}"
                        )
        processes.barrier(f"to have looked at {self._directory}")

    def _aside(self) -> list[epath.Path]:
        there = self._directory.iterdir() if self._directory.is_dir() else ()
        return [path for path in there if re.fullmatch(rf"\d+\.{DAMAGED}-\d+", path.name)]

    def save(
        self,
        state: TrainState,
        facts: dict[str, Any],
        temporary: bool = False,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts to save; the state may be donated when this returns. That a save failed is raised later.

        Args:
          state: of which what is frozen is left out.
          facts: JSON, kept beside it; which program wrote it is added.
          temporary: it goes when a newer one is there.
          metrics: figures of this step, of which `config.train.best` may be one.
        """
        step = int(state.step)
        if processes.agree(step in self.steps):  # listings of a shared disk may differ for a moment
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_saved(state)),
            ema=ocp.args.StandardSave(state.ema),
            facts=ocp.args.JsonSave(facts | {provenance.KEY: provenance.here()}),
        )
        figures = retention.figures(self._keep, metrics, temporary)
        self._guarded(lambda: self._manager.save(step, args=args, metrics=figures, force=True))

    def facts(self, step: int) -> dict[str, Any]:
        """What `save` was given beside the state."""
        return self._read(step, lambda: self._manager.restore(step, args=FACTS))["facts"]

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of `step`; `like` holds ShapeDtypeStructs with the shardings to restore into.

        What is frozen is not saved, and not in it.
        """
        return TrainState(**self._restored(step, "state", _saved(like)), ema=self.restore_ema(step, like.ema))

    def restore_ema(self, step: int, like: Any) -> Any:
        """The moving average of `step` alone."""
        return self._restored(step, "ema", like)

    def _restored(self, step: int, item: str, like: Any) -> Any:
        """An item, no more of which is on its way at once than keeps the disk busy: the rest would be memory twice."""
        sizes = [_bytes(x) for x in jax.tree.leaves(like)]
        limit = max(sizes, default=0) + sum(sizes) // AT_ONCE + 2**20
        handler = ocp.StandardCheckpointHandler(restore_concurrent_gb=limit / 1e9)  # type: ignore[arg-type]
        with ocp.Checkpointer(handler) as reader:
            where = self._directory / str(step) / item
            return self._read(step, lambda: reader.restore(where, args=ocp.args.StandardRestore(like)))

    def _read(self, step: int, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except (OSError, ValueError, KeyError) as e:  # what a damaged file raises depends on the file
            text = " ".join(str(e).split())[:200]
            raise ConfigError(f"{self._directory}/{step}: the checkpoint cannot be read ({text})") from e

    def check(self) -> None:
        """Raises ConfigError if a save under way has failed; returns at once."""
        if self._failures:
            self._guarded(self._raise)
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Until what was saved is on disk; raises ConfigError if it could not be written."""
        self._guarded(self._manager.wait_until_finished)

    def close(self) -> None:
        """Ends it, when what was saved is on disk; raises ConfigError for a failure that has not been raised yet."""
        told = self._told
        try:
            for act in (self._manager.wait_until_finished, self._manager.close):
                with contextlib.suppress(*([ConfigError] if told else [])):
                    self._guarded(act)
        finally:
            logging.getLogger("absl").removeFilter(self._heard)

    def _raise(self) -> None:
        raise self._failures[0]

    def _heard(self, record: logging.LogRecord) -> bool:
        """Where a failure is heard of at once: of several processes, the thread that raises it waits for the others
        first, and they for this one.
        """
        text = record.getMessage() if record.exc_info else ""
        if "background save thread" in text and str(self._directory) in text:
            self._failures += [e for e in record.exc_info or () if isinstance(e, BaseException)]
        return True

    def _guarded(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except (OSError, ValueError, RuntimeError) as e:  # tensorstore raises ValueError for a full disk
            if isinstance(e, ConfigError):
                raise
            self._told = True
            reasons = [os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)]
            text = " ".join(str(e).split())
            reason = next((reason for reason in reasons if reason in text), text[:300])
            raise ConfigError(f"{self._directory}: the checkpoint could not be written: {reason}") from e


def _told_elsewhere(record: logging.LogRecord) -> bool:
    """False for what Orbax need not print: tracebacks of errors that `Checkpoints` raises in one line, and that a
    sampler opens the folder for reading.
    """
    return not ("orbax" in record.pathname and (record.exc_info or "is read only" in record.getMessage()))


def _of_no_use(figures: Any) -> float:
    """Orbax saves figures only where it is told of one that tells checkpoints apart; `Keep` does."""
    del figures
    return 0.0


def _bytes(x: Any) -> int:
    """Of an array's shard."""
    shape = x.sharding.shard_shape(x.shape) if getattr(x, "sharding", None) is not None else x.shape
    return int(np.prod(shape)) * x.dtype.itemsize


def _tell(say: Callable[[str], None] | None, line: str) -> None:
    if say:
        say(line)
    elif processes.is_lead():
        print(line, file=sys.stderr, flush=True)


def check(config: ConfigDict) -> None:
    """Raises ConfigError for settings of checkpoints that would fail late."""
    retention.check(config)
    locations.directory("", config.train.checkpoints)


def _saved(state: TrainState) -> dict[str, Any]:
    """What is saved as one: all but the moving average, what is frozen, and an `aux` that isn't there."""
    left_out = {"ema", "frozen"} | ({"aux"} if state.aux is None else set())
    return {name: value for name, value in vars(state).items() if name not in left_out}


def write_config(workdir: str, config: ConfigDict) -> list[str]:
    """Writes WORKDIR/config.json; returns the keys in which it differs from the one that was there.

    Settings that only say how long, how often and where may change between a run and its continuation; all others
    decide what is trained, and another value is refused. Raises ConfigError then, and if the workdir can't be written.
    """
    path = os.path.join(workdir, "config.json")
    changed = configs.difference(read_config(workdir), config) if os.path.exists(path) else []
    if differing := [key for key in changed if not key.startswith(MAY_CHANGE)]:
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise ConfigError(
            f"{workdir} holds a run of another config: it differs in {', '.join(differing[:5])}{more}; "
            "take another --workdir, or the settings of its config.json"
        )
    try:
        os.makedirs(workdir, exist_ok=True)
        with open(path + ".tmp", "w", encoding="utf-8") as f:
            f.write(configs.to_json(config) + "\n")
        os.replace(path + ".tmp", path)
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror or e}; expected a workdir that can be written") from e
    return changed


def check_saved_config(facts: Mapping[str, Any], config: ConfigDict, where: str) -> None:
    """Raises ConfigError if a checkpoint's facts hold another config, in what decides what is trained.

    It says something only where a workdir is new and its checkpoints, in `config.train.checkpoints`, are not.
    """
    if "config" not in facts:
        return
    changed = configs.difference(configs.from_json(facts["config"]), config)
    if differing := [key for key in changed if not key.startswith(MAY_CHANGE)]:
        raise ConfigError(
            f"{where}: the checkpoint is of a run of another config, which differs in {', '.join(differing[:5])}; take "
            "another config.train.checkpoints, or its settings"
        )


def check_config(workdir: str, config: ConfigDict) -> None:
    """Raises ConfigError unless this process finds its own config in the workdir, where process 0 has written its."""
    if not os.path.exists(os.path.join(workdir, "config.json")):
        raise ConfigError(
            f"{workdir}: process 0 has written config.json there, and it can't be seen from here; expected a workdir "
            "on a file system that all processes share"
        )
    if differing := configs.difference(read_config(workdir), config):
        raise ConfigError(
            f"process 0 was started with another config: it differs in {', '.join(differing[:5])}; expected the same "
            "command for all"
        )


def read_config(workdir: str) -> ConfigDict:
    """The config of a workdir; raises ConfigError where there is none."""
    path = os.path.join(workdir, "config.json")
    try:
        with open(path, encoding="utf-8") as f:
            return configs.from_json(f.read())
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror or e}; expected a workdir that `vidgen train` made") from e
    except ValueError as e:
        raise ConfigError(f"{path}: not the config of a run ({e})") from None
