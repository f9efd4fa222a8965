"""What lies where on the mesh."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from vidgen.parallel.mesh import make_mesh, path_name, spec_of


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("blocks/mlp/up/kernel", (12, 64, 256), P(None, None, "fsdp")),
        ("opt_state/inner_states/muon/inner_state/0/mu/blocks/mlp/up/kernel", (12, 64, 256), P(None, None, "fsdp")),
        ("embed/kernel", (768, 64), P(None, "fsdp")),
        ("text/bytes/embedding", (258, 32), P()),  # 258 rows don't divide by 4
        ("text/ngrams_3/embedding", (4096, 32), P("fsdp", None)),
        ("blocks/mlp/up/bias", (12, 256), P()),
        ("head/kernel", (64, 6), P()),
    ],
)
def test_specs_follow_the_table(tiny, path, shape, spec):
    tiny.mesh.fsdp = 4
    assert spec_of(path, shape, make_mesh(tiny.mesh, 4)) == spec


def test_the_mesh_takes_what_is_left_for_data(tiny):
    tiny.mesh.fsdp = 2
    assert dict(make_mesh(tiny.mesh, 4).shape) == {"data": 2, "fsdp": 2}
    assert dict(make_mesh(tiny.mesh, 4, devices=jax.devices()[:2]).shape) == {"data": 1, "fsdp": 2}


def test_paths_read_like_paths():
    tree = {"a": [1, (2,)]}
    assert [path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree)] == ["a/0", "a/1/0"]
