"""The environment that a run wants on a machine: what every launcher in `launch/` sets, from one place.

    python -m vidgen.planning.environment 2*v5p:4x8x8      prints it as `export` lines

What XLA's compiler is told is no part of it: the step carries its options of the table in `hardware.py` (config
mesh.compiler_options), the same ones that `vidgen plan` compiled with, so XLA_FLAGS and LIBTPU_INIT_ARGS stay as they
are. They are shown as a comment.
"""

from __future__ import annotations

import shlex
import sys

from vidgen.config import ConfigError
from vidgen.planning.hardware import COMPILER_OPTIONS, Topology, parse_topology


def environment(topology: Topology) -> dict[str, str]:
    """What is set for each process of a run on a topology, by name."""
    found = {"PYTHONUNBUFFERED": "1"}
    if topology.chip.platform == "tpu":
        # A TPU that doesn't come up is an error, not a reason to train on the host's CPU.
        found |= {"JAX_PLATFORMS": "tpu,cpu"}
        if topology.hosts > 1:
            found |= {"VIDGEN_DISTRIBUTED": "auto"}
    else:
        from vidgen.planning.memory import HEADROOM  # here, as it imports JAX

        # XLA takes three quarters of a GPU's memory unless told; the plan counts on this share.
        found |= {"JAX_PLATFORMS": "cuda,cpu", "XLA_PYTHON_CLIENT_MEM_FRACTION": str(HEADROOM)}
    return found


def settings(topology: Topology) -> dict[str, str]:
    """What of a config the machine decides: dotted key → value."""
    return {"mesh.slices": str(topology.slices)} if topology.chip.torus and topology.slices > 1 else {}


def for_machine(command: list[str], topology: Topology) -> list[str]:
    """A command of `vidgen`, with what `settings` says where it takes settings and does not say so itself."""
    if not command or command[0] not in ("train", "encode"):
        return list(command)
    said = {argument.partition("=")[0].lstrip("-") for argument in command}
    more = [f"--config.{key}={value}" for key, value in settings(topology).items() if f"config.{key}" not in said]
    return [*command, *more]


def script(topology: Topology) -> str:
    """`environment` as lines for a shell, the compiler's options as comments."""
    lines = [f"export {name}={shlex.quote(value)}" for name, value in environment(topology).items()]
    options = COMPILER_OPTIONS[topology.chip.name]
    told = [f"#   {name}={value}" for name, value in options.items()] or ["#   none"]
    return "\n".join([*lines, f"# What XLA is told for {topology.chip.name}, by the step itself:", *told])


def main(argv: list[str]) -> int:
    """Prints `script` for one topology; the exit status."""
    try:
        if len(argv) != 1:
            raise ConfigError("expected one topology, like v5p:4x8x8, 2*v6e:16x16 or h100:32x8 (hosts x GPUs)")
        print(script(parse_topology(argv[0])))
    except ConfigError as e:
        print(f"environment: error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
