"""Where the checkpoints of a run lie: in its workdir, or where `config.train.checkpoints` says."""

from __future__ import annotations

import json
import os

from etils import epath

from vidgen.config import ConfigError

FOLDER = "checkpoints"


def directory(workdir: str, location: str | None = None) -> epath.Path:
    """Where a run's checkpoints lie.

    Args:
      workdir: of the run.
      location: `config.train.checkpoints`; None: what WORKDIR/config.json says, where it is there.

    Raises ConfigError for a place that they can't lie in.
    """
    location = (_told(workdir) if location is None else location).removeprefix("file://")
    if location.startswith("gs://"):
        import fsspec  # it comes with Orbax, and is used for buckets alone

        # Other processes write there, and tensorstore in this one: a listing that is kept would not show it.
        fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False
        return epath.Path(location)
    if "://" in location:
        raise ConfigError(
            f"config.train.checkpoints={location}: Orbax writes to disks and to gs:// alone; expected a directory, "
            "where a bucket is mounted say, or gs://BUCKET/FOLDER"
        )
    return epath.Path(os.path.abspath(location or os.path.join(workdir, FOLDER)))


def is_run(workdir: str) -> bool:
    """Whether a directory is the workdir of a run that has, or may have, checkpoints."""
    return os.path.isdir(os.path.join(workdir, FOLDER)) or bool(_told(workdir))


def _told(workdir: str) -> str:
    """`train.checkpoints` of a workdir's config; empty where it has none, or no config that can be read."""
    try:
        with open(os.path.join(workdir, "config.json"), encoding="utf-8") as f:
            return str(json.load(f).get("train", {}).get("checkpoints", ""))
    except (OSError, ValueError, AttributeError):
        return ""
