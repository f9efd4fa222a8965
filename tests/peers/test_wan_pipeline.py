"""A whole pipeline of diffusers in, sampled from, and out again; needs the extras [peers] and [text]."""

import dataclasses
import json
import os
import types
import warnings

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("sentencepiece")

import diffusers as hf
import sentencepiece
import torch
import transformers
from PIL import Image

from vidgen import config as configs
from vidgen import export_weights, import_weights, sample, train
from vidgen.conditioning.given import Given
from vidgen.geometry import unpatchify
from vidgen.interop import diffusers
from vidgen.text import frozen
from vidgen.training import restored

pytestmark = pytest.mark.usefixtures("quick_compiles")

PROMPTS = ["A red ball falls onto the green table & rolls away.", "Two white cats"]
NEGATIVE = "slow motion"
FRAMES, HEIGHT, WIDTH, STEPS = 9, 16, 32, 10


def randomised(module, seed):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            scale = 1.0 if "norm" in name and value.ndim == 1 else value[0].numel() ** -0.5 if value.ndim > 1 else 0.3
            value.copy_(torch.randn(value.shape, generator=draw) * scale)
    return module.eval()


def make(directory, experts=False, scheduler=None, dtype=torch.float32, cls=hf.WanPipeline, beside=0, expand=False):
    """Saves a random pipeline, small but whole, and returns it; `beside`: channels of what is given of a clip."""
    model = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16}
    model |= {"ffn_dim": 40, "num_layers": 2, "rope_max_seq_len": 64}
    model["in_channels"] += beside
    image = {"image_encoder": None, "image_processor": None} if cls is hf.WanImageToVideoPipeline else {}
    text = {"vocab_size": 120, "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    vae = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 2], "num_res_blocks": 1, "temperal_downsample": [True, True]}
    vae |= {"scale_factor_spatial": 4, "latents_mean": [0.1, 0.2, -0.1, 0.0], "latents_std": [1.0, 1.5, 0.8, 1.2]}
    with open(os.path.join(directory.parent, "spiece.model"), "wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([*PROMPTS, NEGATIVE] * 20),
            model_writer=f,
            vocab_size=30,
            model_type="unigram",
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "eos_token": "</s>", "pad_token": "<pad>"}
    (directory.parent / "tokenizer_config.json").write_text(json.dumps(settings))
    unipc = hf.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipeline = cls(
        tokenizer=transformers.AutoTokenizer.from_pretrained(directory.parent),
        text_encoder=randomised(transformers.UMT5EncoderModel(transformers.UMT5Config(**text)), 1).to(dtype),
        vae=randomised(hf.AutoencoderKLWan(**vae), 2),
        scheduler=scheduler or unipc,
        transformer=randomised(hf.WanTransformer3DModel(**model), 3).to(dtype),
        transformer_2=randomised(hf.WanTransformer3DModel(**model), 4).to(dtype) if experts else None,
        boundary_ratio=0.8 if experts else None,
        expand_timesteps=expand,
        **image,
    )
    pipeline.set_progress_bar_config(disable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline.save_pretrained(directory)
    return pipeline


def theirs(pipeline, noise, guidance, guidance_2=None, **images):
    """[B,t,y,x,C] latents of diffusers' pipeline."""
    latents = pipeline(
        prompt=PROMPTS,
        negative_prompt=[NEGATIVE] * len(PROMPTS),
        num_frames=FRAMES,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        guidance_scale_2=guidance_2,
        latents=torch.from_numpy(np.moveaxis(noise, -1, 1).copy()),
        output_type="latent",
        **images,
    ).frames
    return np.moveaxis(latents.numpy(), 1, -1)


@dataclasses.dataclass(frozen=True)
class Kept:
    """A tokenizer that keeps the tokens it is to decode."""

    of: object
    tokens: list = dataclasses.field(default_factory=list, compare=False)

    def __getattr__(self, name):
        return getattr(self.of, name)

    def decode_tokens(self, tokens, grid):
        self.tokens.extend(unpatchify(one, grid, self.of.geometry.patch) for one in np.asarray(tokens))
        return self.of.decode_tokens(tokens, grid)


def ours(directory, noise, guidance, guidance_2=0.0, given=None):
    """[B,t,y,x,C] latents that `vidgen sample` decodes, and the clips; in float32."""
    path = directory / "config.json"
    path.write_text(configs.to_json(configs.override(configs.from_json(path.read_text()), {"dtype": "float32"})))
    config, generator, params, _ = restored.load(str(directory))
    settings = {"frames": FRAMES, "height": HEIGHT, "width": WIDTH, "steps": STEPS, "guidance": guidance}
    sample.override(config, settings | {"guidance_2": guidance_2})
    kept = Kept(generator.tokenizer)
    generator = dataclasses.replace(generator, tokenizer=kept)
    clips = sample.draw(config, generator, params, PROMPTS, seeds=[0], negative=NEGATIVE, noise=noise, given=given)
    return np.stack(kept.tokens), clips


def noise_of(seed=0):
    shape = (len(PROMPTS), 1 + (FRAMES - 1) // 4, HEIGHT // 4, WIDTH // 4, 4)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def same_files(a, b):
    files = {str(p.relative_to(a)) for p in a.rglob("*") if p.is_file()}
    assert files == {str(p.relative_to(b)) for p in b.rglob("*") if p.is_file()}
    for name in sorted(files):
        if name.endswith((".safetensors", "config.json")):
            assert (a / name).read_bytes() == (b / name).read_bytes(), name


def test_the_same_latents_as_wan_pipeline_and_the_same_files(tmp_path):
    pipeline = make(tmp_path / "hf")
    result = import_weights.run(str(tmp_path / "hf"), str(tmp_path / "in"))
    assert result.name == "WanPipeline" and result.parts["transformer"] == "WanTransformer3DModel"
    noise = noise_of()
    expected = theirs(pipeline, noise, 5.0)
    found, clips = ours(tmp_path / "in", noise, 5.0)
    assert expected.std() > 0.3
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
    assert len(clips) == 2 and clips[0].shape == (FRAMES, HEIGHT, WIDTH, 3)

    export_weights.run(str(tmp_path / "in"), str(tmp_path / "out"))
    same_files(tmp_path / "hf", tmp_path / "out")
    back = hf.WanPipeline.from_pretrained(tmp_path / "out")
    back.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(theirs(back, noise, 5.0), expected)


def test_text_embeddings_are_those_of_the_pipeline(tmp_path):
    pipeline = make(tmp_path / "hf")
    import_weights.run(str(tmp_path / "hf"), str(tmp_path / "in"))
    config = restored.run_config(str(tmp_path / "in"))
    encoder = frozen.from_config(config)
    own = np.stack([encoder.place(values) for values in encoder.encode(PROMPTS)])
    with torch.no_grad():
        expected = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=512)[0]
    np.testing.assert_allclose(own, expected.numpy(), rtol=0, atol=1e-4)
    component = diffusers.load_component(tmp_path / "hf" / "text_encoder")
    ids = np.array([[3, 4, 5, 1]])
    with torch.no_grad():
        expected = pipeline.text_encoder(torch.from_numpy(ids)).last_hidden_state.numpy()
    np.testing.assert_allclose(component(ids, np.ones_like(ids)), expected, rtol=0, atol=1e-4)


def test_two_experts_take_turns_as_in_wan_22(tmp_path):
    pipeline = make(tmp_path / "hf", experts=True)
    import_weights.run(str(tmp_path / "hf"), str(tmp_path / "in"))
    noise = noise_of(1)
    expected = theirs(pipeline, noise, 4.0, 2.0)
    found, _ = ours(tmp_path / "in", noise, 4.0, 2.0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
    one, _ = ours(tmp_path / "in", noise, 4.0, 4.0)
    assert np.abs(one - expected).max() > 0.02  # the second one's guidance counts


@pytest.mark.parametrize(
    "settings, last",
    [
        pytest.param({"beside": 8}, True, id="channels"),  # Wan 2.1, without its image features
        pytest.param({"beside": 8, "experts": True}, False, id="channels of two experts"),  # Wan 2.2 I2V-A14B
        pytest.param({"expand": True}, False, id="a timestep a token"),  # Wan 2.2 TI2V-5B
    ],
)
def test_the_same_latents_as_the_image_to_video_pipeline(tmp_path, monkeypatch, settings, last):
    # This pipeline calls ftfy whether it is installed or not; it changes nothing in ASCII.
    module = hf.pipelines.wan.pipeline_wan_i2v
    monkeypatch.setattr(module, "ftfy", types.SimpleNamespace(fix_text=lambda text: text), raising=False)
    pipeline = make(tmp_path / "hf", cls=hf.WanImageToVideoPipeline, **settings)
    import_weights.run(str(tmp_path / "hf"), str(tmp_path / "in"))
    noise, draw = noise_of(5), np.random.default_rng(6)
    first, end = (np.kron(draw.integers(0, 256, (4, 8, 3)), np.ones((4, 4, 1))).astype(np.uint8) for _ in range(2))
    images = {"image": Image.fromarray(first)} | ({"last_image": Image.fromarray(end)} if last else {})
    expected = theirs(pipeline, noise, 3.5, **images)
    found, _ = ours(tmp_path / "in", noise, 3.5, given=Given(first, end if last else None))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


def test_the_euler_scheduler_and_bfloat16(tmp_path):
    pipeline = make(tmp_path / "hf", scheduler=hf.FlowMatchEulerDiscreteScheduler(shift=5.0), dtype=torch.bfloat16)
    result = import_weights.run(str(tmp_path / "hf"), str(tmp_path / "in"))
    assert result.dtype == "float32 (122 tensors), bfloat16 (91)"  # the VAE's, and all others
    noise = noise_of(2)
    pipeline.to(torch.float32)
    expected = theirs(pipeline, noise, 1.0)
    found, _ = ours(tmp_path / "in", noise, 1.0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
    export_weights.run(str(tmp_path / "in"), str(tmp_path / "out"))
    same_files(tmp_path / "hf", tmp_path / "out")


def test_low_rank_updates_are_trained_and_loaded_by_diffusers(tmp_path):
    """Import, train, export: as updates alone, and merged into a whole pipeline; diffusers draws what we draw."""
    pipeline = make(tmp_path / "hf")
    import_weights.run(str(tmp_path / "hf"), str(tmp_path / "in"))
    c = configs.load(f"configs/finetune.py:{tmp_path / 'in'},lora")
    c.dtype = "float32"
    c.data.moving_shapes.update({"level": "easy", "sizes": ((5, 16, 16),), "clips": 64})
    c.data.holdout = 0.0
    c.rows.update({"count": 4, "tokens": 8, "segments": 1, "text": 512, "window": 16})
    c.model.update({"unroll": 2, "remat": "none"})
    c.lora.update({"rank": 4, "alpha": 8.0})
    c.optimizer.update({"lr": 3e-2, "warmup": 0, "ema": 0.0})
    c.train.update({"steps": 2, "log_every": 1, "checkpoint_every": 2})
    train.run(c, str(tmp_path / "run"))
    assert export_weights.run(str(tmp_path / "run"), str(tmp_path / "updates")).name == "LoRA"
    export_weights.run(str(tmp_path / "run"), str(tmp_path / "merged"), merge=True)

    noise = noise_of(3)
    found, _ = ours(tmp_path / "run", noise, 1.0)
    before = theirs(pipeline, noise, 1.0)
    assert np.abs(found - before).max() > 0.1
    pipeline.load_lora_weights(str(tmp_path / "updates"))
    np.testing.assert_allclose(found, theirs(pipeline, noise, 1.0), rtol=0, atol=1e-3)
    merged = hf.WanPipeline.from_pretrained(tmp_path / "merged")
    merged.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(found, theirs(merged, noise, 1.0), rtol=0, atol=1e-3)
