"""Every parameter is in exactly one group, and trains as its group says."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vidgen import config as configs
from vidgen.config import ConfigError
from vidgen.training import groups, optimizers
from vidgen.weights import flatten

PARAMS = {
    "embed": {"kernel": jnp.ones((6, 8)), "bias": jnp.ones(8)},
    "blocks": {
        "attention": {"query": {"kernel": jnp.ones((2, 8, 8))}, "query_norm": {"scale": jnp.ones((2, 4))}},
        "mlp": {"up": {"kernel": jnp.ones((2, 8, 16)), "bias": jnp.ones((2, 16))}},
    },
}
GIVEN = frozenset(flatten(PARAMS))


def with_groups(config, *asked):
    config.model.weights = "somewhere"
    config.optimizer.groups = asked
    return config


def test_first_match_counts_and_the_table_adds_up_to_all(tiny):
    config = with_groups(
        tiny, (r"attention", {"lr": 0.5}), (r"kernel$", {"weight_decay": 0.1}), (r"^embed", {"frozen": True})
    )
    part = groups.partition(config, PARAMS, GIVEN)
    assert {path: part.groups[i].name for path, i in part.of.items()} == {
        "embed/kernel": "kernel$",
        "embed/bias": "^embed",
        "blocks/attention/query/kernel": "attention",
        "blocks/attention/query_norm/scale": "attention",
        "blocks/mlp/up/kernel": "kernel$",
        "blocks/mlp/up/bias": "the rest",
    }
    table = part.table()
    assert sum(row["parameters"] for row in table) == sum(x.size for x in jax.tree.leaves(PARAMS))
    assert sorted(path for row in table for path in row["paths"]) == sorted(GIVEN)
    assert part.lines()[0] == "attention: 136 parameters in 2 arrays, learning rate x 0.5"
    assert part.lines()[2] == "^embed: 8 parameters in 1 arrays, frozen"


def test_splitting_and_joining_gives_all_back(tiny):
    part = groups.partition(with_groups(tiny, (r"kernel$", {"frozen": True})), PARAMS, GIVEN)
    trained, frozen = part.split(PARAMS)
    assert set(flatten(frozen)) == {path for path in GIVEN if path.endswith("kernel")}
    assert "query" not in trained["blocks"]["attention"] and part.freezes
    chex_equal = jax.tree.map(np.array_equal, groups.join(trained, frozen), PARAMS)
    assert all(jax.tree.leaves(chex_equal))
    whole, nothing = groups.partition(tiny, PARAMS, GIVEN).split(PARAMS) if not tiny.optimizer.groups else (None, None)
    assert whole is None and nothing is None


def test_without_groups_all_is_the_rest(tiny):
    part = groups.partition(tiny, PARAMS)
    assert not part.set and not part.freezes and part.split(PARAMS)[1] is None
    assert [row["name"] for row in part.table()] == ["the rest"]


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor", "galore"])
def test_a_group_has_its_learning_rate_and_weight_decay(tiny, name):
    """Against the same optimizer of a config with those numbers for all."""
    tiny.optimizer.update(name=name, warmup=0, schedule="constant", weight_decay=0.02, galore_rank=0.5)
    params = jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(x.size), x.shape), PARAMS)
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size + 1), x.shape), PARAMS)

    def updated(config, part=None):
        optimizer = optimizers.from_config(config, part)
        updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
        return updates

    plain = updated(tiny)
    other = configs.override(tiny, {"optimizer.weight_decay": 0.3})
    other.optimizer.update(lr=0.5 * tiny.optimizer.lr, muon_lr=0.5 * tiny.optimizer.muon_lr)
    other = updated(other)
    tiny.optimizer.groups = ((r"attention/query/", {"lr": 0.5, "weight_decay": 0.3}),)
    grouped = updated(tiny, groups.partition(tiny, params))
    for path, got in flatten(grouped).items():
        want = flatten(other if "attention/query/" in path else plain)[path]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6, err_msg=path)
    assert float(optax.tree.norm(optax.tree.sub(other, plain))) > 1e-5


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((r"blocks/attn/query", {"lr": 0.1}), "matches no parameter; there are, for example, blocks/attention/query"),
        (("(", {}), "expected .path regex"),
        (("kernel", {"lrr": 1.0}), "unknown 'lrr', known are lr, weight_decay, frozen; did you mean lr"),
        (("kernel", {"lr": -1.0}), "lr=-1.0; expected a number, 0 or more"),
        (("kernel", {"lr": True}), "lr=True; expected a number"),
        (("kernel", {"frozen": 1}), "frozen=1; expected True or False"),
        (("kernel", 3), "expected .path regex"),
        (("", {"frozen": True}), "every parameter is frozen"),
    ],
    ids=str,
)
def test_bad_groups(tiny, asked, message):
    with pytest.raises(ConfigError, match=message):
        groups.partition(with_groups(tiny, asked), PARAMS, GIVEN)


def test_a_group_behind_one_that_takes_all_of_it(tiny):
    config = with_groups(tiny, (r"attention", {"lr": 0.5}), (r"query", {"lr": 0.1}))
    with pytest.raises(ConfigError, match="'query': all it matches is in groups before it, .* in 'attention'"):
        groups.partition(config, PARAMS, GIVEN)


def test_what_is_not_given_cannot_be_frozen(tiny):
    tiny.optimizer.groups = ((r"embed", {"frozen": True}),)
    with pytest.raises(ConfigError, match="starts from nothing; set config.model.weights"):
        groups.check(tiny)
    tiny.model.weights = "somewhere"
    with pytest.raises(ConfigError, match="embed/bias is not in config.model.weights"):
        groups.partition(tiny, PARAMS, GIVEN - {"embed/bias"})


def test_lora_freezes_what_was_given_before_groups_see_it(tiny):
    low_rank = {"lora_a": jnp.ones((2, 8, 2)), "lora_b": jnp.ones((2, 2, 8))}
    params = PARAMS | {
        "blocks": PARAMS["blocks"] | {"attention": {"query": {"kernel": jnp.ones((2, 8, 8))} | low_rank}}
    }
    tiny.lora.rank = 2
    part = groups.partition(with_groups(tiny, (r"lora_b$", {"lr": 16.0})), params, GIVEN - {"embed/bias"})
    trained, frozen = part.split(params)
    assert set(flatten(trained)) == {
        "embed/bias",  # a text encoder of bytes, say, that the weights don't have
        "blocks/attention/query/lora_a",
        "blocks/attention/query/lora_b",
    }
    assert part.table()[0]["name"] == "frozen by config.lora" and len(flatten(frozen)) == 4
    with pytest.raises(ConfigError, match="all it matches is in groups before it, .* in 'frozen by config.lora'"):
        groups.partition(with_groups(tiny, (r"mlp", {"lr": 0.1})), params, GIVEN)


def test_groups_survive_the_workdirs_json(tiny):
    config = with_groups(tiny, (r"a|b", {"lr": 0.5, "frozen": False}), ("c", {"weight_decay": 0.0}))
    again = configs.from_json(configs.to_json(config))
    assert groups.read(again.optimizer.groups) == groups.read(config.optimizer.groups)
    assert configs.difference(again, config) == []
