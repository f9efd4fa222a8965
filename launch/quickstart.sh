#!/usr/bin/env bash
# From nothing to a small video model: installs vidgen into .venv, trains on procedural clips, draws samples, judges
# them and writes a report. Run again, it goes on from the last checkpoint.
#
#   bash launch/quickstart.sh [WORKDIR]     default: runs/quickstart in the clone
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/python.sh"
workdir=$(workdir_of runs/quickstart "$@")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
vidgen=.venv/bin/vidgen

make_venv
"$vidgen" train --config configs/quickstart.py --workdir "$workdir"
"$vidgen" sample --workdir "$workdir" --prompt "a red circle moving right" --output "$workdir/sample.mp4"
"$vidgen" evaluate --workdir "$workdir" --suite moving_shapes
"$vidgen" report --workdir "$workdir"

cat <<END

Done. Look at
  $workdir/report.html   curves, samples over time and the judge's table; opens in any browser
  $workdir/sample.mp4    "a red circle moving right"
  $workdir/samples/      samples drawn while training
More of your own:
  $PWD/$vidgen sample --workdir $workdir --prompt "a blue square moving up" --output mine.gif
END
