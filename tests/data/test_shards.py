import json
import pickle
import threading

import numpy as np
import pytest
import tensorflow_datasets as tfds

from vidgen import passing
from vidgen.config import ConfigError, base
from vidgen.data import sources, tfds_source
from vidgen.data.clip import BadClip
from vidgen.data.decode import encode, encode_png
from vidgen.data.shards import Row, ShardSource, ShardWriter, checksum, read_index
from vidgen.data.tfds_source import TfdsSource


def video(seed, frames=3, height=16, width=20):
    smooth = np.random.default_rng(seed).integers(0, 256, (frames, 2, 2, 3), np.uint8)
    return smooth.repeat(height // 2, 1).repeat(width // 2, 2)


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """Six clips of three files in three shards."""
    monkeypatch.setattr("vidgen.data.shards.SHARD_BYTES", 1)
    directory = tmp_path / "shards"
    directory.mkdir()
    writer = ShardWriter(directory)
    for i in range(6):
        data = encode(video(i, frames=i + 1), 8, full_chroma=True)
        row = Row(f"clip{i}", i + 1, 16, 20, 8.0, f"一只猫 {i}", checksum(data), f"file{i // 2}.mp4", i % 2 * 1.5)
        writer.add(row, data)
    writer.finish()
    return directory


def test_source_reads_what_was_written(shards):
    source = ShardSource(shards)
    assert len(source) == 6 and source.sizes.frames.tolist() == [1, 2, 3, 4, 5, 6]
    assert source.sizes.text.tolist() == [len("一只猫 0".encode())] * 6
    for i in (5, 0, 3):
        clip = source.read(i, epoch=2)
        assert clip.video.shape == (i + 1, 16, 20, 3) and clip.caption == f"一只猫 {i}" and clip.fps == 8
        assert np.abs(clip.video.astype(int) - video(i, i + 1)).mean() < 3
    assert source.name(4) == "clip4" and source.group(4) == "file2.mp4"


def test_a_tfds_dataset_without_tensorflow(shards):
    record = tfds.builder_from_directory(str(shards)).as_data_source()["train"][2]
    assert record["caption"].decode() == "一只猫 2" and record["frames"] == 3 and record["fps"] == 8
    assert checksum(record["video"]) == read_index(shards)[2].checksum


def test_source_is_picklable_and_safe_to_read_from_threads(shards):
    source = pickle.loads(pickle.dumps(ShardSource(shards)))
    expected = [source.read(i, 0).video for i in range(6)]
    copy, wrong = pickle.loads(pickle.dumps(source)), []

    def read():
        wrong.extend(i for i in range(6) if not np.array_equal(copy.read(i, 0).video, expected[i]))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert copy.fingerprint == source.fingerprint == ShardSource(shards).fingerprint


def test_changed_pixels_are_noticed(shards):
    lines = (shards / "index.jsonl").read_text().split("\n")
    row = json.loads(lines[1])
    lines[1] = json.dumps(row | {"checksum": "0" * 64})
    lines[2] = lines[2].replace('"frames": 3', '"frames": 4')
    before = ShardSource(shards).fingerprint
    (shards / "index.jsonl").write_text("\n".join(lines))
    source = ShardSource(shards)
    assert source.fingerprint != before
    with pytest.raises(BadClip, match="^checksum differs$"):
        source.read(1, 0)
    with pytest.raises(BadClip, match="^size differs from the index$"):
        source.read(2, 0)
    source.read(0, 0)


def test_broken_directories(shards, tmp_path):
    with pytest.raises(ConfigError, match="no shards there.*vidgen ingest"):
        ShardSource(tmp_path)
    (shards / "index.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="not an index"):
        ShardSource(shards)
    (shards / "index.jsonl").write_text("")
    with pytest.raises(ConfigError, match="no clips"):
        ShardSource(shards)


def test_damaged_and_missing_shards(shards):
    next(shards.glob("*00002-of-00006")).write_bytes(b"no shard")
    source = ShardSource(shards)
    with pytest.raises(BadClip, match="^unreadable record$"):
        source.read(2, 0)
    assert source.read(3, 0).caption == "一只猫 3"
    next(shards.glob("*00004-of-00006")).unlink()
    with pytest.raises(ConfigError, match="00004-of-00006: missing; 1 of the shards"):
        ShardSource(shards)


def test_a_shard_out_of_sight_spoils_no_clip_and_is_opened_anew(shards, tmp_path):
    source, shard = ShardSource(shards), sorted(shards.glob("*-of-00006"))[3]
    hidden = shard.rename(tmp_path / "away")
    with pytest.raises(RuntimeError, match=f"No such file or directory; opening {shard}") as told:
        source.read(3, 0)
    assert passing.passes(told.value)
    hidden.rename(shard)
    assert source.read(3, 0).caption == "一只猫 3"  # ArrayRecord never opens a file again that it could not open
    data = bytearray(shard.read_bytes())
    data[200] ^= 1
    for cut in (len(data), 40000, 0):  # what ArrayRecord says of these is of the record
        shard.write_bytes(data[:cut])
        with pytest.raises(BadClip, match="^unreadable record$"):
            ShardSource(shards).read(3, 0)


def data_config(**changes):
    data = base().data
    data.update(changes)
    return data


def test_holdout_keeps_files_together(shards):
    sides = [sources.open_source(data_config(source=str(shards), holdout=0.5), s) for s in ("train", "heldout")]
    names = [[side.name(i) for i in range(len(side.sizes))] for side in sides]
    assert sorted(names[0] + names[1]) == [f"clip{i}" for i in range(6)] and all(names)
    files = [{int(n[4:]) // 2 for n in side} for side in names]
    assert not files[0] & files[1]
    for side, mine in zip(sides, names, strict=True):
        assert side.read(0, 0).caption[-1] == mine[0][4:]
        assert side.sizes.frames[0] == len(side.read(0, 0).video)
    assert sides[0].fingerprint != sides[1].fingerprint
    assert pickle.loads(pickle.dumps(sides[0])).name(0) == names[0][0]
    everything = sources.open_source(data_config(source=str(shards)), "heldout")
    assert len(everything.sizes) == 6


def test_open_source_refuses(shards):
    for changes, split, message in (
        ({"source": "moving_shape"}, "train", "did you mean moving_shapes"),
        ({"source": "/no/such"}, "train", "expected moving_shapes, a directory of shards, or tfds:NAME"),
        ({"source": str(shards)}, "valid", "expected train or heldout"),
        ({"source": str(shards), "holdout": 1.0}, "train", "holdout=1.0"),
        ({"source": str(shards), "holdout": 1e-6}, "train", "nothing held out of 3 files"),
    ):
        with pytest.raises(ConfigError, match=message):
            sources.open_source(data_config(**changes), split)


def write_tfds(root, name, features, records):
    """A prepared TFDS dataset, as `download_and_prepare(file_format="array_record")` leaves it."""
    from array_record.python.array_record_module import ArrayRecordWriter

    directory = root / name / "1.0.0"
    directory.mkdir(parents=True)
    features = tfds.features.FeaturesDict(features)
    writer = ArrayRecordWriter(str(directory / f"{name}-train.array_record-00000-of-00001"), "group_size:1")
    for record in records:
        writer.write(features.serialize_example(record))
    writer.close()
    features.save_config(str(directory))
    split = {"name": "train", "numBytes": "1", "shardLengths": [str(len(records))]}
    split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    info = {"name": name, "version": "1.0.0", "fileFormat": "array_record", "splits": [split]}
    (directory / "dataset_info.json").write_text(json.dumps(info))
    return directory


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "tfds"


BYTES = tfds.features.Scalar(np.object_)


def test_tfds_of_encoded_videos_with_bad_records(root, tmp_path, monkeypatch):
    good = encode(video(1, 5), 12, full_chroma=True)
    records = [(good, "a cat"), (b"junk" * 50, "a dog"), (good, " \n"), (encode_png(video(2)[0]), "قطة"), (b"", "x")]
    features = {"mp4": BYTES, "prompt": tfds.features.Text(), "source": BYTES}
    write_tfds(root, "pets", features, [{"mp4": v, "prompt": t, "source": "web"} for v, t in records])
    source = sources.open_source(data_config(source="tfds:pets"), "train")
    assert source.sizes.frames.tolist() == [5, 0, 0, 1, 0]
    assert source.sizes.height.tolist() == [16, 0, 0, 16, 0]
    assert source.reasons == {"not a video": 1, "missing caption": 1, "empty file": 1}
    clip = source.read(0, 0)
    assert clip.video.shape == (5, 16, 20, 3) and clip.fps == 12 and clip.caption == "a cat"
    assert source.read(3, 0).caption == "قطة" and source.sizes.text[3] == 6
    with pytest.raises(BadClip, match="not a video"):
        source.read(1, 0)
    assert source.name(3) == "tfds:pets/train#3"
    assert np.array_equal(pickle.loads(pickle.dumps(source)).read(0, 0).video, clip.video)

    # The second time, sizes come from the cache; a damaged cache is made again.
    monkeypatch.setattr(TfdsSource, "_scan", lambda *_: pytest.fail("scanned again"))
    again = TfdsSource("tfds:pets:1.0.0")
    assert again.sizes.frames.tolist() == [5, 0, 0, 1, 0] and again.reasons == source.reasons
    monkeypatch.undo()
    monkeypatch.setenv("TFDS_DATA_DIR", str(root))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (cache,) = (tmp_path / "cache" / "vidgen").iterdir()
    cache.write_bytes(cache.read_bytes()[:100])
    assert TfdsSource("tfds:pets").sizes.frames.tolist() == [5, 0, 0, 1, 0]
    assert len(cache.read_bytes()) > 100


@pytest.mark.parametrize("kind", ["array", "image", "grey", "encoded image", "images"])
def test_tfds_of_pixels(root, kind):
    clips = [video(i) for i in range(2)]
    feature, values = {
        "array": (tfds.features.Tensor(shape=(None, 16, 20, 3), dtype=np.uint8), clips),
        "image": (tfds.features.Tensor(shape=(16, 20, 3), dtype=np.uint8), [c[0] for c in clips]),
        "grey": (tfds.features.Tensor(shape=(16, 20, 1), dtype=np.uint8), [c[0, ..., :1] for c in clips]),
        "encoded image": (tfds.features.Image(), [encode_png(c[0]) for c in clips]),
        "images": (tfds.features.Sequence(tfds.features.Image()), [[encode_png(i) for i in c] for c in clips]),
    }[kind]
    features = {"pixels": feature, "label": tfds.features.ClassLabel(names=["cat", "big_dog"])}
    if "image" in kind:  # TFDS opens files that are given as bytes through a file object
        import io

        def wrap(value):
            return [io.BytesIO(v) for v in value] if isinstance(value, list) else io.BytesIO(value)

        values = [wrap(v) if not isinstance(v, np.ndarray) else v for v in values]
    write_tfds(root, "set", features, [{"pixels": v, "label": i} for i, v in enumerate(values)])
    source = TfdsSource("tfds:set", fps=5)
    clip = source.read(1, 0)
    expected = clips[1] if kind in ("array", "images") else clips[1][:1]
    expected = np.broadcast_to(expected[..., :1], expected.shape) if kind == "grey" else expected
    assert np.array_equal(clip.video, expected)
    assert clip.caption == "big dog" and clip.fps == 5
    assert (source.sizes.frames[1], source.sizes.fps[1], source.sizes.text[1]) == (len(expected), 5, 7)


def test_tfds_shards_of_ingest(shards, root):
    source = TfdsSource(f"tfds:{shards}")
    ours = ShardSource(shards)
    assert np.array_equal(source.sizes.frames, ours.sizes.frames)
    assert np.array_equal(source.read(5, 0).video, ours.read(5, 0).video)
    assert source.read(5, 0).caption == "一只猫 5"


def test_tfds_errors(root):
    features = {"a": BYTES, "b": BYTES, "n": np.int32, "words": tfds.features.Text()}
    write_tfds(root, "pets", features, [{"a": b"1", "b": b"2", "n": 1, "words": "w"}])
    for name, options, message in (
        ("tfds:pet", {}, "did you mean tfds:pets"),
        ("tfds:pets:2.0.0", {}, "no such config or version.*tfds:pets:1.0.0"),
        ("tfds:mnist", {}, "not prepared.*download_and_prepare"),
        ("tfds:../x y", {}, "expected tfds:NAME"),
        ("tfds:pets", {}, "which feature is the video.*a, b.*config.data.video_feature"),
        ("tfds:pets", {"video": "aa"}, "did you mean a"),
        ("tfds:pets", {"video": "n"}, "is no video"),
        ("tfds:pets", {"video": "a", "text": "n"}, "is no text"),
        ("tfds:pets", {"video": "a", "split": "test"}, "it has train"),
    ):
        with pytest.raises(ConfigError, match=message):
            TfdsSource(name, **options)
    assert TfdsSource("tfds:pets", video="a").reasons == {"not a video": 1}


def test_unwritable_cache_is_no_error(root, monkeypatch, capsys):
    good = encode(video(1), 12)
    write_tfds(root, "pets", {"video": BYTES, "text": tfds.features.Text()}, [{"video": good, "text": "x"}])
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert len(tfds_source.TfdsSource("tfds:pets")) == 1
    assert "sizes not kept" in capsys.readouterr().err
