"""One step really compiled for a TPU pod slice that is not here: the promise of `vidgen plan`."""

import importlib.util
import os
import subprocess
import sys
import time

import pytest
from conftest import make_tiny

from vidgen import plan
from vidgen.planning import aot
from vidgen.planning.hardware import parse_topology

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: the extra [tpu], Linux on x86-64 only"
)


def test_a_step_compiles_for_a_v5p(capsys):
    c = make_tiny()
    c.dtype = "bfloat16"
    c.rows.update(count=2, tokens=1024, segments=4)
    c.model.update(width=256, layers=2, heads=2, unroll=1, remat="attention", residual="bfloat16")
    c.optimizer.name = "adamw"
    c.mesh.update(data=1, fsdp=2, context=2, attention="gather")
    facts = plan.run(c, "v5p:2x2x1")
    assert facts["fits"] and 0 < facts["peak_bytes_per_device"] < 2**30
    assert facts["hbm_bytes_per_device"] == int(95.73 * 2**30)
    # Attention is the TPU's own kernel, forward and backward once each, and no third time for the backward pass.
    kernels = {name.split()[1]: n for name, n in facts["fused_kernels"].items()}
    assert sum(n for name, n in kernels.items() if "fwd" in name) == 2 + 1  # self and cross, cross once more
    assert sum(n for name, n in kernels.items() if "dkv" in name) == 2
    found = {(x["opcode"], tuple(x["axes"]), x["role"]) for x in facts["collectives"]}
    assert {("all-gather", ("fsdp",), "weights"), ("all-gather", ("context",), "keys")} <= found
    assert facts["overlap"]["weights_by_all_reduce"] == 0
    assert facts["compiler_options"] and facts["compile_seconds"] > 0
    said = capsys.readouterr().out
    assert "COMPILED in" in said and "transfers read from the compiled program" in said


def test_two_plans_at_once_share_libtpu():
    """Which refuses a second process unless it is told: both hold it at the same time."""
    hold = (
        "import sys; from vidgen.planning import aot, hardware;"
        "print(len(aot.devices(hardware.parse_topology('v5e:2x2'))), flush=True); sys.stdin.read()"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TPU_", "ALLOW_"))}
    environment["JAX_PLATFORMS"] = "cpu"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    with (
        subprocess.Popen([sys.executable, "-c", hold], **pipes) as one,
        subprocess.Popen([sys.executable, "-c", hold], **pipes) as two,
    ):
        assert one.stdout.readline() == two.stdout.readline() == "4\n"
        one.stdin.close()
        two.stdin.close()


@pytest.mark.parametrize(
    ("name", "devices"),
    [("v5e:4x4", 16), ("v5p:4x8x8", 256), ("v6e:16x16", 256), ("tpu7x:2x2x1", 8), ("2*v5p:2x2x1", 8)],
)
def test_topologies_have_the_devices_that_their_names_say(name, devices):
    start = time.perf_counter()
    topology = parse_topology(name)
    assert len(aot.devices(topology)) == topology.devices == devices
    assert time.perf_counter() - start < 30
