"""Before the first step: do all processes run the same code, versions, config, clips and program?

Where one differs, the run would hang in a collective, or train on and be wrong. It costs a digest of each.
"""

from __future__ import annotations

import collections
import hashlib
import importlib.metadata
import itertools
import json
import pathlib
import platform

import vidgen
from vidgen.config import ConfigError
from vidgen.parallel import processes

VERSIONS = ("jax", "jaxlib", "flax", "optax", "numpy")
SHOWN = 12  # characters of a digest

_comparisons = itertools.count()


def here() -> dict[str, str]:
    """{"code": a digest of the package, "python": its version, "jax": …, …} of this process."""
    found = {name: importlib.metadata.version(name) for name in VERSIONS}
    return {"code": code(pathlib.Path(vidgen.__file__).parent), "python": platform.python_version()} | found


def code(package: pathlib.Path) -> str:
    """A digest of the .py files of a folder and of where they lie in it."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def of(text: str) -> str:
    """A digest of a text, as of a config in JSON or of `lowered.as_text()`."""
    return hashlib.sha256(text.encode()).hexdigest()


def compare(own: dict[str, str]) -> None:
    """Every process calls it with {thing: its digest or version}, as {"config": …, "code": …, "data": …, "step": …}.

    Raises ConfigError on all of them where they differ: it names the processes that are in the minority, and in what
    they differ. Of two halves, the one with process 0 counts as right.
    """
    if processes.alone():
        return
    told = processes.gathered(f"vidgen/fingerprints/{next(_comparisons)}", json.dumps(own))
    # One process reads what all have said, and tells them what it found.
    found = verdict([json.loads(text) for text in told], processes.names()) if told else ""
    if found := processes.agree(found):
        raise ConfigError(found)


def verdict(each: list[dict[str, str]], names: dict[int, str]) -> str:
    """What differs between the processes, in one line; empty where nothing does.

    Args:
      each: of each process, in order, what it called `compare` with.
      names: {process: where it runs}, for the message.
    """
    odd: dict[int, list[str]] = {}
    for thing in sorted({thing for one in each for thing in one}):
        values = [one.get(thing, "nothing") for one in each]
        counts = collections.Counter(values)
        usual = max(counts, key=lambda value: (counts[value], value == values[0]))
        for process, value in enumerate(values):
            if value != usual:
                odd.setdefault(process, []).append(f"{thing} ({value[:SHOWN]} there, {usual[:SHOWN]} elsewhere)")
    if not odd:
        return ""
    told = [
        f"process {process}{f' ({names[process]})' if process in names else ''} in {', '.join(things)}"
        for process, things in itertools.islice(odd.items(), 8)
    ]
    more = f"; and {len(odd) - 8} more" if len(odd) > 8 else ""
    same = "the same command, with the same clone, environment and clips, on every host"
    return f"the {len(each)} processes don't run the same: {'; '.join(told)}{more}; expected {same}"
