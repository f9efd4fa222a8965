# What the scripts beside it share: the arguments, a Python that can run vidgen, and the clone's .venv. Sourced by them
# with `set -euo pipefail`; `make_venv` is called from the root of the clone.
#
#   PYTHON=…   the Python to take; without it the newest that fits.

# jax has wheels for these; a newer Python would fail in the middle of the install.
fitting_versions="3.13 3.12 3.11"

say() { printf '%s\n' "$*" >&2; }

# workdir_of DEFAULT [WORKDIR]: prints WORKDIR from where the script was called, or DEFAULT in the clone, as a whole path.
workdir_of() {
    local clone
    if [ $# -gt 2 ] || [ "${2:-}" = --help ] || [ "${2:-}" = -h ]; then
        say "usage: bash launch/$(basename "$0") [WORKDIR]"
        return 2
    fi
    clone=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    case ${2:-} in
        "") printf '%s\n' "$clone/$1" ;;
        /*) printf '%s\n' "$2" ;;
        *) printf '%s\n' "$PWD/$2" ;;
    esac
}

# Prints the version (3.12) of the Python $1; fails where it doesn't run, is out of range or can't make a venv.
# It has to be run to know: version managers leave shims behind for Pythons that aren't there.
python_version() {
    local version
    version=$("$1" -c 'import sys, venv, ensurepip; print("%d.%d" % sys.version_info[:2])' 2>/dev/null </dev/null) || return 1
    case " $fitting_versions " in
        *" $version "*) printf '%s\n' "$version" ;;
        *) return 1 ;;
    esac
}

# Prints the Python to use, or says what is missing.
find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        if ! python_version "$PYTHON" >/dev/null; then
            say "error: PYTHON=$PYTHON does not fit: expected a Python of ${fitting_versions// /, } that runs and has the modules venv and ensurepip"
            return 1
        fi
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in $(printf 'python%s ' $fitting_versions) python3 python; do
        if python_version "$candidate" >/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    say "error: no Python of ${fitting_versions// /, } with the modules venv and ensurepip found on PATH; install one (Debian, Ubuntu: python3-venv) or name it: PYTHON=/path/to/python bash $0"
    return 1
}

# make_venv [EXTRA,…]: .venv with this clone installed in it, editable, with its extras. A second run finds it done.
make_venv() {
    local extra=${1:-} python version stamp wanted
    python=$(find_python)
    version=$(python_version "$python")
    if [ -e .venv ] && [ "$(python_version .venv/bin/python)" != "$version" ]; then
        say "Making .venv again: it is not a working Python $version"
        rm -rf .venv
    fi
    if [ ! -e .venv ]; then
        say "Making .venv with Python $version ($python)"
        "$python" -m venv .venv
    fi
    # The path is part of it, because an editable install and its console script hold the path of the clone.
    stamp=.venv/installed-${extra:-base}
    wanted="$(cat setup.cfg pyproject.toml | cksum) $PWD"
    if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
        say "Installing vidgen${extra:+[$extra]} into .venv (minutes, the first time)"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${extra:+[$extra]}" </dev/null
        printf '%s\n' "$wanted" >"$stamp"
    fi
}
