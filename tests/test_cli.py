"""The command line: help that teaches, errors of one line."""

import subprocess
import sys
import time

import pytest

from vidgen import cli


def fails(capsys, *argv):
    with pytest.raises(SystemExit) as e:
        cli.main(argv)
    out, err = capsys.readouterr()
    assert e.value.code == 2 and out == "" and err.count("\n") == 1 and "error:" in err
    return err


def test_help_is_fast_and_names_the_verbs():
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "vidgen.cli", "--help"], capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 0.5
    assert all(f"vidgen {verb}" in done.stdout for verb in cli.VERBS)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_explains_its_flags(verb, capsys):
    with pytest.raises(SystemExit) as e:
        cli.main([verb, "--help"])
    out = capsys.readouterr().out
    assert e.value.code == 0
    for flag in cli.VERBS[verb].flags:
        assert f"--{flag.name}" in out and flag.help in out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["tran"], "unknown verb 'tran'.*did you mean train"),
        (["train", "--workdir=w"], "--config is missing"),
        (["train", "--config=configs/quickstart.py"], "--workdir is missing"),
        (["train", "--config=configs/quikstart.py", "--workdir=w"], "no such file; did you mean configs/quickstart.py"),
        (
            ["train", "--config=configs/quickstart.py", "--workdir=w", "--config.train.step=3"],
            "did you mean config.train.steps",
        ),
        (["train", "--config=configs/quickstart.py", "--workdir=w", "--config.train.steps"], "expected a value"),
        (["train", "--config=configs/quickstart.py", "--workdir=w", "--input=nowhere"], "config.data.source=nowhere"),
        (["train", "--config=configs/quickstart.py", "--workdir=w", "extra"], "unexpected argument 'extra'"),
        (["sample", "--workdir=w", "--output=a.mp4", "--seed=x"], "seed"),
        (["sample", "--workdir=w", "--output=a.mp4", "--propmt=x"], "propmt"),
        (["sample", "--workdir=/nowhere", "--output=a.mp4", "--prompt=x"], "/nowhere/config.json"),
        (["inspect"], "expected one DATASET"),
    ],
)
def test_a_wrong_call_ends_in_one_line(argv, says, capsys, monkeypatch):
    import re

    from test_config import ROOT

    monkeypatch.chdir(ROOT)
    assert re.search(says, fails(capsys, *argv)), says


def test_settings_may_be_given_with_and_without_equals():
    rest, changes = cli._settings(["--config=a.py", "--config.train.steps=3", "--config.seed", "4", "--json"], "train")
    assert rest == ["--config=a.py", "--json"] and changes == {"train.steps": "3", "seed": "4"}
