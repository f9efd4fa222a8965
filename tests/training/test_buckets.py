"""Checkpoints in a bucket: as on a disk, they are whole or not there, and a damaged one is never used. A server on this
machine stands in for Google Cloud Storage (`bucket.py`); the clients are the real ones."""

import os

import pytest

os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # read as gcsfs is imported: it would ask Google for a key
pytest.importorskip("gcsfs", reason="checkpoints in buckets need the extra [gcs]")

import jax  # noqa: E402
import numpy as np  # noqa: E402
from bucket import Blob, serve  # noqa: E402
from test_checkpoint import keep, like, make_state  # noqa: E402

from vidgen.config import ConfigError  # noqa: E402
from vidgen.training.checkpoint import Checkpoints  # noqa: E402
from vidgen.training.checksums import COMMIT, SEAL  # noqa: E402

BUCKET = "runs"


@pytest.fixture(scope="module")
def server():
    with serve() as buckets, pytest.MonkeyPatch.context() as patch:
        for name, value in buckets.environment.items():
            patch.setenv(name, value)
        yield buckets


@pytest.fixture
def buckets(server):
    """Empty ones."""
    server.objects.clear()
    server.refusing = False
    return server


@pytest.fixture
def opened(buckets, tmp_path):
    """Opens the checkpoints in a bucket of a workdir, and closes them in the end."""
    found = []

    def make(**options):
        read_only = options.pop("read_only", False)
        location = f"gs://{BUCKET}/here"
        found.append(Checkpoints(str(tmp_path), keep(checkpoints=location, **options), read_only=read_only))
        return found[-1]

    yield make
    for one in found:
        one.close()


def save(checkpoints, *steps):
    for step in steps:
        checkpoints.save(make_state(step, seed=step), {"tokens_seen": step})
        checkpoints.wait()


def names(buckets, inside=""):
    return sorted(name for _, name in buckets.objects if name.startswith(f"here/{inside}"))


def folders(buckets):
    return sorted({name.split("/")[1] for name in names(buckets)})


def flip(buckets, name):
    blob = buckets.objects[BUCKET, name]
    data = bytearray(blob.data)
    data[len(data) // 2] ^= 1
    buckets.objects[BUCKET, name] = Blob(bytes(data), blob.generation)


def test_what_was_saved_is_restored_bit_for_bit_and_what_is_old_goes(buckets, opened):
    checkpoints = opened(keep=2)
    save(checkpoints, 2, 4, 6)
    assert checkpoints.steps == [4, 6] and folders(buckets) == ["4", "6"]
    for last in (COMMIT, SEAL):
        assert f"here/6/{last}" in names(buckets)

    again = opened(read_only=True)
    assert again.newest_good() == 6 and again.facts(6)["tokens_seen"] == 6
    wanted = make_state(6, seed=6)
    found = again.restore(6, like(wanted))
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(wanted)))


def test_damaged_ones_are_told_of_moved_aside_and_saved_again(buckets, opened):
    save(opened(), 2, 4)
    saved = {name: buckets.objects[BUCKET, name].data for name in names(buckets, "4/")}
    reader = opened(read_only=True)
    for name in (f"here/4/{SEAL}", "here/4/facts/metadata"):
        before = buckets.objects[BUCKET, name]
        flip(buckets, name)
        assert reader.damage(4), name
        buckets.objects[BUCKET, name] = before
    assert not reader.damage(4)

    damaged = next(name for name in names(buckets, "4/state/") if "/d/" in name)
    flip(buckets, damaged)
    said, checkpoints = [], opened()
    assert checkpoints.newest_good(said.append) == 2
    assert len(said) == 1 and f"gs://{BUCKET}/here/4/" in said[0] and said[0].endswith("moved to 4.damaged-1")
    assert folders(buckets) == ["2", "4.damaged-1"] and checkpoints.steps == [2]
    moved = {name.replace("4.damaged-1", "4"): buckets.objects[BUCKET, name].data for name in names(buckets, "4.")}
    assert moved.keys() == saved.keys() and [name for name in saved if moved[name] != saved[name]] == [damaged]

    save(checkpoints, 4)
    assert checkpoints.newest_good() == 4 and folders(buckets) == ["2", "4", "4.damaged-1"]


def test_one_that_was_not_finished_counts_for_nothing(buckets, opened):
    save(opened(), 2, 4)
    del buckets.objects[BUCKET, f"here/4/{COMMIT}"]  # as a kill leaves it
    checkpoints = opened()
    assert checkpoints.steps == [2] and checkpoints.newest_good() == 2
    save(checkpoints, 4)
    assert checkpoints.newest_good() == 4


def test_a_bucket_that_refuses_ends_the_run_with_the_reason_and_loses_nothing(buckets, opened):
    checkpoints = opened()
    save(checkpoints, 2)
    before = dict(buckets.objects)
    buckets.refusing = True
    with pytest.raises(ConfigError, match=rf"gs://{BUCKET}/here: the checkpoint could not be written: .*"):
        save(checkpoints, 4)
    buckets.refusing = False
    assert {key: blob for key, blob in buckets.objects.items() if key in before} == before
    assert opened(read_only=True).newest_good() == 2
