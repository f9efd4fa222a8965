"""Checkpoints: Orbax, asynchronous, restored straight onto any mesh."""

from __future__ import annotations

import errno
import logging
import os
from typing import Any

import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from vidgen import config as configs
from vidgen.config import ConfigError
from vidgen.training.state import TrainState

FOLDER = "checkpoints"

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


class Checkpoints:
    """The checkpoints of a workdir: `WORKDIR/checkpoints/<step>/`.

    A checkpoint has the state without its moving average, the moving average on its own, so that a sampler reads no
    more than it needs, and a few facts as JSON.
    """

    def __init__(self, workdir: str, keep: int = 2, read_only: bool = False):
        """Opens, and makes where missing, the folder of checkpoints, of which the newest `keep` are kept."""
        logging.getLogger("absl").addFilter(_told_elsewhere)
        if read_only:
            options = ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0)
        else:
            options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        names = ("state", "ema", "facts")
        self._directory = os.path.join(os.path.abspath(workdir), FOLDER)
        try:
            self._manager = ocp.CheckpointManager(self._directory, options=options, item_names=names)
        except OSError as e:
            raise ConfigError(
                f"{self._directory}: {e.strerror or e}; expected a directory that can be written"
            ) from None

    @property
    def latest(self) -> int | None:
        """The newest finished checkpoint's step."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """The finished checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, facts: dict[str, Any]) -> None:
        """Starts to save; the state may be donated when this returns. That a save failed is raised later."""
        step = int(state.step)
        if step == self.latest:
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_saved(state)),
            ema=ocp.args.StandardSave(state.ema),
            facts=ocp.args.JsonSave(facts),
        )
        self._guarded(lambda: self._manager.save(step, args=args, force=True))

    def facts(self, step: int) -> dict[str, Any]:
        """What `save` was given beside the state."""
        return self._restored(step, facts=ocp.args.JsonRestore())["facts"]

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of `step`; `like` holds ShapeDtypeStructs with the shardings to restore into.

        What is frozen is not saved, and not in it.
        """
        state, ema = ocp.args.StandardRestore(_saved(like)), ocp.args.StandardRestore(like.ema)
        items = self._restored(step, state=state, ema=ema)
        return TrainState(**items["state"], ema=items["ema"])

    def restore_ema(self, step: int, like: Any) -> Any:
        """The moving average of `step` alone."""
        return self._restored(step, ema=ocp.args.StandardRestore(like))["ema"]

    def _restored(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (OSError, ValueError, KeyError) as e:  # what a damaged file raises depends on the file
            older = [s for s in self.steps if s < step]
            way = f"delete it to go on from step {older[-1]}" if older else "no older one is left"
            text = " ".join(str(e).split())[:200]
            raise ConfigError(f"{self._directory}/{step}: the checkpoint cannot be read ({text}); {way}") from e

    def check(self) -> None:
        """Raises ConfigError if a save under way has failed; returns at once."""
        self._guarded(self._manager.check_for_errors)

    def wait(self) -> None:
        """Until what was saved is on disk; raises ConfigError if it could not be written."""
        self._guarded(self._manager.wait_until_finished)

    def close(self) -> None:
        """Ends it, when what was saved is on disk."""
        self.wait()
        self._manager.close()

    def _guarded(self, act) -> None:
        try:
            act()
        except (OSError, ValueError) as e:  # tensorstore raises ValueError for a full disk
            reasons = [os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)]
            text = " ".join(str(e).split())
            reason = next((reason for reason in reasons if reason in text), text[:300])
            raise ConfigError(f"{self._directory}: the checkpoint could not be written: {reason}") from e


def _told_elsewhere(record: logging.LogRecord) -> bool:
    """False for what Orbax need not print: tracebacks of errors that `Checkpoints` raises in one line, and that a
    sampler opens the folder for reading.
    """
    return not ("orbax" in record.pathname and (record.exc_info or "is read only" in record.getMessage()))


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
        raise ConfigError(f"{path}: {e.strerror or e}; expected a workdir that can be written") from None
    return changed


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
        raise ConfigError(f"{path}: {e.strerror or e}; expected a workdir that `vidgen train` made") from None
    except ValueError as e:
        raise ConfigError(f"{path}: not the config of a run ({e})") from None
