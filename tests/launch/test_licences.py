"""LICENCES.md lists what setup.cfg asks for, and nothing that may not be there."""

import importlib.util
import re

import pytest

SPEC = importlib.util.spec_from_file_location("licences", "launch/licences.py")
licences = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(licences)


@pytest.fixture
def rows():
    """Name → (version, licence, needed by) of LICENCES.md."""
    lines = licences.FILE.read_text(encoding="utf-8").splitlines()
    found = [re.fullmatch(r"\| (\S+) \| (\S+) \| (.+) \| (.+) \|", line) for line in lines]
    return {m[1]: m.groups()[1:] for m in found if m and m[1] not in ("package", "---")}


def test_all_that_is_asked_for_is_listed(rows):
    wanted = licences.requirements(licences.ROOT / "setup.cfg")
    assert len(wanted) > 30 and set(wanted) <= set(rows)
    assert {name: rows[name][2] for name in wanted} == {name: ", ".join(why) for name, why in wanted.items()}
    assert not [name for name in wanted if rows[name][1].startswith("not installed")]


def test_what_is_not_permissive_is_named_with_the_reason(rows):
    odd = {name for name, (_, licence, _) in rows.items() if not set(licence.split(" and ")) <= licences.PERMISSIVE}
    told = licences.FILE.read_text(encoding="utf-8").partition("\n## ")[2]
    for name in odd | {"av"}:
        assert licences.remark(name) and re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", told), name
    assert not {"GPL", "AGPL", "unknown"} & {part for _, licence, _ in rows.values() for part in licence.split(" and ")}


def test_licences_of_direct_needs_are_as_installed(rows):
    found = licences.installed(licences.sys.path)
    direct = [name for name, why in licences.requirements(licences.ROOT / "setup.cfg").items() if "vidgen" in why]
    assert {n: licences.licence_of(found[n]) for n in direct} == {n: rows[n][1] for n in direct}


class Package:
    def __init__(self, expression="", classifiers=(), said=""):
        self.metadata = self
        self.fields = {"License-Expression": expression, "License": said}
        self.classifiers = [f"License :: OSI Approved :: {c}" for c in classifiers]

    def get(self, key):
        return self.fields.get(key)

    def get_all(self, key):
        return self.classifiers if key == "Classifier" else None


@pytest.mark.parametrize(
    "package, licence",
    [
        (Package("MIT"), "MIT"),
        (Package("MPL-2.0 AND MIT"), "MPL-2.0 and MIT"),
        (Package("GPL-3.0-or-later OR MIT"), "MIT"),
        (Package(classifiers=["GNU General Public License v3 (GPLv3)"], said="MIT"), "GPL"),
        (Package(classifiers=["GNU Affero General Public License v3"]), "AGPL"),
        (Package(classifiers=["GNU Lesser General Public License v2 (LGPLv2)"]), "LGPL"),
        (Package(said="LicenseRef-NVIDIA-Proprietary"), "proprietary"),
        (Package(), "unknown"),
        (Package(said="see the file"), "unknown"),
    ],
)
def test_a_licence_is_read_from_what_a_package_says(package, licence):
    assert licences.licence_of(package) == licence
    assert (set(licence.split(" and ")) <= licences.PERMISSIVE) == (licence == "MIT")
