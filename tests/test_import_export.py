"""The verbs `import` and `export`: directories in, directories out, whole or not at all."""

import json
import os

import numpy as np
import pytest

from vidgen import export_weights, import_weights, weights
from vidgen.config import ConfigError
from vidgen.interop import wan_vae
from vidgen.tokenizers.vae import VAEConfig

CONFIG = VAEConfig(2, 0, 2, (1,), 1, ())  # one level: an image VAE without any compression
FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def run(tmp_path):
    """A workdir with weights."""
    rng = np.random.default_rng(0)
    flat = {entry.path: rng.normal(size=entry.shape).astype(np.float32) for entry in wan_vae.entries(CONFIG)}
    weights.save(str(tmp_path / "run" / "weights"), "vae", CONFIG.to_dict(), weights.nest(flat))
    return tmp_path / "run"


def test_out_and_in_again_is_the_same(run, tmp_path, capsys):
    out = export_weights.run(str(run), str(tmp_path / "out"))
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", FILE]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["_class_name"] == "AutoencoderKLWan"
    back = import_weights.run(str(tmp_path / "out"), str(tmp_path / "back"))
    assert out.digest == back.digest == weights.load(str(tmp_path / "back")).digest
    for file in (weights.JSON, weights.TENSORS):
        assert (tmp_path / "back" / file).read_bytes() == (run / "weights" / file).read_bytes()
    flat = weights.flatten(weights.load(str(run / "weights")).params)
    assert out.parameters == back.parameters == sum(array.size for array in flat.values())
    assert out.name == back.name == "AutoencoderKLWan" and out.dtype == back.dtype == "float32"
    printed = capsys.readouterr().out
    assert f"{out.parameters:,} parameters in float32" in printed and out.digest in printed


def test_a_copy_out_of_a_workdir(run, tmp_path):
    result = export_weights.run(str(run), str(tmp_path / "copy"), format="vidgen")
    for file in (weights.JSON, weights.TENSORS):
        assert (tmp_path / "copy" / file).read_bytes() == (run / "weights" / file).read_bytes()
    assert result.name == "vae" and result.digest == weights.load(str(tmp_path / "copy")).digest


def test_what_is_there_is_never_touched(run, tmp_path):
    export_weights.run(str(run), str(tmp_path / "there"))
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "note.txt").write_text("mine")
    for verb, source in ((export_weights, run), (import_weights, tmp_path / "there")):
        with pytest.raises(ConfigError, match="expected a new or an empty directory, it holds note.txt"):
            verb.run(str(source), str(taken))
        with pytest.raises(ConfigError, match="a file; expected a new directory"):
            verb.run(str(source), str(taken / "note.txt"))
    assert os.listdir(taken) == ["note.txt"]
    (tmp_path / "empty").mkdir()
    assert import_weights.run(str(tmp_path / "there"), str(tmp_path / "empty")).parameters


def test_nothing_is_left_of_what_failed(run, tmp_path):
    os.truncate(run / "weights" / weights.TENSORS, 100)
    with pytest.raises(ConfigError, match="not a whole safetensors file"):
        export_weights.run(str(run), str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="no such directory"):
        import_weights.run(str(tmp_path / "nowhere"), str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="a weights directory of vidgen already"):
        import_weights.run(str(run / "weights"), str(tmp_path / "out"))
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("verb", [import_weights, export_weights])
def test_unknown_formats_name_the_known(verb, run, tmp_path):
    with pytest.raises(ConfigError, match="--format=gguf: known are diffusers"):
        verb.run(str(run), str(tmp_path / "out"), format="gguf")


def test_weights_that_are_no_vae_or_do_not_fit_their_config(run, tmp_path):
    flat = weights.flatten(weights.load(str(run / "weights")).params)
    weights.save(str(tmp_path / "text"), "text", {}, weights.nest(flat))
    with pytest.raises(ConfigError, match="kind 'text'; diffusers has classes for: vae"):
        export_weights.run(str(tmp_path / "text"), str(tmp_path / "out"))
    weights.save(
        str(tmp_path / "short"), "vae", CONFIG.to_dict(), weights.nest(flat | {"quant_conv/bias": np.zeros(3)})
    )
    with pytest.raises(ConfigError, match=r"quant_conv/bias has shape \[3\]; expected \[4\]"):
        export_weights.run(str(tmp_path / "short"), str(tmp_path / "out"))
    weights.save(str(tmp_path / "more"), "vae", CONFIG.to_dict(), weights.nest(flat | {"extra": np.zeros(3)}))
    with pytest.raises(ConfigError, match="not of this model: array extra"):
        export_weights.run(str(tmp_path / "more"), str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="expected a directory of weights"):
        export_weights.run(str(tmp_path), str(tmp_path / "out"))
