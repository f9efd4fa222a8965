"""What lies where of the weights, and that nothing large lies everywhere."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from vidgen.config import ConfigError
from vidgen.parallel.rules import PRESETS, audit, check_sharded, rules_of, spec_of

SIZES = {"data": 1, "fsdp": 4, "context": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("blocks/mlp/up/kernel", (12, 64, 256), P(None, "context", ("tensor", "fsdp"))),
        ("blocks/mlp/down/kernel", (12, 256, 64), P(None, ("tensor", "context"), "fsdp")),
        ("opt_state/0/mu/blocks/attention/query/kernel", (12, 64, 64), P(None, "context", ("tensor", "fsdp"))),
        ("blocks/layer_2/attention/out/kernel", (3, 64, 64), P(None, ("tensor", "context"), "fsdp")),
        ("level_out/kernel", (64, 64), P("context", "fsdp")),  # not an `out` of a pair
        ("head/kernel", (64, 6), P("context", None)),  # 6 outputs don't divide by 4
        ("blocks/mlp/up/kernel", (12, 64, 4), P(None, "context", "tensor")),  # one of two axes does
        ("text/ngrams_3/embedding", (4096, 32), P(("fsdp", "context"), None)),
        ("blocks/mlp/up/bias", (12, 256), P()),
    ],
)
def test_specs_follow_the_table(path, shape, spec):
    assert spec_of(path, shape, SIZES, PRESETS["default"]) == spec


def test_axes_of_one_device_are_not_named():
    assert spec_of("embed/kernel", (64, 64), SIZES | {"context": 1}, PRESETS["default"]) == P(None, "fsdp")


def test_a_config_can_put_rules_before_the_table(tiny):
    tiny.mesh.override = ((r"embed/kernel$", ["fsdp", None]),)
    rules = rules_of(tiny.mesh)
    assert spec_of("embed/kernel", (64, 64), SIZES, rules) == P("fsdp", None)
    assert spec_of("head/kernel", (64, 64), SIZES, rules) == P("context", "fsdp")
    hash(rules)  # an attribute of modules


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rules": "zero3"}, "rules='zero3': known are default, fsdp, replicated"),
        ({"override": (("(", ("fsdp",)),)}, "expected .path regex"),
        ({"override": (("a", ("model",)),)}, "unknown axis 'model'"),
        ({"override": (("a", (("fsdp", "tensor"),)),)}, "tensor comes first"),
        ({"override": (("^params/a", ("fsdp",)),)}, "without ."),
        ({"override": (("a", (None, None, "fsdp")),)}, "names the last two dimensions"),
    ],
)
def test_bad_rules_are_told(tiny, change, says):
    tiny.mesh.update(change)
    with pytest.raises(ConfigError, match=says):
        rules_of(tiny.mesh)


def test_the_audit_counts_a_devices_share_and_large_arrays_must_be_in_pieces():
    state = {
        "mlp": {"up": {"kernel": jax.ShapeDtypeStruct((4096, 8192), jnp.float32)}},
        "table": jax.ShapeDtypeStruct((4096, 8192), jnp.float32),
    }
    placed = audit(state, SIZES, PRESETS["default"])
    assert [(p.path, p.bytes // p.bytes_per_device) for p in placed] == [("table", 1), ("mlp/up/kernel", 16)]
    with pytest.raises(ConfigError, match=r"table \(4096, 8192\) \(128 MiB\) would lie whole on every device"):
        check_sharded(placed, SIZES, "default")
    check_sharded(placed, dict.fromkeys(SIZES, 1), "default")  # one device holds all, as it must
    check_sharded(placed[1:], SIZES, "default")
