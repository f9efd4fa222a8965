"""Which training clips drawn ones are nearest to, and clips of files as suites cut them."""

import dataclasses

import numpy as np
import pytest

from vidgen import config as configs
from vidgen import evaluate, perceptual
from vidgen.config import ConfigError
from vidgen.data.clip import BadClip, Clip, ClipSizes
from vidgen.data.sources import Subset
from vidgen.evaluation import clips, nearest
from vidgen.evaluation.suite import Asked, Subject


@dataclasses.dataclass(frozen=True)
class Clips:
    """A source of given clips; None where one can't be read."""

    videos: list

    @property
    def sizes(self):
        any_shape = next(v for v in self.videos if v is not None).shape
        shapes = np.array([any_shape if v is None else v.shape for v in self.videos])
        return ClipSizes(*shapes.T[:3], *(np.full(len(shapes), n) for n in (8.0, 9)))

    fingerprint = "given"

    def read(self, index, epoch):
        if self.videos[index] is None:
            raise BadClip("truncated")
        return Clip(self.videos[index], "a clip", 8.0)

    def name(self, index):
        return str(index)

    def captions(self):
        return None


def test_a_copy_is_found_among_many_and_its_ratio_is_near_0(monkeypatch):
    rng = np.random.default_rng(0)
    videos = list(rng.integers(0, 256, (30, 9, 40, 24, 3)).astype(np.uint8))
    videos[3] = None
    queries = np.stack([nearest.shrunk(v) for v in (videos[17], rng.integers(0, 256, videos[0].shape))])
    assert queries.shape == (2, 8 * 16 * 16 * 3)
    monkeypatch.setattr(nearest, "CHUNK", 7)
    found, unused = nearest.nearest(queries, Clips(videos), 9, 5)
    distances, index = found.distances, found.clips
    direct = np.array(
        [[np.inf if v is None else np.sqrt(np.mean((q - nearest.shrunk(v)) ** 2)) for v in videos] for q in queries]
    )
    np.testing.assert_array_equal(index, np.argsort(direct, axis=1)[:, :5])
    np.testing.assert_allclose(distances, np.sort(direct, axis=1)[:, :5], atol=1e-6)
    assert index[0, 0] == 17 and distances[0, 0] < 1e-6 < distances[1, 0] and unused == {"truncated": 1}
    with pytest.raises(ConfigError, match="no training clip could be read: {'truncated': 1}"):
        nearest.nearest(queries, Subset(Clips(videos), [3]), 9, 5)
    assert nearest.beyond(np.array([0.0, 0.5, 0.9]), np.linspace(0.4, 1, 101)) == pytest.approx(1 / 3)


def test_stretches_cover_a_clip_to_its_end():
    assert nearest.starts(9, 9).tolist() == [0]
    assert nearest.starts(12, 9).tolist() == [0, 2, 3]
    assert nearest.starts(5, 1).tolist() == [0, 1, 2, 3, 4]
    # 32 stretches at most, from the first to the last, and none left out before there are more.
    assert nearest.starts(9 + 31 * 2, 9).tolist() == list(range(0, 63, 2))
    many = nearest.starts(9 + 31 * 2 + 1, 9)
    assert len(many) == 32 and many[0] == 0 and many[-1] == 63


@pytest.fixture
def of_files(tiny, monkeypatch):
    """(config of a run on 12 training clips of 30 frames that move smoothly, and 2 held-out ones; the former)."""
    rng = np.random.default_rng(0)
    key, t = rng.integers(0, 256, (14, 7, 24, 20, 3)), np.arange(30) / 5
    low, part = t.astype(int), (t % 1)[:, None, None, None]
    videos = [(k[low] * (1 - part) + k[low + 1] * part).astype(np.uint8) for k in key]
    sides = {"train": Clips(videos[:12]), "heldout": Clips(videos[12:])}
    monkeypatch.setattr(clips, "open_source", lambda data, split: sides[split])
    changes = {"data.source": "somewhere", "data.holdout": 0.1, "sample.frames": 9}
    return configs.override(tiny, changes), sides["train"].videos


def looked_for(config, copies, count):
    """What the suite finds of a model that draws `copies`, among `count` training clips."""
    subject = Subject(config, None, None, lambda prompts, seeds: copies)
    return nearest.run(subject, Asked(prompts=2, clips=count, seed=0))


def test_a_copy_of_a_later_stretch_is_found_with_its_time(of_files):
    config, videos = of_files
    middle = [video[:, 4:20, 2:18] for video in videos]
    found = looked_for(config, [middle[5][14:23], middle[8][19:28]], 12)
    one, other = found.figures["per_prompt"]
    assert (one["nearest"], one["first_frame"]) == ("5", 14) and one["distance"] < 1e-6
    # Between two stretches that were looked at; still far nearer than the held-out clips are to anything.
    assert other["nearest"] == "8" and abs(other["first_frame"] - 19) == 1
    assert other["ratio"] < 0.5 and found.figures["heldout_ratio"] > 0.8 and found.figures["copied"] == 1
    np.testing.assert_array_equal(found.shown[1], middle[5][14:23])  # beside the drawn clip that is a copy
    assert found.figures["training_clips"] == found.figures["training_clips_of"] == 12
    assert found.decided_by["stretches"] == {"most": 32, "step": 2}
    assert [note for note in found.figures["notes"] if "training clips" in note] == []


def test_a_note_tells_that_a_copy_may_be_of_a_clip_that_was_not_looked_at(of_files, monkeypatch):
    config, videos = of_files
    copies = [videos[5][:9, 4:20, 2:18]] * 2
    found = looked_for(config, copies, 3)  # 0, 6 (or 5) and 11
    assert found.figures["training_clips"] == 3 and found.figures["training_clips_of"] == 12
    assert (
        "3 of 12 training clips were looked at: a copy of another is not found; --clips=12 looks at all"
        in (found.figures["notes"])
    )
    assert {row["nearest"] for row in found.figures["per_prompt"]} <= {"0", "6", "11"} and found.figures["ratio"] > 0.8
    videos[0] = videos[0][:8]
    monkeypatch.setattr(nearest, "STRETCHES", 3)
    with_less = looked_for(config, copies, 12).figures
    assert with_less["copied"] == 1 and with_less["ratio"] < 1e-4
    assert with_less["training_clips"] == 11 and with_less["training_clips_of"] == 12
    assert with_less["notes"][:2] == [
        "1 training clips are smaller than 9x16x16, and were not looked at",
        "11 training clips have more than 3 stretches of 9 frames; as many of each, evenly spread, were looked at",
    ]


def test_shrinking_is_by_means_and_keeps_small_clips():
    ramp = np.broadcast_to(np.arange(32, dtype=np.uint8)[None, None, :, None] * 8, (3, 10, 32, 3))
    small = nearest.shrunk(ramp).reshape(3, 10, 16, 3)
    np.testing.assert_allclose(small[0, 0, :, 0] * 255, np.arange(16) * 16 + 4, atol=1e-3)


def test_clips_are_cut_to_the_size_that_is_asked_for():
    video = np.arange(6 * 20 * 24 * 3, dtype=np.uint32).astype(np.uint8).reshape(6, 20, 24, 3)
    source = clips.Sized(Clips([video, video]), (4, 16, 16))
    real = clips.read(source, 5)
    np.testing.assert_array_equal(real.clips[0].video, video[:4, 2:18, 4:20])
    assert real.index.tolist() == [0, 1] and real.total == 2
    assert not len(clips.Sized(Clips([video]), (7, 16, 16)).sizes)
    some = clips.read(clips.Sized(Clips([None, video, None]), (4, 16, 16)), 3)
    assert some.index.tolist() == [1] and some.notes("held-out") == ["2 held-out clips could not be used: truncated"]
    with pytest.raises(ConfigError, match="no clip could be read: {'truncated': 1}"):
        clips.read(clips.Sized(Clips([None, video]), (4, 16, 16)), 1)


def test_a_check_of_what_suites_need_of_files(of_files, monkeypatch):
    config, _ = of_files
    evaluate.check(config, ("vbench", "nearest"), Asked(4))
    monkeypatch.setattr(perceptual, "missing", lambda name: f"{name} needs a package")
    monkeypatch.setenv("VIDGEN_CACHE", "/nowhere")
    with pytest.raises(ConfigError, match="^i3d needs a package$"):
        evaluate.check(config, ("fvd",), Asked(4))
    with pytest.raises(ConfigError, match="2 held-out clips of 9x16x16: --suite fvd expects 4 or more"):
        evaluate.check(config, ("fvd",), Asked(4, features="weights"))
    for suite in ("vbench", "nearest", "fvd"):
        with pytest.raises(ConfigError, match="no (heldout|train) clip has 31x16x16"):
            evaluate.check(configs.override(config, {"sample.frames": 31}), (suite,), Asked(4, features="weights"))
