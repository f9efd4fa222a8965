"""The scorecard of a suite: every setting that decides its figures, and the command that makes them again."""

from __future__ import annotations

import hashlib
import platform
import shlex
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

import vidgen
from vidgen import config as configs


def of(
    workdir: str,
    suite: str,
    version: int,
    config: ConfigDict,
    step: int | None,
    flags: Mapping[str, Any],
    decided_by: Mapping[str, Any],
) -> dict[str, Any]:
    """What stands under "scorecard" in SUITE.json, plain JSON values.

    Args:
      config: of the run, as its workdir has it.
      step: of the checkpoint; None where there is none.
      flags: of `vidgen evaluate` that make the same figures again, whatever the defaults will be then; {name: value},
        a list for a flag that may be given several times, None for one to leave out.
      decided_by: what only the suite knows.
    """
    device = jax.devices()[0]
    return {
        "suite": suite,
        "version": version,
        "command": command(workdir, suite, flags),
        "step": step,
        "config": hashlib.sha256(configs.to_json(config).encode()).hexdigest()[:16],
        **decided_by,
        "dtype": config.dtype,
        "devices": f"{jax.device_count()} x {device.device_kind}",
        "platform": device.platform,
        "vidgen": vidgen.__version__,
        "jax": jax.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def command(workdir: str, suite: str, flags: Mapping[str, Any]) -> str:
    """The shell's line for `vidgen evaluate`."""
    words = ["vidgen", "evaluate", "--workdir", workdir, "--suite", suite]
    for name, value in flags.items():
        if isinstance(value, bool):
            words += [f"--{name}" if value else f"--no{name}"]
        elif isinstance(value, list | tuple):
            words += [word for one in value for word in (f"--{name}", str(one))]
        elif value is not None:
            words += [f"--{name}", str(value)]
    return shlex.join(words)
