#!/usr/bin/env bash
# Installs vidgen into .venv and runs the linter and the tests. Arguments go to pytest: bash launch/test.sh -k packing
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/python.sh

make_venv test
.venv/bin/python -m ruff check .
.venv/bin/python -m pytest -n 2 --dist loadfile -q "$@"
