"""The VAE's configs build; the large ones without a device that could hold them."""

import pathlib

import jax
import pytest

from vidgen import config as configs
from vidgen.config import ConfigError
from vidgen.objectives import lpips
from vidgen.parallel.mesh import AXES
from vidgen.training import autoencoding
from vidgen.training.program import check

FOLDER = pathlib.Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("name", "stride", "millions"),
    [
        ("vae_moving_shapes.py", (4, 8, 8), 1.53),
        ("vae_real_clips.py", (4, 8, 8), 2.68),
        ("vae_wan.py", (4, 8, 8), 126.9),
        ("vae_wan.py:2.1,81x480x832", (4, 8, 8), 126.9),
        ("vae_wan.py:2.2", (4, 16, 16), 704.7),
    ],
)
def test_a_config_is_what_it_says(name, stride, millions, monkeypatch):
    c = configs.load(str(FOLDER / name))
    check(c)
    monkeypatch.setattr(lpips, "load", dict)  # only shapes are looked at
    c.mesh.update(data=1, context=1)
    mesh = autoencoding.mesh(c, jax.devices()[:1])
    assert tuple(mesh.shape) == AXES
    task = autoencoding.task(c, mesh)
    assert task.model.config.stride == stride
    params, aux = jax.eval_shape(task.init, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(params["vae"])) / 1e6 == pytest.approx(millions, rel=0.01)
    assert ("critics" in params) == (aux is not None) == (c.reconstruction.gan > 0)
    assert len(task.losses) == 1 + (c.reconstruction.gan > 0)


def test_an_argument_that_is_no_size():
    with pytest.raises(ConfigError, match="'480p': expected FRAMESxHEIGHTxWIDTH, such as 81x480x832"):
        configs.load(f"{FOLDER / 'vae_wan.py'}:2.1,480p")
    with pytest.raises(ConfigError, match="vae_wan.py:3: expected 2.1 or 2.2"):
        configs.load(f"{FOLDER / 'vae_wan.py'}:3")
