"""The mesh, and how batches lie on it."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from vidgen.batch import TokenBatch
from vidgen.config import ConfigError
from vidgen.parallel.mesh import batch_shardings, make_mesh, path_name


def mesh_of(config, **sizes):
    config.mesh.update(sizes)
    return make_mesh(config.mesh, config.rows.count, config.rows.tokens, config.optimizer.accumulate)


def test_the_mesh_takes_what_is_left_for_data(tiny):
    assert dict(mesh_of(tiny, fsdp=2).shape) == {"data": 2, "fsdp": 2, "context": 1, "tensor": 1}
    assert dict(mesh_of(tiny, data=1, fsdp=1, context=-1, tensor=2).shape)["context"] == 2
    two = make_mesh(tiny.mesh.copy_and_resolve_references(), 4, 24, devices=jax.devices()[:2])
    assert two.size == 2 and set(two.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    ("mesh", "says"),
    [
        ({"fsdp": 3}, r"fsdp=3 \(3\) does not divide the 4 devices.*1, 2, 4"),
        ({"data": 3}, r"data=3 \(3\) is not the 4 devices"),
        ({"data": 1, "fsdp": 2, "context": 4}, r"fsdp=2 x context=4 \(8\)"),
        ({"tensor": 0}, "tensor=0: expected a number of devices"),
        ({"fsdp": -1}, "data and fsdp are both -1"),
        ({"data": 1, "fsdp": 4, "slices": 2}, "slices=2: the data axis runs over the slices"),
    ],
)
def test_a_mesh_that_is_not_the_devices_names_the_numbers(tiny, mesh, says):
    with pytest.raises(ConfigError, match=says):
        mesh_of(tiny, **mesh)


@pytest.mark.parametrize(
    ("rows", "mesh", "says"),
    [
        ({"count": 6}, {}, r"rows.count=6 does not divide over 4 devices \(data x fsdp\); nearest: 8"),
        (
            {"tokens": 30},
            {"data": 1, "context": 4},
            "rows.tokens=30 does not divide over context=4 devices; nearest: 32",
        ),
    ],
)
def test_rows_that_do_not_divide_name_the_nearest_that_do(tiny, rows, mesh, says):
    tiny.rows.update(rows)
    with pytest.raises(ConfigError, match=says):
        mesh_of(tiny, **mesh)


def test_microbatches_divide_the_rows_too(tiny):
    tiny.optimizer.accumulate = 2
    with pytest.raises(ConfigError, match="in 2 parts.*nearest: 8"):
        mesh_of(tiny)


def test_tokens_lie_over_context_and_captions_do_not(tiny):
    mesh = mesh_of(tiny, data=1, fsdp=2, context=2)
    tokens, text = np.zeros((4, 24)), np.zeros((4, 192))
    batch = TokenBatch(tokens, tokens, tokens, tokens, context={"text": (text, text)}, clip=np.zeros((4, 4)))
    found = jax.tree.map(lambda s: s.spec, batch_shardings(mesh, batch))
    assert found.tokens == found.segment == P(("data", "fsdp"), "context")
    assert found.clip == found.context["text"][0] == P(("data", "fsdp"))
    assert found.known is None and jax.tree.structure(found) == jax.tree.structure(batch)


def test_paths_read_like_paths():
    tree = {"a": [1, (2,)]}
    assert [path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree)] == ["a/0", "a/1/0"]
