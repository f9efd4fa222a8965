"""The `vidgen` command: reads the flags of a verb, calls it, and says what went wrong in one line."""

from __future__ import annotations

import difflib
import json
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from vidgen.plain import plain
from vidgen.verbs import VERBS, Verb

USAGE = """\
vidgen trains video generation models.

  vidgen train    --config configs/quickstart.py --workdir runs/a      train, or go on from the newest checkpoint
  vidgen sample   --workdir runs/a --prompt "a red circle moving right" --output a.mp4
  vidgen evaluate --workdir runs/a --suite moving_shapes               what the model gets right
  vidgen replay   --workdir runs/a --step 1234                         one step again: what each row and clip of it did
  vidgen report   --workdir runs/a                                     runs/a/report.html: curves, samples, figures
  vidgen ingest   --input VIDEOS --output SHARDS                       your own video files, made ready to train on
  vidgen inspect  SHARDS|WORKDIR                                       what is in a data set, or was dropped, and why
  vidgen encode   --config configs/x.py --output LATENTS               a VAE's latents, made once, to train on
  vidgen import   --format diffusers DIR --output WEIGHTS              weights of other projects in
  vidgen export   WEIGHTS --format diffusers --output DIR              and out
  vidgen plan     --config configs/dit_10b_60k.py --topology v5p:4x8x8  memory, collectives, time and cost of a pod run
  vidgen sweep    --sweep configs/sweeps/scaling.py --output runs/s     many runs, each once; one table of results
  vidgen fit      --runs runs/s/results.csv                            the scaling law in them, and what it predicts

`vidgen VERB --help` explains a verb and its flags. Any setting of a config can be given as --config.KEY=VALUE to
train, encode and plan; vidgen/config.py lists them all. With --json the last line of stdout is one JSON object.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; exits with 2 and one line on stderr for anything that the user can mend."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        sys.exit(0 if argv else 2)
    if argv[0] == "--version":
        from vidgen import __version__

        print(f"vidgen {__version__}")
        sys.exit(0)
    name, *rest = argv
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        _fail(f"unknown verb {name!r}: known are {', '.join(VERBS)}{hint}")
    if {"-h", "--help", "-help"} & set(rest):
        print(_help(name, VERBS[name]))
        sys.exit(0)
    values = _parse(name, VERBS[name], rest)
    as_json = values.pop("json")
    from vidgen import secrets
    from vidgen.config import ConfigError
    from vidgen.planning import libtpu

    secrets.guard()
    libtpu.settle()  # else it complains, where it is installed and there is no TPU
    try:
        result = VERBS[name].call(**values)
    except (ConfigError, OSError) as e:
        from vidgen.parallel.processes import exit_status

        _fail(" ".join(str(e).split()), name, exit_status(e))
    except KeyboardInterrupt:
        print(f"vidgen {name}: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except RuntimeError as e:
        if "No such compile option" in str(e) or "Unknown compile option" in str(e):
            _fail(f"{' '.join(str(e).split())[:200]}; config.mesh.compiler_options=none does without", name)
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        _fail(
            "the device is out of memory: try fewer config.rows.count and config.model.remat=full; for a VAE, fewer "
            "chunks in config.clips.shapes and config.vae.remat=True; or more devices",
            name,
        )
    code = result.pop("exit", 0)
    if as_json:
        print(json.dumps(secrets.redacted(plain(result)), ensure_ascii=False, default=str))
    sys.exit(code)


def _parse(name: str, verb: Verb, argv: list[str]) -> dict[str, Any]:
    """Values of the flags by name; settings, --config.KEY=VALUE, stand under `changes`."""
    from absl import flags

    values = flags.FlagValues()
    flags.DEFINE_boolean("json", False, "", flag_values=values)
    for flag in verb.flags:
        kind = flag.kind[0] if isinstance(flag.kind, list) else flag.kind
        define = {
            (str, False): flags.DEFINE_string,
            (int, False): flags.DEFINE_integer,
            (float, False): flags.DEFINE_float,
            (bool, False): flags.DEFINE_boolean,
            (str, True): flags.DEFINE_multi_string,
            (int, True): flags.DEFINE_multi_integer,
        }[kind, isinstance(flag.kind, list)]
        define(flag.name, [] if isinstance(flag.kind, list) else flag.default, flag.help, flag_values=values)

    changes = {}
    if verb.settings:
        argv, changes = _settings(argv, name)
    try:
        positional = values([name, *argv])[1:]
    except flags.Error as e:
        _fail(" ".join(str(e).split()), name)
    found = {flag.name: getattr(values, flag.name) for flag in verb.flags}
    for flag in verb.flags:
        if flag.required and not found[flag.name]:
            _fail(f"--{flag.name} is missing: {flag.help}", name)
    if verb.positional:
        if len(positional) != 1:
            _fail(f"expected one {verb.positional.upper()}, got {len(positional)}", name)
        found[verb.positional] = positional[0]
    elif positional:
        _fail(f"unexpected argument {positional[0]!r}; flags begin with --", name)
    # Grain reads absl's global flags, which nobody else parses.
    flags.FLAGS.mark_as_parsed()
    return found | {"json": values.json} | ({"changes": changes} if verb.settings else {})


def _settings(argv: list[str], verb: str) -> tuple[list[str], dict[str, str]]:
    """Takes --config.KEY=VALUE and --config.KEY VALUE out of the arguments."""
    rest, changes = [], {}
    arguments = iter(argv)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not key.startswith(("--config.", "-config.")):
            rest.append(argument)
            continue
        if not equals:
            value = next(arguments, None)
            if value is None:
                _fail(f"{key}: expected a value, as in {key}=VALUE", verb)
        changes[key.split(".", 1)[1]] = value
    return rest, changes


def _help(name: str, verb: Verb) -> str:
    usage = f"vidgen {name}" + (f" {verb.positional.upper()}" if verb.positional else "")
    usage += "".join(f" --{flag.name} …" for flag in verb.flags if flag.required)
    lines = [usage, "", verb.help, ""]
    for flag in verb.flags:
        shown = "" if flag.default in (None, "", 0, False) else f" [{flag.default}]"
        lines.append(f"  --{flag.name:<13} {flag.help}{shown}")
    if verb.settings:
        lines.append("  --config.KEY=VALUE  any setting of vidgen/config.py, as --config.train.steps=2000")
    return "\n".join([*lines, f"  --{'json':<13} the last line of stdout is one JSON object"])


def _fail(message: str, verb: str = "", status: int = 2) -> NoReturn:
    from vidgen.secrets import redacted

    print(f"vidgen{' ' + verb if verb else ''}: error: {redacted(message)}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
