"""What launchers set for a machine, from the one place that says it."""

import json
import os
import subprocess
import sys

import pytest

from vidgen.planning.environment import environment, for_machine, main, script
from vidgen.planning.hardware import COMPILER_OPTIONS, parse_topology
from vidgen.planning.memory import HEADROOM

SLICES = parse_topology("2*v5p:4x8x8")


def test_pods_find_each_other_and_gpus_have_the_memory_that_the_plan_counts_on():
    pod, host, gpus = (environment(parse_topology(text)) for text in ("v5p:4x8x8", "v6e:2x2", "h100:4x8"))
    assert pod["VIDGEN_DISTRIBUTED"] == "auto" and pod["JAX_PLATFORMS"] == "tpu,cpu"
    assert "VIDGEN_DISTRIBUTED" not in host and "VIDGEN_DISTRIBUTED" not in gpus  # Slurm is found without
    assert float(gpus["XLA_PYTHON_CLIENT_MEM_FRACTION"]) == HEADROOM and gpus["JAX_PLATFORMS"] == "cuda,cpu"


def test_a_shell_that_reads_it_has_it_and_the_options_are_told():
    for text in ("v5p:4x8x8", "h100:4x8", "v5e:2x2"):
        told = script(parse_topology(text))
        command = [
            "bash",
            "-c",
            f"eval \"$TOLD\"; {sys.executable} -c 'import json, os; print(json.dumps(dict(os.environ)))'",
        ]
        out = subprocess.run(
            command, env=os.environ | {"TOLD": told}, capture_output=True, text=True, check=True
        ).stdout
        found = json.loads(out)
        wanted = environment(parse_topology(text))
        assert {name: found[name] for name in wanted} == wanted
        options = COMPILER_OPTIONS[text.partition(":")[0]]
        assert all(f"#   {name}={value}\n" in told + "\n" for name, value in options.items())
        assert options or told.endswith("#   none")


@pytest.mark.parametrize(
    ("command", "added"),
    [
        (["train", "--workdir", "w"], ["--config.mesh.slices=2"]),
        (["encode"], ["--config.mesh.slices=2"]),
        (["train", "--config.mesh.slices", "1"], []),
        (["train", "--config.mesh.slices=4"], []),
        (["evaluate", "--workdir", "w"], []),  # takes no settings
        ([], []),
    ],
)
def test_the_config_learns_of_several_slices_unless_it_says_so_itself(command, added):
    assert for_machine(command, SLICES) == command + added
    assert for_machine(command, parse_topology("v5p:4x8x8")) == command


def test_as_a_command(capsys):
    assert main(["v6e:16x16"]) == 0 and "export VIDGEN_DISTRIBUTED=auto\n" in capsys.readouterr().out
    for argv, says in (
        ([], "expected one topology, like v5p:4x8x8"),
        (["v6e:3x3"], "v6e comes as"),
        (["h100:4x9"], "a host has"),
    ):
        assert main(argv) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("environment: error: ") and says in err and err.count("\n") == 1
