"""Settings of diffusers' transformers, and calls of ours in its terms, without diffusers."""

import numpy as np
import pytest

from vidgen import weights
from vidgen.config import ConfigError, base
from vidgen.interop import dit_transformer, packed, wan_transformer
from vidgen.models import architecture
from vidgen.models.architecture import Architecture

WAN = {"num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 6, "ffn_dim": 10, "num_layers": 1}
DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 4, "num_embeds_ada_norm": 3}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        WAN | {"in_channels": 36},
        WAN | {"image_dim": 8, "added_kv_proj_dim": 32, "pos_embed_seq_len": 6, "in_channels": 36},
        WAN | {"attention_head_dim": 40, "patch_size": [2, 1, 3]},
    ],
)
def test_wan_settings_there_and_back(settings):
    config = wan_transformer.read_config(settings | {"_class_name": "WanTransformer3DModel"}, "config.json")
    assert wan_transformer.write_config(config) == wan_transformer.DEFAULTS | settings
    assert Architecture.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="config.model.* diffusers' DiTTransformer2DModel has"):
        dit_transformer.write_config(config)


@pytest.mark.parametrize(
    "settings", [{"out_channels": 4}, {"out_channels": 8}, DIT | {"patch_size": 1, "out_channels": 4}]
)
def test_dit_settings_there_and_back(settings):
    config = dit_transformer.read_config(settings, "config.json")
    assert dit_transformer.write_config(config) == dit_transformer.DEFAULTS | settings
    assert Architecture.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="config.model.* diffusers' WanTransformer3DModel has"):
        wan_transformer.write_config(config)


@pytest.mark.parametrize(
    ("module", "settings", "says"),
    [
        (wan_transformer, {"freq_dim": 128}, "freq_dim=128 is not implemented; expected 256"),
        (wan_transformer, {"cross_attn_norm": False}, "cross_attn_norm=False is not implemented"),
        (wan_transformer, {"qk_norm": "rms_norm"}, "qk_norm='rms_norm' is not implemented"),
        (wan_transformer, {"eps": 1e-5}, "eps=1e-05 is not implemented"),
        (wan_transformer, {"vace_layers": [0]}, "vace_layers is no setting of WanTransformer3DModel"),
        (wan_transformer, {"num_layer": 3}, "nearest: num_layers"),
        (wan_transformer, {"num_layers": None}, "num_layers=None: expected a whole number"),
        (wan_transformer, {"ffn_dim": 1.5}, "ffn_dim=1.5: expected a whole number"),
        (wan_transformer, {"text_dim": None}, "text_dim=None: expected a whole number"),
        (wan_transformer, {"patch_size": 2}, "patch_size=2: expected three"),
        (wan_transformer, {"patch_size": [1, 2, 0]}, "patch_size=0"),
        (wan_transformer, {"attention_head_dim": 15}, "attention_head_dim=15: expected an even"),
        (wan_transformer, {"in_channels": 8}, "in_channels=8: expected out_channels=16 or more"),
        (wan_transformer, {"image_dim": 1280}, "added_kv_proj_dim=None with image_dim=1280: expected 5120"),
        (wan_transformer, {"added_kv_proj_dim": 5120}, "with image_dim=None: expected null"),
        (wan_transformer, {"pos_embed_seq_len": 514}, "pos_embed_seq_len=514: expected null without image_dim"),
        (
            wan_transformer,
            {"image_dim": 8, "added_kv_proj_dim": 5120, "pos_embed_seq_len": 7},
            "pos_embed_seq_len=7: expected an even number",
        ),
        (dit_transformer, {"norm_type": "ada_norm"}, "norm_type='ada_norm' is not implemented"),
        (dit_transformer, {"attention_bias": False}, "attention_bias=False is not implemented"),
        (dit_transformer, {"activation_fn": "geglu"}, "activation_fn='geglu' is not implemented"),
        (dit_transformer, {"out_channels": 5}, "out_channels=5: expected in_channels=4, or twice"),
        (dit_transformer, {"norm_eps": "small"}, "norm_eps='small': expected a small number"),
        (dit_transformer, {"num_embeds_ada_norm": None}, "num_embeds_ada_norm=None"),
        (dit_transformer, {"sample_size": 1}, "sample_size=1: expected patch_size=2 or more"),
        (dit_transformer, {"attention_head_dim": 7}, "attention_head_dim=7: expected an even number"),
    ],
)
def test_settings_that_are_not_implemented_are_named(module, settings, says):
    with pytest.raises(ConfigError, match=r"^there/config\.json: ") as e:
        module.read_config(settings, "there/config.json")
    assert says in str(e.value) and "\n" not in str(e.value)


def test_an_architecture_is_the_same_however_it_is_said():
    model = base().model
    told = base().model
    told.update(mlp_dim=4 * 384, rope_pairs=(11, 11, 10), remat="none", table=(1, 2, 3))
    assert architecture.of(model, (1, 1, 1), 16, 256) == architecture.of(told, (1, 1, 1), 16, 256)
    told.update(heads=12, rope_pairs=())
    there, here = architecture.of(told, (1, 1, 1), 16, 256), architecture.of(model, (1, 1, 1), 16, 256)
    assert architecture.difference(there, here) == ("model.heads", 12, 6)
    assert architecture.difference(here, architecture.of(model, (1, 2, 1), 16, 256)) == ("patch", (1, 1, 1), (1, 2, 1))
    assert architecture.difference(here, here) is None
    found = here.to_dict()
    for change, says in (
        ({"patch": None, "more": 1}, "a denoiser's config has"),
        ({"model": found["model"] | {"wide": 1}}, "model: unknown wide"),
        ({"model": {k: v for k, v in found["model"].items() if k != "rope"}}, "model: no rope"),
        ({"model": found["model"] | {"heads": "six"}}, "model.heads='six'"),
    ):
        with pytest.raises(ConfigError, match=says):
            Architecture.from_dict(found | change)


def component(module, settings, kind):
    config = module.read_config(settings, "config.json")
    rng = np.random.default_rng(0)
    flat = {path: rng.normal(size=s).astype(np.float32) * 0.2 for path, s in packed.shapes(config).items()}
    return kind.build(config, weights.nest(flat), settings)


def test_calls_that_do_not_fit_are_told():
    wan = component(wan_transformer, WAN, wan_transformer.WanTransformer)
    x, t, text = np.zeros((1, 16, 2, 4, 4), np.float32), np.array([500.0]), np.zeros((1, 5, 6), np.float32)
    assert wan(x, t, text).shape == x.shape and wan(x, t, text).dtype == np.float32
    for arguments, says in (
        ((x[:, :4], t, text), r"hidden_states of shape \[1, 4, 2, 4, 4\]: expected \[any, 16, any, any, any\]"),
        ((x[..., :3], t, text), "expected multiples of the patch"),
        ((x, t, text[..., :5]), r"encoder_hidden_states of shape \[1, 5, 5\]: expected \[1, any, 6\]"),
        ((x, np.zeros((1, 3)), text), r"timestep of shape \[1, 3\]: expected \[1\] or \[1, 8\]"),
        ((x, np.array([1001.0]), text), "expected 0 to 1000"),
        ((x, np.array([np.nan]), text), "expected 0 to 1000"),
        ((x.astype(np.int32), t, text), "int32: expected floats"),
        ((x * np.nan, t, text), "holds NaN"),
        ((x, t, text, text), "image_dim is null"),
    ):
        with pytest.raises(ValueError, match=says):
            wan(*arguments)
    dit = component(dit_transformer, DIT, dit_transformer.DiTTransformer)
    x, t, labels = np.zeros((2, 4, 4, 6), np.float32), np.array([5, 6]), np.array([0, 3])
    assert dit(x, t, labels).shape == (2, 4, 4, 6)
    for arguments, says in (
        ((x[..., :5], t, labels), "multiples of patch_size=2"),
        ((x, t, np.array([0, 4])), "class_labels 0 to 4: expected 0 to 3"),
        ((x, t, np.array([0.0, 1.0])), "expected integers"),
    ):
        with pytest.raises(ValueError, match=says):
            dit(*arguments)
