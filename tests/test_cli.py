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
        (["encode", "--config=configs/quickstart.py"], "--output is missing"),
        (["encode", "--config=configs/quickstart.py", "--output=l"], "tokenizer.name=patch.*expected vae"),
        (["import", "--output=w"], "expected one DIRECTORY, got 0"),
        (["import", "theirs"], "--output is missing"),
        (["import", "/nowhere", "--output=w"], "/nowhere: no such directory"),
        (["import", "model.pth", "--output=w"], "model.pth: a pickle, which can run code"),
        (["import", "theirs", "--output=w", "--format=gguf"], "--format=gguf: known are diffusers"),
        (["export", "--output=w"], "expected one WEIGHTS, got 0"),
        (["export", "ours"], "--output is missing"),
        (["export", "/nowhere", "--output=w"], "/nowhere/weights.json: No such file"),
        (["evaluate", "--workdir=w", "--suite=reconstruktion"], "did you mean reconstruction"),
        (["evaluate", "--workdir=/nowhere"], "/nowhere/config.json"),
        (
            ["train", "--config=configs/vae_moving_shapes.py", "--workdir=w", "--config.vae.dim_mult=(1,0,2)"],
            r"vae.dim_mult=\(1, 0, 2\): expected a width ≥ 1",
        ),
        (
            ["train", "--config=configs/vae_moving_shapes.py", "--workdir=w", "--config.vae.dim_mult=((1,),(2,))"],
            "vae.dim_mult=.*expected tuple, like",
        ),
        (
            ["train", "--config=configs/vae_moving_shapes.py", "--workdir=w", "--config.clips.shapes=((10,32,32,8),)"],
            "the VAE wants 1 \\+ 4k frames.*nearest: 9x32x32",
        ),
        (
            ["train", "--config=configs/vae_moving_shapes.py", "--workdir=w", "--config.reconstruction.kl=-1"],
            "config.reconstruction.kl=-1.0: expected 0 to",
        ),
    ],
)
def test_a_wrong_call_ends_in_one_line(argv, says, capsys, monkeypatch):
    import re

    from test_config import ROOT

    monkeypatch.chdir(ROOT)
    assert re.search(says, fails(capsys, *argv)), says


@pytest.mark.parametrize(
    ("verb", "usage", "flags"),
    [
        ("encode", "vidgen encode --config … --output …", ["--input", "--passes", "--config.KEY=VALUE"]),
        ("import", "vidgen import DIRECTORY --output …", ["--format"]),
        ("export", "vidgen export WEIGHTS --output …", ["--format"]),
    ],
)
def test_help_of_the_verbs_of_learned_latents(verb, usage, flags, capsys):
    with pytest.raises(SystemExit):
        cli.main([verb, "--help"])
    out = capsys.readouterr().out
    assert out.startswith(usage + "\n") and all(f"  {flag} " in out for flag in [*flags, "--output", "--json"])


def test_settings_may_be_given_with_and_without_equals():
    rest, changes = cli._settings(["--config=a.py", "--config.train.steps=3", "--config.seed", "4", "--json"], "train")
    assert rest == ["--config=a.py", "--json"] and changes == {"train.steps": "3", "seed": "4"}
