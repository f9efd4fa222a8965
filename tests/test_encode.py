"""`vidgen encode`: what a cache holds, going on after a kill, and that nothing is ever mixed."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import text_weights

from vidgen import config as configs
from vidgen import encode, weights
from vidgen.config import ConfigError
from vidgen.data import feed, latents
from vidgen.data.clip import BadClip, ClipSizes
from vidgen.data.latents import EncodedClip, Layout
from vidgen.data.packing import Packing
from vidgen.data.sources import open_source
from vidgen.geometry import Geometry
from vidgen.text import frozen
from vidgen.tokenizers import base
from vidgen.tokenizers.vae import CausalVAE, VAEConfig

SHAPE = VAEConfig(base_dim=4, z_dim=4, dim_mult=(1, 1, 1), num_res_blocks=1, temporal_downsample=(True, False))


def make_weights(path, seed=1):
    like = jax.eval_shape(CausalVAE(SHAPE).init, jax.random.key(0), jnp.zeros((1, 3, 8, 8, 3)))["params"]
    draw = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: draw.normal(0, np.prod(x.shape[:-1]) ** -0.5, x.shape).astype(np.float32), like)
    weights.save(str(path), "vae", SHAPE.to_dict(), params)
    return str(path)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return make_weights(tmp_path_factory.mktemp("vae") / "weights")


@pytest.fixture
def config(tiny, vae, monkeypatch):
    """64 clips of 9 frames and of 1; a shard holds from six to thirty."""
    monkeypatch.setattr(latents, "SHARD_BYTES", (16_000, 16_000))
    tiny.data.moving_shapes.update(sizes=((9, 16, 20), (1, 16, 16)), clips=64)
    tiny.tokenizer.update(name="vae", weights=vae, stride=(2, 4, 4), patch=(1, 2, 2))
    tiny.rows.tokens = 16  # four latent frames of four tokens: clips of 9 frames are cut to 7
    return tiny


def setup(config):
    tokenizer = base.from_config(config.tokenizer)
    source = open_source(config.data, "train")
    return tokenizer, source, Packing(source.sizes, tokenizer.geometry, config.rows, config.seed)


def cached(config, directory):
    config.data.latents = str(directory)
    return latents.open_clips(config, base.from_config(config.tokenizer))


class Faulty:
    """A source with a clip that can't be read."""

    def __init__(self, source, faults):
        self.sizes, self.name, self.fingerprint = source.sizes, source.name, source.fingerprint
        self._source, self._faults = source, faults

    def read(self, index, epoch):
        if index in self._faults:
            raise self._faults[index]
        return self._source.read(index, epoch)


def test_training_from_a_cache_is_training_online(config, tmp_path):
    result = encode.run(config, str(tmp_path / "cache"))
    assert (result.clips, result.encoded, result.passes, result.bad) == (64, 64, 1, {})
    assert result.shards > 4 and result.path in encode.summary(result)
    tokenizer, source, packing = setup(config)
    cache = cached(config, tmp_path / "cache")
    assert cache.fingerprint == source.fingerprint and cache.name(3) == source.name(3)
    cut = 0
    for step in range(4):
        placed = [p for row in packing.step(step) for p in row]
        cut += sum(source.sizes.frames[p.clip] > p.frames for p in placed)
        # Pass 0 is what the cache holds: moving shapes would be others in each.
        rows = [tuple(p._replace(epoch=0) for p in row) for row in packing.step(step)]
        online = feed._stack([feed.build_row(source, row, tokenizer, config)[0] for row in rows])
        read = feed.host_rows(cache, packing, tokenizer, config, step)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), read, online)
    assert cut
    again = pickle.loads(pickle.dumps(cache))
    np.testing.assert_array_equal(again.read(5, 0).moments, cache.read(5, 0).moments)
    clip = source.read(5, 0)
    assert (again.read(5, 0).caption, again.read(5, 0).fps) == (clip.caption, clip.fps)


def test_passes_are_drawn_anew_and_may_be_added(config, tmp_path):
    encode.run(config, str(tmp_path / "cache"))
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("cache/*.array_record")}
    result = encode.run(config, str(tmp_path / "cache"), passes=2)
    assert (result.clips, result.encoded, result.passes) == (128, 64, 2)
    assert before.items() <= {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("cache/*.array_record")}.items()
    assert encode.run(config, str(tmp_path / "cache")).passes == 2  # the same, and what was added stays
    tokenizer, source, packing = setup(config)
    cache = cached(config, tmp_path / "cache")
    for epoch in (0, 1):
        video = source.read(7, epoch).video
        video = feed.cut(video, 0, *Layout(source.sizes, tokenizer.geometry).fitted[7])
        np.testing.assert_allclose(cache.read(7, epoch).moments, tokenizer.encode_clip(video), atol=1e-5)
    assert np.abs(cache.read(7, 0).moments - cache.read(7, 1).moments).max() > 0.01
    np.testing.assert_array_equal(cache.read(7, 3).moments, cache.read(7, 1).moments)
    config.train.steps = packing.steps_per_epoch
    said = "\n".join(latents.notes(cache, packing, tokenizer, config))
    assert "2 pass(es)" in said and f"training draws {packing.passes} passes" in said


def test_bad_clips_are_listed_and_are_padding_as_they_are_online(config, tmp_path, monkeypatch):
    tokenizer, source, packing = setup(config)
    first, second = packing.step(0)[0][0].clip, packing.step(0)[1][0].clip
    faulty = Faulty(source, {first: BadClip("checksum differs"), second: BadClip("cannot be decoded")})
    monkeypatch.setattr(encode, "open_source", lambda *_: faulty)
    result = encode.run(config, str(tmp_path / "cache"))
    assert result.bad == {"checksum differs": 1, "cannot be decoded": 1} and result.clips == 62
    listed = json.loads((tmp_path / "cache" / "cache.json").read_text())["bad"]
    assert {(b["clip"], b["name"], b["reason"]) for b in listed} == {
        (first, source.name(first), "checksum differs"),
        (second, source.name(second), "cannot be decoded"),
    }
    cache = cached(config, tmp_path / "cache")
    row = packing.step(0)[0]
    got, told = feed.build_row(cache, row, tokenizer, config)
    want, told_online = feed.build_row(faulty, [p._replace(epoch=0) for p in row], tokenizer, config)
    assert told == told_online != []
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)
    # A surprise is no bad clip: it ends the job, and what is finished stays.
    monkeypatch.setattr(encode, "open_source", lambda *_: Faulty(source, {first: OSError("the disk is gone")}))
    with pytest.raises(ConfigError, match="OSError: the disk is gone"):
        encode.run(config, str(tmp_path / "other"))


def contents(directory):
    return {p.name: p.read_bytes() for p in sorted(Path(directory).iterdir()) if p.name != "lock"}


def test_a_rerun_completes_what_was_left_and_leaves_the_finished_alone(config, tmp_path, capsys):
    encode.run(config, str(tmp_path / "whole"))
    out = tmp_path / "cache"
    encode.run(config, str(out))
    # As a kill leaves it: no cache.json, some shards, one begun.
    (out / "cache.json").unlink()
    for number in (1, 3):
        latents.shard_path(out, number).unlink()
    (out / "latents-000003.array_record.part").write_bytes(b"half")
    with pytest.raises(ConfigError, match=r"not finished, \d of \d+ shards are there; the same vidgen encode"):
        cached(config, out)
    result = encode.run(config, str(out))
    assert 0 < result.encoded < 64 and "going on" in capsys.readouterr().err
    assert contents(out) == contents(tmp_path / "whole")
    stamps = {p: p.stat().st_mtime_ns for p in out.iterdir() if p.name != "lock"}
    assert encode.run(config, str(out)).encoded == 0 and "nothing to do" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in out.iterdir() if p.name != "lock"} == stamps

    with latents.shard_path(out, 2).open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ConfigError, match="latents-000002.array_record: 100, expected"):
        cached(config, out)
    latents.shard_path(out, 4).unlink()
    latents.shard_path(out, 3, "jsonl").unlink()
    assert encode.run(config, str(out)).encoded > 0
    assert contents(out) == contents(tmp_path / "whole")


def test_after_sigkill_the_same_command_goes_on(config, tmp_path):
    config.data.moving_shapes.clips = 4000
    config.train.steps = 1
    (tmp_path / "config.json").write_text(configs.to_json(config))
    script = (
        "import jax, sys; from vidgen import config, encode; from vidgen.data import latents;"
        "latents.SHARD_BYTES = (20_000, 20_000);"
        "encode.run(config.from_json(open(sys.argv[1]).read()), sys.argv[2])"
    )
    out = tmp_path / "cache"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    job = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "config.json"), str(out)], env=environment)
    end = time.time() + 120
    while not latents.shard_path(out, 2).exists() and job.poll() is None and time.time() < end:
        time.sleep(0.02)
    job.send_signal(signal.SIGKILL)
    job.wait()
    there = {p.name: p.stat().st_mtime_ns for p in out.glob("*.array_record")}
    assert len(there) >= 3 and not (out / "cache.json").exists()
    # Only what is missing is encoded; the finishing of all 4000 is beside the point.
    missing = [n for n in range(400) if not latents.shard_path(out, n).exists()]
    tokenizer, source, _ = setup(config)
    layout = Layout(source.sizes, tokenizer.geometry)
    small = [n for n in missing if n < layout.shards][2:]
    for n in small:  # stands for the work of the rest
        latents.shard_path(out, n).write_bytes(latents.shard_path(out, 0).read_bytes())
        latents.shard_path(out, n, "jsonl").write_bytes(latents.shard_path(out, 0, "jsonl").read_bytes())
    result = encode.run(config, str(out))
    assert result.encoded == sum(len(layout.shard(n)[1]) for n in missing[:2])
    assert there.items() <= {p.name: p.stat().st_mtime_ns for p in out.glob("*.array_record")}.items()


def test_a_cache_of_something_else_is_refused_by_name(config, tmp_path):
    out = tmp_path / "cache"
    encode.run(config, str(out))

    def refused(says, **changes):
        other = configs.override(config, {key.replace("__", "."): value for key, value in changes.items()})
        with pytest.raises(ConfigError, match=rf"--output .*something else \({says}"):
            encode.run(other, str(out))
        with pytest.raises(ConfigError, match=rf"config.data.latents=.*something else \({says}"):
            cached(other, out)

    refused("config.tokenizer.patch: 1x2x2 there, 1x1x1 here", tokenizer__patch=(1, 1, 1))
    refused("clips of config.data.source: ", data__moving_shapes__fps=9.0)
    other = make_weights(tmp_path / "weights", seed=2)
    digests = [weights.load(path).digest for path in (config.tokenizer.weights, other)]
    refused(f"weights of the VAE: {digests[0]} there, {digests[1]} here\\)", tokenizer__weights=other)
    assert cached(config, out).passes == 1  # untouched by all that


def test_bad_input(config, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="--passes=0"):
        encode.run(config, str(tmp_path / "cache"), passes=0)
    with pytest.raises(ConfigError, match="no cache there; make it with vidgen encode"):
        cached(config, tmp_path / "nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="holds something else"):
        encode.run(config, str(tmp_path / "full"))
    assert os.listdir(tmp_path / "full") == ["letter.txt"]
    exact = configs.override(config, {"tokenizer.name": "patch", "tokenizer.weights": "", "data.latents": "x"})
    with pytest.raises(ConfigError, match="tokenizer.name=patch: its latents are made in the step"):
        encode.run(exact, str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match="config.data.latents=x: config.tokenizer.name=patch"):
        latents.open_clips(exact, base.from_config(exact.tokenizer))
    with monkeypatch.context() as m:
        m.setattr(encode.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2**10}))
        with pytest.raises(ConfigError, match=r"64 clips to encode, .* but 9.54e-07 GiB of disk are free"):
            encode.run(config, str(tmp_path / "small"))
    encode.run(config, str(tmp_path / "cache"))
    (tmp_path / "cache" / "cache.json").write_text("{")
    for call in (lambda: cached(config, tmp_path / "cache"), lambda: encode.run(config, str(tmp_path / "cache"))):
        with pytest.raises(ConfigError, match="cache.json: not what vidgen encode writes"):
            call()


def test_records_can_hold_more_than_is_read():
    from safetensors.numpy import load, save

    clip = EncodedClip(np.random.default_rng(0).normal(size=(2, 3, 4, 8)).astype(np.float32), "一个球 ⚽", 12.5)
    record = latents.to_record(clip)
    later = save({**load(record), "text_embedding": np.zeros((3, 5), np.float16)})
    for bytes_ in (record, later):
        back = latents.from_record(bytes_)
        np.testing.assert_array_equal(back.moments, clip.moments)
        assert (back.caption, back.fps) == (clip.caption, clip.fps)
    with pytest.raises(BadClip, match="the reason"):
        latents.from_record(latents.to_record(BadClip("the reason")))
    for broken in (b"", record[:40], b"\xff" * 100):
        with pytest.raises(BadClip, match="unreadable record in the cache"):
            latents.from_record(broken)


def test_the_layout_places_each_usable_clip_once(monkeypatch):
    monkeypatch.setattr(latents, "SHARD_BYTES", (3000, 3000))
    draw = np.random.default_rng(0)
    n = 500
    sizes = ClipSizes(
        *(draw.choice(options, n) for options in ([0, 1, 5, 8, 17], [7, 8, 24], [16, 37])),
        np.full(n, 8.0),
        np.zeros(n, int),
    )
    layout = Layout(sizes, Geometry((2, 4, 4), (1, 2, 2), 4))
    usable = (sizes.frames > 0) & (sizes.height >= 8)
    assert sorted(layout.order) == np.flatnonzero(usable).tolist()
    np.testing.assert_array_equal(layout.order[layout.place[usable]], np.flatnonzero(usable))
    assert (layout.place[~usable] == -1).all() and layout.starts[0] == 0
    shards = [layout.shard(k) for k in range(2 * layout.shards)]
    assert [e for e, _ in shards] == [0] * layout.shards + [1] * layout.shards
    assert np.concatenate([c for _, c in shards]).tolist() == [*layout.order, *layout.order]
    assert min(len(c) for _, c in shards) > 0
    fitted = layout.fitted[layout.order]
    assert (np.diff(fitted @ [1, 10**3, 10**6]) >= 0).all()  # neighbours are of one size


def test_clips_of_one_size_are_encoded_together(config, monkeypatch):
    tokenizer, source, _ = setup(config)
    fitted = np.array([[5, 16, 16]] * 21 + [[1, 16, 16]] * 3)
    monkeypatch.setattr(encode, "CHUNK_PIXELS", 2 * 5 * 16 * 16)  # two clips on each of four devices
    batches = list(encode._batches(list(range(24)), fitted, tokenizer))
    assert [len(b) for b in batches] == [8, 8, 2, 2, 1, 2, 1]
    assert sum(batches, []) == list(range(24))
    monkeypatch.setattr(encode, "CLIP_PIXELS", 1)
    assert [len(b) for b in encode._batches(list(range(21)), fitted, tokenizer)] == [4] * 5 + [1]


@pytest.fixture
def captioned(config, tmp_path):
    """With a frozen text encoder."""
    pytest.importorskip("tokenizers")
    config.text.update(name="umt5", weights=text_weights.make_encoder(tmp_path / "pipeline"))
    config.rows.caption = 24
    return config


@pytest.mark.parametrize("pad", [0, 32])
def test_values_of_captions_from_a_cache_are_those_made_online(captioned, tmp_path, pad):
    config = captioned
    config.text.pad = pad
    result = encode.run(config, str(tmp_path / "cache"))
    assert result.clips == 64 and result.captions_cut > 0
    assert f"cut to config.rows.caption: {result.captions_cut}" in encode.summary(result)
    tokenizer, source, _ = setup(config)
    text = frozen.from_config(config)
    cache = latents.CachedClips(str(tmp_path / "cache"), source, tokenizer, text)
    packing = feed.plan(cache, tokenizer, config, text)
    rows = [tuple(p._replace(epoch=0) for p in row) for row in packing.step(1)]
    online = feed._stack([feed.build_row(source, row, tokenizer, config, text)[0] for row in rows])
    unused = frozen.from_config(config)  # whose weights are only hashed: nothing is encoded again
    config.data.latents = str(tmp_path / "cache")
    read = feed.host_rows(latents.open_clips(config, tokenizer, unused), packing, tokenizer, config, 1, text=unused)
    assert not unused.shapes and online.context["text"][0].any() and online.context["empty"][0].any()
    for name in ("text", "empty"):
        jax.tree.map(np.testing.assert_array_equal, read.context[name], online.context[name])
    assert f"captions of at most {text.limit} tokens" in latents.notes(source, packing, tokenizer, config, text)[0]
    # Its own rerun finds nothing to do; a text file that is lost comes back.
    (tmp_path / "cache" / "text.safetensors").unlink()
    with pytest.raises(ConfigError, match="text.safetensors: no such file"):
        latents.open_clips(config, tokenizer, unused)
    assert encode.run(config, str(tmp_path / "cache")).encoded == 0
    latents.open_clips(config, tokenizer, unused)


def test_a_cache_of_other_values_is_refused_by_name(captioned, tmp_path):
    config = captioned
    encode.run(config, str(tmp_path / "cache"))
    config.data.latents = str(tmp_path / "cache")

    def refused(says, **changes):
        other = configs.override(config, {key.replace("__", "."): value for key, value in changes.items()})
        text = frozen.from_config(other)
        with pytest.raises(ConfigError, match=rf"--output .*something else \({says}"):
            encode.run(other, str(tmp_path / "cache"))
        with pytest.raises(ConfigError, match=rf"config.data.latents=.*something else \({says}"):
            latents.open_clips(other, base.from_config(other.tokenizer), text)

    refused("config.rows.caption: 24 there, 20 here\\)", rows__caption=20)
    again = text_weights.make_encoder(tmp_path / "other", seed=1)
    digests = [frozen.from_config(config).digest, weights.digest_of(again)]
    refused(f"text encoder and tokenizer: {digests[0]} there, {digests[1]}-[0-9a-f]+ here\\)", text__weights=again)
    refused("text encoder and tokenizer: .* there, not known here", text__name="bytes", text__weights="")
