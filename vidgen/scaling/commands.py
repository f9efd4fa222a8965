"""Calling the commands of a cluster, whose servers are away at times."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence

from vidgen.config import ConfigError

PAUSES = (2.0, 10.0, 30.0)  # seconds between tries


def told(command: Sequence[str], hint: str, given: str = "", pauses: Sequence[float] = PAUSES) -> str:
    """What a command prints.

    A command that fails is tried again after each of the pauses: that a scheduler does not answer must not be taken
    for an answer.

    Args:
      hint: where the command comes from, for who has not got it.
      given: its standard input.

    Raises ConfigError where it is not on PATH, takes longer than two minutes or has failed every time.
    """
    error = ""
    for pause in (*pauses, None):
        try:
            done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=120)
        except FileNotFoundError:
            raise ConfigError(f"{command[0]} is not on PATH: {hint}") from None
        except subprocess.TimeoutExpired:
            error = "no answer within 120 s"
        else:
            if done.returncode == 0:
                return done.stdout
            error = done.stderr.strip() or f"exit status {done.returncode}"
        if pause is not None:
            time.sleep(pause)
    raise ConfigError(f"{' '.join(command[:3])} failed: {' '.join(error.split())[:300]}")
