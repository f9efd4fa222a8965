"""Whole pipelines: in, sampled from, trained on, out; and what is wrong with one in one line."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
import tiny_pipeline

from vidgen import config as configs
from vidgen import export_weights, import_weights, sample, train, weights
from vidgen.config import ConfigError
from vidgen.diffusion.generator import Experts
from vidgen.interop import diffusers, pipelines, stream
from vidgen.models import lora
from vidgen.training import restored

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """(as diffusers has it, imported), to look at."""
    base = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline.make(str(base / "hf"), dtype="bfloat16")
    import_weights.run(str(base / "hf"), str(base / "in"))
    return base / "hf", base / "in"


@pytest.fixture
def pipeline(shared, tmp_path):
    """A copy of what diffusers has, to spoil."""
    shutil.copytree(shared[0], tmp_path / "hf")
    return tmp_path / "hf"


def same(a, b, but=()):
    names = {str(p.relative_to(a)) for p in a.rglob("*") if p.is_file()}
    assert names == {str(p.relative_to(b)) for p in b.rglob("*") if p.is_file()}
    different = {name for name in names if (a / name).read_bytes() != (b / name).read_bytes()}
    assert different == set(but)


def refused(source, tmp_path, *parts):
    with pytest.raises(ConfigError) as e:
        import_weights.run(str(source), str(tmp_path / "out"))
    for part in parts:
        assert str(part) in str(e.value), e.value
    assert "\n" not in str(e.value) and not (tmp_path / "out").exists()


def test_out_again_is_every_byte(shared, tmp_path, capsys):
    source, imported = shared
    about = json.loads((imported / "pipeline.json").read_text())
    assert about["parts"] == {
        "scheduler": "copied",
        "text_encoder": "umt5",
        "tokenizer": "copied",
        "transformer": "denoiser",
        "vae": "vae",
    }
    result = export_weights.run(str(imported), str(tmp_path / "out"))
    same(source, tmp_path / "out")
    assert result.name == "WanPipeline" and result.dtype == "float32 (122 tensors), bfloat16 (91)"
    printed = capsys.readouterr().out
    assert "transformer: WanTransformer3DModel" in printed and "scheduler: UniPCMultistepScheduler" in printed
    arrays = weights.headers(str(imported / "transformer"))
    assert arrays["blocks/attention/query/kernel"].shape == (2, 24, 24)
    assert {stored.dtype for stored in arrays.values()} == {"bfloat16"}


def test_it_can_be_moved(shared, tmp_path):
    shutil.copytree(shared[1], tmp_path / "moved")
    config = restored.run_config(str(tmp_path / "moved"))
    assert config.model.weights == str(tmp_path / "moved" / "transformer")
    assert config.sample.solver == "unipc" and config.objective.shift == 3.0 and config.text.name == "umt5"
    assert (config.sample.frames, config.sample.height, config.sample.width) == (81, 480, 832)
    assert config.rows.tokens % 128 == 0


def small(config):
    """Clips that a test can pay for."""
    config.dtype = "float32"
    config.data.moving_shapes.update({"level": "easy", "sizes": ((5, 16, 16),), "clips": 64})
    config.data.holdout = 0.0
    config.rows.update({"count": 4, "tokens": 16, "segments": 2, "text": 1024, "window": 16})
    config.model.update({"unroll": 2, "remat": "none"})
    config.optimizer.update({"lr": 1e-2, "warmup": 0, "ema": 0.0})
    config.train.update({"steps": 2, "log_every": 1, "checkpoint_every": 2})
    config.sample.update({"frames": 5, "height": 16, "width": 16, "steps": 2})
    return config


def test_sampled_trained_and_out_again(shared, tmp_path):
    pytest.importorskip("tokenizers")
    source, imported = shared
    loaded, generator, params, step = restored.load(str(imported))
    assert step == 0 and weights.flatten(params)["blocks/mlp/up/kernel"].dtype == "bfloat16"
    sample.override(loaded, {"frames": 5, "height": 16, "width": 16, "steps": 2, "guidance": 3.0})
    (clip,) = sample.draw(loaded, generator, params, ["a b c"], seeds=[0], negative="d")
    assert clip.shape == (5, 16, 16, 3) and clip.std() > 0

    config = small(configs.load(f"configs/finetune.py:{imported}"))
    assert config.optimizer.lr == 1e-2 and config.model.weights == str(imported / "transformer")
    train.run(config, str(tmp_path / "run"))
    result = export_weights.run(str(tmp_path / "run"), str(tmp_path / "out"))
    assert result.name == "WanPipeline" and result.dtype == "float32 (122 tensors), bfloat16 (91)" and not result.digest
    shards = [f"transformer/diffusion_pytorch_model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]
    same(source, tmp_path / "out", but=shards)
    trained = diffusers.read(tmp_path / "out" / "transformer")
    averaged = restored.load(str(tmp_path / "run"))[2]
    for path, array in weights.flatten(averaged).items():
        expected = np.asarray(array).astype("bfloat16").astype(np.float32)
        np.testing.assert_array_equal(trained.flat[path], expected)
    before = diffusers.read(source / "transformer")
    assert any((trained.flat[path] != before.flat[path]).any() for path in before.flat)

    result = export_weights.run(str(tmp_path / "run"), str(tmp_path / "own"), format="vidgen")
    assert result.name == "denoiser" and result.dtype == "float32"
    assert (
        weights.describe(str(tmp_path / "own"))["config"] == weights.describe(str(imported / "transformer"))["config"]
    )
    with pytest.raises(ConfigError, match="config.lora.rank=0, so there is nothing to merge"):
        export_weights.run(str(tmp_path / "run"), str(tmp_path / "no"), merge=True)


def test_two_experts_are_told_apart_by_what_was_trained(tmp_path):
    tiny_pipeline.make(str(tmp_path / "hf"), experts=True)
    import_weights.run(str(tmp_path / "hf"), str(tmp_path / "in"))
    config, generator, params, _ = restored.load(str(tmp_path / "in"))
    assert isinstance(params, Experts) and params.boundary == 0.8 == config.sample.boundary
    one = jax.tree.leaves(stream.load_onto(str(tmp_path / "in"), jax.sharding.SingleDeviceSharding(jax.devices()[0])))
    for a, b in zip(one, jax.tree.leaves(params.high), strict=True):
        np.testing.assert_array_equal(a, b)
    high = configs.load(f"configs/finetune.py:{tmp_path / 'in'}")
    assert high.objective.time_range == (0.8, 1.0) and high.model.weights.endswith("transformer")
    low = configs.load(f"configs/finetune.py:{tmp_path / 'in'},lora,low")
    assert low.objective.time_range == (0.0, 0.8) and low.model.weights.endswith("transformer_2")
    assert low.sample.expert.endswith("transformer") and low.lora.rank and low.optimizer.lr == 1e-4
    trained = jax.tree.map(lambda x: x + 1, params.low)
    assert restored.with_expert(low, generator, trained).low is trained
    assert restored.with_expert(high, generator, trained).high is trained
    low.lora.rank = 4
    updated = lora.add(jax.random.key(0), trained, low.lora)  # as while updates train; the other one has none
    assert weights.flatten(restored.with_expert(low, generator, updated).high).keys() == weights.flatten(trained).keys()
    low.sample.boundary = 0.0
    with pytest.raises(ConfigError, match="config.sample.boundary=0.0: with config.sample.expert"):
        restored.expert(low, generator)
    tiny_pipeline.model(str(tmp_path / "wide"), tiny_pipeline.TRANSFORMER | {"ffn_dim": 48})
    import_weights.run(str(tmp_path / "wide"), str(tmp_path / "other"))
    high.sample.expert = str(tmp_path / "other")
    with pytest.raises(ConfigError, match="config.sample.expert=.*other: config.model.mlp_dim=40: .*mlp_dim=48"):
        restored.expert(high, generator)


def test_what_cannot_be_run_is_still_moved(tmp_path, capsys):
    tiny_pipeline.make(str(tmp_path / "hf"), scheduler={"_class_name": "DDIMScheduler"})
    import_weights.run(str(tmp_path / "hf"), str(tmp_path / "in"))
    assert "can't be sampled from: its scheduler is DDIMScheduler; expected Uni" in capsys.readouterr().out
    assert not (tmp_path / "in" / "config.json").exists()
    with pytest.raises(ConfigError, match="can be exported, not run: its scheduler is DDIMScheduler"):
        restored.load(str(tmp_path / "in"))
    export_weights.run(str(tmp_path / "in"), str(tmp_path / "out"))
    same(tmp_path / "hf", tmp_path / "out")


@pytest.mark.parametrize(
    "change, says",
    [
        ({"prediction_type": "epsilon"}, "prediction_type='epsilon' is not implemented; expected 'flow_prediction'"),
        ({"solver_order": 3}, "solver_order=3 is not implemented; expected 2"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas=True is not implemented"),
        ({"flow_shift": -1}, "a shift of -1; expected a number above 0"),
    ],
)
def test_schedulers_that_do_something_else_are_named(pipeline, change, says):
    path = pipeline / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=says):
        pipelines.scheduler(str(pipeline))


def test_what_is_wrong_with_a_pipeline_is_said(pipeline, tmp_path):
    shard = pipeline / "transformer" / "diffusion_pytorch_model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    refused(pipeline, tmp_path, shard, "not a whole safetensors file", "the file at")
    shard.write_bytes((2**50).to_bytes(8, "little") + whole[8:])
    refused(pipeline, tmp_path, shard, "its header says that it is 1125899906842624 bytes long")
    shard.unlink()
    refused(pipeline, tmp_path, shard, "no such file")
    shard.write_bytes(whole)
    path = pipeline / "transformer" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"ffn_dim": 48}))
    refused(pipeline, tmp_path, "[24, 40]; expected [24, 48]", "config.json would fit the tensors with ffn_dim=40")
    path.write_text(json.dumps(config | {"num_layers": 3}))
    refused(pipeline, tmp_path, "no tensor blocks.2.", "would fit the tensors with num_layers=2")
    path.write_text(json.dumps(config | {"num_attention_heads": 3}))
    refused(pipeline, tmp_path, "expected [36", "with attention_head_dim=8 or num_attention_heads=2")
    path.write_text(json.dumps(config | {"_class_name": "WanTransformer2DModel"}))
    refused(pipeline, tmp_path, "'WanTransformer2DModel'; known are", "nearest: WanTransformer3DModel")
    path.write_text(json.dumps(config | {"_class_name": "DiTTransformer2DModel"}))
    refused(pipeline, tmp_path, "is no setting of DiTTransformer2DModel")
    path.write_text(json.dumps(config))
    os.rename(pipeline / "vae", pipeline / "vae_")
    refused(pipeline, tmp_path, "vae (AutoencoderKLWan) is not there", "import one part's directory")
    os.rename(pipeline / "vae_", pipeline / "vae")
    os.rename(pipeline / "vae/diffusion_pytorch_model.safetensors", pipeline / "vae/diffusion_pytorch_model.bin")
    refused(pipeline, tmp_path, "diffusion_pytorch_model.bin: a pickle")
    index = json.loads((pipeline / "model_index.json").read_text())
    (pipeline / "model_index.json").write_text(json.dumps(index | {"../vae": index["vae"]}))
    refused(pipeline, tmp_path, "part '../vae': expected the name of a directory")


def test_a_full_disk_is_seen_before_it_is_written(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    refused(pipeline, tmp_path, "GiB are to be written")
    assert sorted(os.listdir(tmp_path)) == ["hf"]


def test_imported_directories_that_were_spoilt_are_named(shared, tmp_path):
    shutil.copytree(shared[1], tmp_path / "in")
    sized = configs.load(f"configs/finetune.py:{tmp_path / 'in'},9x40x72")
    assert (sized.sample.frames, sized.sample.height, sized.sample.width) == (9, 40, 72)
    assert sized.rows.tokens == 256  # 3 x 5 x 9 of them, filled up
    with pytest.raises(ConfigError, match="holds pipeline.json, so it is imported already"):
        import_weights.run(str(tmp_path / "in"), str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="--step=3: .* is an imported pipeline"):
        restored.load(str(tmp_path / "in"), 3)
    with pytest.raises(ConfigError, match="--format=vidgen: .* is an imported pipeline"):
        export_weights.run(str(tmp_path / "in"), str(tmp_path / "out"), format="vidgen")
    with pytest.raises(ConfigError, match="'loraa': known are lora, low, and a size"):
        configs.load(f"configs/finetune.py:{tmp_path / 'in'},loraa")
    with pytest.raises(ConfigError, match="low: .* has one denoiser"):
        configs.load(f"configs/finetune.py:{tmp_path / 'in'},low")
    with pytest.raises(ConfigError, match="is no imported pipeline"):
        configs.load(f"configs/finetune.py:{tmp_path}")
    # A part whose arrays changed is written in what it holds now, not in what it once was.
    flat = weights.read_safetensors(str(tmp_path / "in" / "vae" / weights.TENSORS))
    flat["quant_conv/bias"] += 1
    weights.write_safetensors(str(tmp_path / "in" / "vae" / weights.TENSORS), flat)
    export_weights.run(str(tmp_path / "in"), str(tmp_path / "out"))
    found = diffusers.read(tmp_path / "out" / "vae").flat["quant_conv/bias"]
    np.testing.assert_array_equal(found, flat["quant_conv/bias"])
    (tmp_path / "in" / "transformer" / "source.json").write_text("{}")
    with pytest.raises(ConfigError, match="source.json: not what this version's `vidgen import` writes"):
        export_weights.run(str(tmp_path / "in"), str(tmp_path / "again"))
    shutil.rmtree(tmp_path / "in" / "vae")
    with pytest.raises(ConfigError, match="vae .vae. is not there; import the pipeline anew"):
        restored.load(str(tmp_path / "in"))
