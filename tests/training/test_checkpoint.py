"""Checkpoints: what is damaged is never used, what is kept stays, and what can't be saved is said."""

import contextlib
import errno
import json
import os
import random
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from vidgen import config as configs
from vidgen import passing
from vidgen.config import ConfigError
from vidgen.training import checkpoint, checksums, locations, provenance
from vidgen.training import state as states
from vidgen.training.checkpoint import Checkpoints


def make_state(step=0, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {"in": {"kernel": jax.random.normal(keys[0], (64, 33))}, "out": jax.random.normal(keys[1], (33,))}
    return states.create(params, optax.adamw(1e-3)).replace(step=jnp.asarray(step, jnp.int32))


def keep(**changes):
    return ConfigDict({"keep": 2, "keep_every": 0, "best": "", "checkpoints": ""} | changes)


def like(state):
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), state)


@pytest.fixture
def opened():
    """Opens checkpoints, and closes them in the end."""
    found = []

    def make(*args, **kwargs):
        found.append(Checkpoints(*map(str, args[:1]), *args[1:], **kwargs))
        return found[-1]

    yield make
    for one in found:
        one.close()


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A workdir with the steps 2, 4 and 6, which tests copy."""
    workdir = tmp_path_factory.mktemp("three")
    checkpoints = Checkpoints(str(workdir), keep(keep=3))
    for step in (2, 4, 6):
        checkpoints.save(make_state(step, seed=step), {"tokens_seen": step})
    checkpoints.close()
    return workdir


@pytest.fixture
def copied(three, tmp_path):
    shutil.copytree(three / "checkpoints", tmp_path / "checkpoints")
    return tmp_path


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path, rng):
    """One bit of a file, somewhere."""
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def test_what_was_saved_is_restored_bit_for_bit(three, opened):
    checkpoints = opened(three, read_only=True)
    wanted = make_state(6, seed=6)
    found = checkpoints.restore(6, like(wanted))
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(wanted)))
    ema = checkpoints.restore_ema(4, like(wanted.ema))
    assert np.array_equal(ema["out"], make_state(4, seed=4).ema["out"])
    facts = checkpoints.facts(6)
    assert facts["tokens_seen"] == 6 and facts[provenance.KEY] == json.loads(json.dumps(provenance.here()))


def test_fifty_flipped_bits_are_all_found(copied, opened):
    rng = random.Random(0)
    checkpoints = opened(copied, read_only=True)
    step = copied / "checkpoints" / "6"
    every = files(step)
    chosen = every + rng.choices(every, k=max(0, 50 - len(every)))  # each file at least once
    for path in chosen:
        before = path.read_bytes()
        flip(path, rng)
        assert checkpoints.damage(6), f"a bit of {path.relative_to(step)}"
        path.write_bytes(before)
    assert checkpoints.damage(6) == "" and len(chosen) >= 50


def test_a_missing_a_cut_and_an_extra_file_are_found(copied, opened):
    checkpoints = opened(copied, read_only=True)
    step = copied / "checkpoints"
    gone, cut, extra = (files(step / name / "state" / "ocdbt.process_0" / "d")[0] for name in ("2", "4", "6"))
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:-1])
    (extra.parent / "more").write_bytes(b"")
    assert checkpoints.damage(2) == f"{gone.relative_to(step / '2')} is missing"
    assert checkpoints.damage(4) == f"{cut.relative_to(step / '4')} is not as it was saved"
    assert checkpoints.damage(6) == "state/ocdbt.process_0/d/more was not there when it was saved"
    assert checkpoints.damage(6, ("ema", "facts")) == ""


def test_a_server_of_files_that_is_away_damages_nothing(copied, opened, monkeypatch):
    monkeypatch.setattr(passing, "PAUSE", 0.0)
    digest = checksums._digest
    checkpoints = opened(copied, keep())

    def fails(code, times):
        left = [times]

        def away(path):
            left[0] -= 1
            if left[0] < 0:
                return digest(path)
            raise OSError(code, os.strerror(code), str(path))

        return away

    for code in (errno.ESTALE, errno.EMFILE, errno.ENOTCONN, errno.EACCES):
        with monkeypatch.context() as patch:
            patch.setattr(checksums, "_digest", fails(code, 10**6))
            with pytest.raises(OSError, match=os.strerror(code)):
                checkpoints.newest_good()
    with monkeypatch.context() as patch:
        patch.setattr(checksums, "_digest", fails(errno.EIO, 2))
        assert checkpoints.newest_good() == 6  # read again, it could be
        patch.setattr(checksums, "_digest", fails(errno.EIO, 10**6))
        assert checkpoints.damage(6).endswith(f"cannot be read ({os.strerror(errno.EIO)})")  # a bad sector
    assert sorted(os.listdir(copied / "checkpoints")) == ["2", "4", "6"] and checkpoints.newest_good() == 6


def test_a_folder_that_looks_like_a_file_for_a_moment_is_no_damage_and_one_in_a_files_place_is(copied, opened):
    checkpoints, looks = opened(copied, keep()), type(checksums.epath.Path(copied)).is_dir
    with pytest.MonkeyPatch.context() as patch:  # epath takes a folder that can't be looked at for a file
        patch.setattr(type(checkpoints._directory), "is_dir", lambda path: path.name != "ema" and looks(path))
        with pytest.raises(OSError, match="Stale"):
            checkpoints.damage(6)
    hurt = files(copied / "checkpoints" / "6" / "ema")[0]
    hurt.unlink()
    hurt.mkdir()
    assert checkpoints.damage(6).endswith("cannot be read (Is a directory)")


def test_a_run_goes_on_from_the_newest_good_one_and_leaves_the_damaged_one(copied, opened):
    folder = copied / "checkpoints"
    (folder / "6" / checkpoint.checksums.SEAL).unlink()  # as if it had not been finished
    hurt = files(folder / "4" / "ema")[0]
    flip(hurt, random.Random(1))
    kept = {path.relative_to(folder / "4"): path.read_bytes() for path in files(folder / "4")}
    said = []
    checkpoints = opened(copied, keep(keep=1))
    assert checkpoints.newest_good(said.append) == 2
    assert len(said) == 2 and "step 6" in said[0] and "vidgen.sha256 is missing" in said[0]
    assert str(hurt.relative_to(folder)) in said[1] and said[1].endswith("moved to 4.damaged-1")
    assert checkpoints.steps == [2]
    for step in (4, 6):  # the steps are taken, and saved, again
        checkpoints.save(make_state(step), {})
    checkpoints.wait()
    assert checkpoints.steps == [6] and checkpoints.newest_good(said.append) == 6 and len(said) == 2
    aside = folder / "4.damaged-1"
    assert {path.relative_to(aside): path.read_bytes() for path in files(aside)} == kept


def test_a_reader_skips_a_damaged_one_and_moves_nothing(copied, opened):
    flip(files(copied / "checkpoints" / "6" / "facts")[0], random.Random(2))
    said = []
    assert opened(copied, read_only=True).newest_good(said.append, ("ema", "facts")) == 4
    assert len(said) == 1 and "moved" not in said[0]
    assert sorted(os.listdir(copied / "checkpoints")) == ["2", "4", "6"]


def test_figures_that_can_not_be_read_do_not_stop_the_others(copied, opened):
    for path in files(copied / "checkpoints" / "4" / "metrics"):
        path.write_bytes(b"{")
    checkpoints = opened(copied, keep(keep=3))
    said = []
    assert checkpoints.newest_good(said.append) == 6 and checkpoints.steps == [2, 6]
    assert len(said) == 1 and "4/metrics/" in said[0] and said[0].endswith("moved to 4.damaged-1")


def test_where_none_is_good_it_says_so_and_never_starts_from_nothing(copied, opened):
    for step in ("2", "4", "6"):
        flip(files(copied / "checkpoints" / step / "state")[0], random.Random(3))
    for _ in range(2):  # moved aside, they are still no reason to start from nothing
        with pytest.raises(ConfigError, match="none of the checkpoints is good"):
            opened(copied, keep()).newest_good(lambda line: None)
    assert opened(copied / "new", keep()).newest_good() is None


def test_what_is_kept(tmp_path, opened):
    checkpoints = opened(tmp_path, keep(keep=2, keep_every=4, best="heldout_loss"))
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5, 6: 1.5, 7: float("nan")}
    for step in range(1, 10):
        metrics = {"heldout_loss": losses[step]} if step in losses else None
        checkpoints.save(make_state(step), {}, temporary=step in (5, 9), metrics=metrics)
        checkpoints.wait()
        assert step in checkpoints.steps and (5 in checkpoints.steps) == (step == 5)
    assert checkpoints.steps == [2, 4, 7, 8, 9]  # best, for good, newest two, newest
    checkpoints.close()
    again = opened(tmp_path, keep(keep=1, best="heldout_loss"))  # which of them are what is read from them
    again.save(make_state(10), {})
    again.wait()
    assert again.steps == [2, 10]


def test_a_save_that_was_cut_off_leaves_no_trace(copied, opened):
    folder = copied / "checkpoints"
    shutil.copytree(folder / "6", folder / "8.orbax-checkpoint-tmp")
    checkpoints = opened(copied, keep())
    assert checkpoints.newest_good() == 6
    checkpoints.save(make_state(8), {})
    checkpoints.wait()
    assert sorted(os.listdir(folder)) == ["6", "8"] and checkpoints.damage(8) == ""


def test_a_disk_that_is_full_ends_the_run_with_the_reason_and_loses_nothing(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting takes an administrator")
    try:
        checkpoints = Checkpoints(str(disk), keep())
        checkpoints.save(make_state(1), {})
        checkpoints.wait()
        with contextlib.suppress(OSError), open(disk / "filler", "wb") as f:
            while True:
                f.write(bytes(4096))
                f.flush()
        with pytest.raises(ConfigError, match="could not be written: No space left on device"):
            checkpoints.save(make_state(2), {})
            while True:
                checkpoints.check()
        checkpoints.close()  # which has nothing to add
        (disk / "filler").unlink()
        again = Checkpoints(str(disk), keep())
        assert again.newest_good() == 1
        again.close()
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, opened, monkeypatch):
    """What the system only remembers is gone after a power cut, and with it what the name stands for."""
    settled = []

    def fsync(descriptor):
        settled.append((os.readlink(f"/proc/self/fd/{descriptor}"), (tmp_path / "checkpoints/1").exists()))

    monkeypatch.setattr(checksums.os, "fsync", fsync)
    checkpoints = opened(tmp_path, keep())
    checkpoints.save(make_state(1), {})
    checkpoints.wait()
    committed = tmp_path / "checkpoints/1"
    there = {str(path.relative_to(committed)) for path in committed.rglob("*")} | {"."}
    before = [os.path.relpath(path, f"{committed}.orbax-checkpoint-tmp") for path, named in settled if not named]
    assert there == set(before) and "vidgen.sha256" in there and "_CHECKPOINT_METADATA" in there
    assert settled[-1] == (str(tmp_path / "checkpoints"), True)


def test_a_folder_that_vanished_is_said_by_check(tmp_path):
    checkpoints = Checkpoints(str(tmp_path), keep())
    checkpoints.save(make_state(1), {})
    checkpoints.wait()
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(ConfigError, match="could not be written"):
        checkpoints.save(make_state(2), {})
        checkpoints.wait()


def test_they_lie_where_the_config_says(tmp_path, opened):
    place, workdir = tmp_path / "elsewhere", tmp_path / "run"
    c = configs.override(configs.base(), {"train.checkpoints": f"file://{place}"})
    checkpoint.write_config(str(workdir), c)
    checkpoints = opened(workdir, c.train)
    checkpoints.save(make_state(3), {})
    checkpoints.wait()
    assert (place / "3").is_dir() and not (workdir / "checkpoints").exists() and locations.is_run(str(workdir))
    assert opened(workdir, read_only=True).newest_good() == 3  # a reader finds them by config.json
    with pytest.raises(ConfigError, match="config.train.checkpoints=s3://bucket/run: .*gs://"):
        Checkpoints(str(workdir), keep(checkpoints="s3://bucket/run"))


def test_what_wrote_a_checkpoint_is_compared():
    then = {provenance.KEY: provenance.here() | {"jax": "0.1", "code": "0" * 16}}
    told = provenance.compare(then, "here")
    assert "jax 0.1, now" in told and "code 000000000000, now" in told and "orbax" not in told
    assert provenance.compare({provenance.KEY: provenance.here()}, "here") == "" == provenance.compare({}, "here")
    newer = {provenance.KEY: {"format": provenance.FORMAT + 1, "vidgen": "9"}}
    with pytest.raises(ConfigError, match="here: a checkpoint of format 2, which vidgen 9 wrote"):
        provenance.compare(newer, "here")


def test_a_config_is_compared_with_the_one_that_a_checkpoint_was_saved_with():
    c = configs.base()
    facts = {"config": configs.to_json(c)}
    checkpoint.check_saved_config(facts, configs.override(c, {"train.steps": 7}), "there")
    checkpoint.check_saved_config({}, c, "there")
    with pytest.raises(ConfigError, match="there: .* another config, which differs in seed"):
        checkpoint.check_saved_config(facts, configs.override(c, {"seed": 7}), "there")
