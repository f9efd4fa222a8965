"""What libtpu, compiler and driver of TPUs, is told through the environment where there is no TPU; it reads it once."""

from __future__ import annotations

import glob
import os

ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # any: what a program is compiled for says its topology
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # without it a second process beside this one is refused
}


def settle() -> None:
    """Sets what isn't set, unless this machine has a TPU: then libtpu finds out for itself."""
    if not glob.glob("/dev/accel*") and not glob.glob("/dev/vfio/[0-9]*"):
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
