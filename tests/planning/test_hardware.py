"""Chips, topologies and what their links carry."""

import jax
import pytest

from vidgen.config import ConfigError
from vidgen.planning.hardware import CHIPS, COMPILER_OPTIONS, axis_bandwidth, parse_topology, peak_flops


@pytest.mark.parametrize(
    ("text", "devices", "chips", "hosts"),
    [
        ("v5p:4x8x8", 256, 256, 64),
        ("v5p:2x2x1", 4, 4, 1),
        ("v6e:16x16", 256, 256, 64),
        ("tpu7x:4x4x4", 128, 64, 16),
        ("h100:32x8", 256, 256, 32),
        ("2*v5p:8x8x8", 1024, 1024, 256),
    ],
)
def test_a_topology_is_read_and_written(text, devices, chips, hosts):
    topology = parse_topology(text)
    assert (topology.devices, topology.chips, topology.hosts) == (devices, chips, hosts)
    assert topology.text == text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("v9:4x4", "unknown chip 'v9'; known are, for example, v5e:16x16, v5p:4x8x8"),
        ("v5p-256", "unknown chip 'v5p-256'"),
        ("v5p:16x16", "v5p wants 3 dimensions of the torus"),
        ("v6e:4x4x4", "v6e wants 2 dimensions of the torus"),
        ("v6e:32x16", "comes as 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16; several slices are 2*v6e:16x16"),
        ("v5e:3x3", "comes as 1x1, 2x2"),
        ("v5p:3x5x7", "2x4x4, or multiples of 4 up to 6144 chips"),
        ("v5p:400x400x400", "up to 6144 chips"),
        ("v5p:16x20x28", "up to 6144 chips"),
        ("v5p:2_0x4x4", "expected CHIP:SHAPE"),
        ("2_0*v5p:4x4x4", "expected CHIP:SHAPE"),
        ("*v5p:2x2x1", "expected CHIP:SHAPE"),
        ("²*v5p:2x2x1", "expected CHIP:SHAPE"),
        ("999999*v5p:4x4x4", "expected at most 131,072"),
        ("h100:256", "h100 wants hosts x GPUs a host, each at least 1, like h100:32x8"),
        ("h100:8x32", "a host has 1, 2, 4 or 8 GPUs a host"),
        ("v5p:4x8x0", "each at least 1"),
        ("0*v5p:4x8x8", "each at least 1"),
        ("v5p:axbxc", "expected CHIP:SHAPE"),
        ("v5p", "expected CHIP:SHAPE"),
    ],
)
def test_what_is_no_topology_is_told_in_a_line(text, says):
    with pytest.raises(ConfigError) as e:
        parse_topology(text)
    assert says in str(e.value) and "\n" not in str(e.value) and text in str(e.value)


def test_larger_topologies_are_such_as_there_are():
    for text in ("v5p:2x2x1", "v5e:1x1", "v6e:4x4", "h100:1x8", "2*v5p:4x4x4"):
        found = parse_topology(text).larger()
        assert found and [parse_topology(t.text) for t in found] == found
        assert [t.chips for t in found] == sorted(t.chips for t in found)
    assert parse_topology("v6e:16x16").larger() == []


def test_every_chip_has_compiler_options_and_an_example():
    assert COMPILER_OPTIONS.keys() >= CHIPS.keys()


def mesh(data=1, fsdp=1, context=1, tensor=1):
    return {"data": data, "fsdp": fsdp, "context": context, "tensor": tensor}


@pytest.mark.parametrize(
    ("topology", "sizes", "axis", "links"),
    [
        ("v5p:4x8x8", mesh(fsdp=32, context=8), "context", 2),  # a ring along one dimension
        ("v5p:4x8x8", mesh(fsdp=32, context=8), "fsdp", 4),  # two rings
        ("v5p:2x2x1", mesh(context=4), "context", 2),  # two lines
        ("v5p:4x8x8", mesh(fsdp=128, tensor=2), "tensor", 1),  # a quarter of a ring is a line
        ("v5p:2x4x4", mesh(fsdp=8, context=4), "context", 1),  # less than a cube has no rings
        ("v6e:8x8", mesh(fsdp=8, context=8), "context", 1),  # rings close at 16
        ("v6e:16x16", mesh(fsdp=16, context=16), "context", 2),
        ("tpu7x:4x4x4", mesh(fsdp=16, context=8), "context", 2),  # two devices a chip, four chips in a ring
    ],
)
def test_an_axis_of_tpus_has_the_links_of_the_dimensions_it_lies_on(topology, sizes, axis, links):
    topology = parse_topology(topology)
    assert axis_bandwidth(topology, sizes)[axis] == links * topology.chip.link


def test_gpus_have_nvlink_within_a_host_and_all_its_ports_beyond():
    topology = parse_topology("h100:32x8")
    inside = axis_bandwidth(topology, mesh(fsdp=32, context=8))
    assert inside["context"] == topology.chip.link and inside["fsdp"] == topology.chip.network
    assert axis_bandwidth(topology, mesh(fsdp=256))["fsdp"] == 8 * topology.chip.network


def test_the_data_axis_over_slices_has_the_network_of_the_devices_that_share_it():
    topology = parse_topology("2*v6e:16x16")
    assert axis_bandwidth(topology, mesh(data=2, fsdp=256))["data"] == topology.chip.network
    assert axis_bandwidth(topology, mesh(data=8, fsdp=64))["data"] == 4 * topology.chip.network


def test_an_unknown_device_is_measured():
    peak, origin = peak_flops(jax.devices()[0])
    assert 1e8 < peak < 1e14 and "measured" in origin


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v5 lite", 197e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 2307e12 / 2),
        ("NVIDIA H100 80GB HBM3", 989e12),
    ],
)
def test_known_devices_have_the_figures_of_their_data_sheets(kind, peak):
    device = type("Device", (), {"device_kind": kind, "platform": "tpu"})
    assert peak_flops(device)[0] == peak
