"""Weights onto devices: sharded, in what dtype, with how much memory, and what is refused."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_pipeline
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vidgen import import_weights, weights
from vidgen.config import ConfigError
from vidgen.interop import diffusers, stream

BENCHMARK = os.path.join(os.path.dirname(__file__), "..", "benchmarks", "streaming.py")


@pytest.fixture
def stored(tmp_path):
    """(diffusers' directory, the import, {path: array})."""
    tiny_pipeline.model(str(tmp_path / "hf"), tiny_pipeline.TRANSFORMER, dtype="bfloat16", shards=2)
    import_weights.run(str(tmp_path / "hf"), str(tmp_path / "in"))
    return tmp_path / "hf", tmp_path / "in", diffusers.read(tmp_path / "hf").flat


def test_arrays_lie_where_they_are_to(stored):
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    source, imported, flat = stored
    like = {
        path: jax.ShapeDtypeStruct(
            x.shape, np.float32, sharding=NamedSharding(mesh, P(*([None] * (x.ndim - 1)), "b") if x.ndim > 1 else P())
        )
        for path, x in flat.items()
    }
    for directory in (source, imported):
        found = weights.flatten(stream.load_onto(str(directory), weights.nest(like)))
        assert found.keys() == flat.keys()
        for path, array in found.items():
            assert array.dtype == np.float32 and array.sharding == like[path].sharding
            np.testing.assert_array_equal(array, flat[path])
    kernel = found["blocks/mlp/up/kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 24, 20)
    np.testing.assert_array_equal(kernel.addressable_shards[0].data, flat["blocks/mlp/up/kernel"][..., :20])
    one = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    as_it_is = weights.flatten(stream.load_onto(str(imported), one))
    assert {str(x.dtype) for x in as_it_is.values()} == {"bfloat16"}
    assert {next(iter(x.devices())) for x in as_it_is.values()} == {jax.devices()[1]}


def test_what_does_not_fit_is_named(stored):
    _, imported, flat = stored
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one) for path, x in flat.items()}
    more = like | {"blocks/mlp/gate": like["head/bias"]}
    with pytest.raises(ConfigError, match="lacks blocks/mlp/gate, the config's model has it"):
        stream.load_onto(str(imported), weights.nest(more))
    less = {path: x for path, x in like.items() if path != "head/bias"}
    with pytest.raises(ConfigError, match="has head/bias, the config's model does not"):
        stream.load_onto(str(imported), weights.nest(less))
    other = like | {"head/bias": jax.ShapeDtypeStruct((3,), np.float32, sharding=one)}
    with pytest.raises(ConfigError, match=r"head/bias has shape \[16\]; the config's model has \[3\]"):
        stream.load_onto(str(imported), weights.nest(other))
    with pytest.raises(ConfigError, match="no-such-place"):
        stream.load_onto(str(imported / "no-such-place"), one)
    os.truncate(imported / weights.TENSORS, 5000)
    with pytest.raises(ConfigError, match="not a whole safetensors file"):
        stream.load_onto(str(imported), one)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")
def test_peak_memory_of_a_checkpoint_in_shards(tmp_path):
    """Measured like the 1.3B one of tests/benchmarks/streaming.py, on one of 200 MB."""
    sys.path.insert(0, os.path.dirname(BENCHMARK))
    try:
        import streaming
    finally:
        sys.path.pop(0)
    total = streaming.make(str(tmp_path / "hf"), streaming.settings(12, 512, 2816), "float32", shard=2**25)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 4 and total > 1.5e8
    for what, source, output, most in (("import", "hf", "in", 0.5), ("load", "in", "", 1.2)):
        try:
            found = streaming.measure(what, str(tmp_path / source), str(tmp_path / output))
        except subprocess.SubprocessError as e:
            pytest.fail(str(e))
        # Python's and JAX's own memory is more than such small weights.
        assert found["peak"] - found["before"] < most * total, (what, source, found)
