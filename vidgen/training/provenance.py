"""Which program wrote a checkpoint: kept in its facts, and compared when a run goes on."""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import vidgen
from vidgen.config import ConfigError
from vidgen.parallel import fingerprints

FORMAT = 1  # of a checkpoint: its items, and what of a state is in which
KEY = "written_by"
PACKAGES = ("jax", "orbax-checkpoint")


@functools.cache
def here() -> dict[str, Any]:
    """Of the program that runs: {"format", "vidgen", "code" (a digest over the package's files), "commit", packages}.

    The commit is empty where the package is no part of a git checkout.
    """
    code = fingerprints.code(Path(vidgen.__file__).parent)[:16]
    own = {"format": FORMAT, "vidgen": vidgen.__version__, "code": code, "commit": _commit()}
    return own | {name: metadata.version(name) for name in PACKAGES}


def _commit() -> str:
    root = Path(vidgen.__file__).parent.parent
    if not (root / ".git").exists():
        return ""
    # Without the user's configuration: another owner of the checkout, say, is no reason to ask or to fail.
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    try:
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False, env=environment)
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def compare(facts: Mapping[str, Any], where: str) -> str:
    """What differs between the program that wrote a checkpoint's facts and this one, in a line; empty: nothing.

    Raises ConfigError, naming `where`, for a checkpoint of a newer format than this program knows.
    """
    then, now = facts.get(KEY) or {}, here()
    if then.get("format", 0) > FORMAT:
        raise ConfigError(
            f"{where}: a checkpoint of format {then['format']}, which vidgen {then.get('vidgen', '')} wrote; this is "
            f"vidgen {now['vidgen']}, which knows formats up to {FORMAT}; take a newer vidgen"
        )
    differing = [name for name in now if name != "format" and then.get(name, now[name]) != now[name]]
    if not differing:
        return ""
    told = ", ".join(f"{name} {_short(then[name])}, now {_short(now[name])}" for name in differing)
    return f"The checkpoint was written by another program: {told}"


def _short(value: Any) -> str:
    return str(value)[:12] or "none"
