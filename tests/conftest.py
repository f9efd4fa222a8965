"""Four virtual CPU devices for every test, and a config small enough to compile in seconds."""

import contextlib
import os
import pathlib
import tempfile

# libtpu is installed, to compile for TPUs, and would look for some.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

from vidgen import config as configs

jax.config.update("jax_num_cpu_devices", 4)
# Many tests compile the same step.
_cache = tempfile.TemporaryDirectory(prefix="vidgen-compiled-")
jax.config.update("jax_compilation_cache_dir", _cache.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def make_tiny():
    """Two layers of width 32 on clips of 5 and 1 frames of 16 x 16 pixels."""
    c = configs.base()
    c.dtype = "float32"
    c.data.moving_shapes.level = "easy"
    c.data.moving_shapes.sizes = ((5, 16, 16), (1, 16, 16))
    c.data.moving_shapes.clips = 512
    c.rows.update(count=4, tokens=24, segments=4, text=192, caption=48, window=64)
    c.tokenizer.mean = -0.8
    c.text.update(width=32, layers=1, heads=2)
    c.model.update(width=32, layers=2, heads=2, unroll=2, remat="none")
    c.optimizer.update(warmup=2, lr=3e-3, ema=0.9)
    c.train.update(steps=6, log_every=2, checkpoint_every=3)
    c.sample.update(frames=5, height=16, width=16, steps=2)
    return c


def make_tiny_vae():
    """Six steps of a VAE: two of images, then images and clips; critics from the fourth on."""
    c = configs.base()
    c.task, c.dtype = "vae", "float32"
    c.data.moving_shapes.update(level="easy", sizes=((5, 16, 16), (1, 16, 16)), clips=64)
    c.vae.update(base_dim=8, dim_mult=(1, 1), temporal_downsample=(True,), num_res_blocks=1, z_dim=4, remat=False)
    c.clips.update(shapes=((1, 16, 16, 8), (5, 16, 16, 4)), weights=(1.0, 3.0), image_steps=2)
    c.reconstruction.update(gan=0.5, gan_start=3, gan_dim=4, gan_layers=1)
    c.optimizer.update(name="adamw", lr=1e-3, warmup=2, ema=0.9)
    c.train.update(steps=6, log_every=2, checkpoint_every=3)
    return c


def config_file(folder, c):
    """FOLDER/c.py, a config for the command line."""
    (folder / "c.json").write_text(configs.to_json(c))
    (folder / "c.py").write_text(
        "import pathlib\n\nfrom vidgen import config\n\n\n"
        "def get_config(arg=''):\n"
        "    return config.from_json((pathlib.Path(__file__).parent / 'c.json').read_text())\n"
    )
    return folder / "c.py"


def processes(workdir):
    """{process: (its command, as a list; its environment)} of all whose command names this workdir. Linux only."""
    found = {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            command, variables = ((folder / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
        except OSError:  # it has ended since
            continue
        if str(workdir) in b"\0".join(command).decode(errors="replace"):
            pairs = (variable.decode(errors="replace").partition("=") for variable in variables)
            found[int(folder.name)] = [x.decode(errors="replace") for x in command], {k: v for k, _, v in pairs}
    return found


def ranks(workdir):
    """{rank: process} of those that launch/ has started to train in this workdir."""
    found = processes(workdir)
    return {int(env["VIDGEN_PROCESS"]): pid for pid, (_, env) in found.items() if "VIDGEN_PROCESS" in env}


@pytest.fixture
def tiny():
    return make_tiny()


@pytest.fixture
def stopped_at_three(monkeypatch):
    """Within it, a training run is asked to end after its third step, as by SIGTERM."""
    from vidgen import train

    class StopAtThree(train.StopSignal):
        asked = 0

        @property
        def requested(self):
            self.asked += 1
            self.name = "SIGTERM" if self.asked >= 3 else ""
            return bool(self.name)

    @contextlib.contextmanager
    def within():
        with monkeypatch.context() as m:
            m.setattr(train, "StopSignal", StopAtThree)
            yield

    return within


@pytest.fixture(scope="module")
def quick_compiles():
    """Programs that compile in a third of the time and run slower: for many small ones that run once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
