#!/usr/bin/env bash
# Installs vidgen into .venv and runs the linter and the tests. Arguments go to pytest: bash launch/test.sh -k packing
#
#   VIDGEN_PEERS=1   also installs torch, diffusers and the weights of LPIPS and I3D, and runs the tests that need them;
#                    without, those are skipped, and said to be
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/python.sh

if [ -n "${VIDGEN_PEERS:-}" ]; then
    make_venv test,perceptual,peers
    # lpips asks for torchvision, of which it needs one network's layers: the test has its own.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps lpips==0.1.4 </dev/null
else
    make_venv test
fi
.venv/bin/python -m ruff check .
.venv/bin/python -m pytest -n 2 --dist loadfile -q "$@"
