"""Reading compiled programs.

The fixtures are compiled training steps of a three-layer transformer (v5e, v5p, v6e and H100 targets, jax 0.10.2 and
0.12.0.1), cut down by hand to some of their collectives and the lines around them.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vidgen.planning import hlo
from vidgen.planning.schedule import arrays, parse
from vidgen.planning.transfers import axes_of, groups

AXES = ("data", "fsdp", "context", "tensor")
FSDP, CONTEXT, TENSOR, BOTH = ("fsdp",), ("context",), ("tensor",), ("fsdp", "context")
GATHER, SCATTER, REDUCE, PERMUTE = "all-gather", "reduce-scatter", "all-reduce", "collective-permute"
MiB = 2**20


def fixture(name):
    return (pathlib.Path(__file__).parent / "fixtures" / f"{name}.txt").read_text()


def mesh_of(*sizes):
    return dict(zip(AXES, sizes, strict=True))


def told(c):
    return c.opcode, c.axes, c.bytes, c.count, c.asynchronous, c.window, c.role


# opcode, axes, bytes, count, asynchronous, window, role
READ = {
    # Chains of fusions: each gather stands on three lines or more, and all of a shard_map share channel 1.
    ("v5e_chains", (1, 4, 4, 1)): [
        (GATHER, BOTH, 2 * MiB, 3, False, "", "weights"),
        (GATHER, BOTH, 2 * MiB, 3, False, "", "weights"),
        (GATHER, BOTH, 8 * MiB, 3, True, "matmul", "weights"),
        (GATHER, CONTEXT, 16 * MiB, 3, True, "matmul", "keys"),
        (REDUCE, BOTH, 4, 1, False, "", "other"),
    ],
    # call-start without operands, handed over by call-update.
    ("v5p_sparsecore", (1, 4, 4, 1)): [
        (SCATTER, CONTEXT, 16 * MiB, 3, True, "matmul", "keys"),
        (GATHER, BOTH, 2 * MiB, 3, False, "", "weights"),
        (GATHER, BOTH, 2 * MiB, 3, False, "", "weights"),
        (SCATTER, CONTEXT, 16 * MiB, 3, True, "matmul", "keys"),
        (REDUCE, BOTH, 24 * MiB, 3, True, "matmul", "gradients"),
        (REDUCE, BOTH, 4, 1, False, "", "other"),
    ],
    # call-start with operands; the scatter has lost its name.
    ("v6e_sparsecore", (1, 4, 4, 1)): [
        (GATHER, BOTH, 32 * MiB, 3, False, "", "weights"),
        (GATHER, CONTEXT, 512 * MiB, 3, True, "matmul", "keys"),
        (REDUCE, BOTH, 128 * MiB, 3, True, "matmul", "gradients"),
        (SCATTER, CONTEXT, 512 * MiB, 3, True, "matmul", "keys"),
        (REDUCE, BOTH, 4, 1, False, "", "other"),
    ],
    # A product with its reduce-scatter in a loop of 8 in steps of 2, within the 3 layers.
    ("v5p_windowed_einsum", (1, 4, 4, 1)): [(PERMUTE, BOTH, 8 * MiB, 12, True, "matmul", "gradients")] * 2,
    # Weights gathered by an all-reduce of pieces written into zeros: seen as what it is for.
    ("v5p_padded_all_reduce", (1, 32, 8, 1)): [
        (REDUCE, BOTH, 96 * MiB, 3, False, "", "weights"),
        (REDUCE, BOTH, 32 * MiB, 3, False, "", "weights"),
        (GATHER, CONTEXT, 512 * MiB, 3, False, "", "keys"),
        (GATHER, CONTEXT, 512 * MiB, 3, False, "", "keys"),
        (REDUCE, BOTH, 32 * MiB, 3, False, "", "weights"),
        (REDUCE, BOTH, 96 * MiB, 3, False, "", "weights"),
        (GATHER, CONTEXT, 512 * MiB, 3, False, "", "keys"),
        (GATHER, CONTEXT, 512 * MiB, 3, False, "", "keys"),
        (REDUCE, BOTH, 4, 1, False, "", "other"),
    ],
    # A ring of 4 in 3 layers.
    ("v5p_ring", (1, 4, 4, 1)): [
        (PERMUTE, CONTEXT, 4 * MiB, 12, True, "matmul", "keys"),
        (PERMUTE, CONTEXT, 4 * MiB, 12, True, "matmul", "keys"),
        (GATHER, BOTH, 2 * MiB, 3, False, "", "weights"),
        (GATHER, BOTH, 2 * MiB, 3, False, "", "weights"),
        (REDUCE, BOTH, 4, 1, False, "", "other"),
    ],
    # Two microbatches of 3 layers, groups as iotas and as parts of an axis; a permute with nothing beside it.
    ("v5p_tensor", (1, 4, 2, 2)): [
        (GATHER, BOTH, MiB, 6, False, "", "weights"),
        (GATHER, BOTH, MiB, 6, False, "", "weights"),
        (REDUCE, TENSOR, 4 * MiB, 6, False, "", "other"),
        (REDUCE, TENSOR, 4 * MiB, 6, False, "", "other"),
        (SCATTER, CONTEXT, 4 * MiB, 6, False, "", "keys"),
        (SCATTER, CONTEXT, 4 * MiB, 6, False, "", "keys"),
        (GATHER, FSDP, 32 * MiB, 2, False, "", "other"),
        (PERMUTE, FSDP, 8 * MiB, 2, True, "", "other"),
        (REDUCE, ("fsdp", "context", "tensor"), 16, 1, False, "", "other"),
        (REDUCE, ("fsdp", "context", "tensor"), 8, 1, False, "", "other"),
    ],
    # Starts and dones of several arrays at once; the gradients of all weights in one, without a name.
    ("h100", (1, 4, 2, 1)): [
        (GATHER, FSDP, 12 * MiB, 3, False, "", "weights"),
        (GATHER, CONTEXT, 6 * MiB, 3, True, "compute", "weights"),
        (GATHER, CONTEXT, 26 * MiB, 3, True, "compute", "keys"),
        (GATHER, CONTEXT, 24 * MiB, 3, True, "matmul", "keys"),
        (SCATTER, CONTEXT, 32 * MiB, 3, True, "matmul", "keys"),
        (REDUCE, BOTH, 24 * MiB, 3, True, "matmul", "gradients"),
        (REDUCE, BOTH, 4, 1, False, "", "other"),
    ],
}


@pytest.mark.parametrize("name,sizes", READ, ids=[name for name, _ in READ])
def test_spellings_of_real_programs(name, sizes):
    found = hlo.collectives(fixture(name), mesh_of(*sizes))
    assert [told(c) for c in found] == READ[name, sizes]


def test_window_cycles_lie_between_the_hand_over_and_the_done():
    first, *_, second, reduced, _ = hlo.collectives(fixture("v5p_sparsecore"), mesh_of(1, 4, 4, 1))
    assert (first.window_cycles, second.window_cycles, reduced.window_cycles) == (72026, 121365, 25240)
    assert all(c.window_cycles is None for c in hlo.collectives(fixture("h100"), mesh_of(1, 4, 2, 1)))


def test_clones_of_a_chain_count_once():
    text = fixture("v5e_chains")
    assert text.count(" all-gather(") == 8
    assert hlo.opcode_counts(text) == {"all-gather": 4, "all-reduce": 1}


def test_sent_in_a_ring():
    by = {c.opcode: c for c in hlo.collectives(fixture("v5p_tensor"), mesh_of(1, 4, 2, 2))}
    assert by[SCATTER].sent == 4 * MiB // 2  # two members
    assert by[PERMUTE].sent == by[PERMUTE].bytes
    gather, *_, reduced, _ = hlo.collectives(fixture("h100"), mesh_of(1, 4, 2, 1))
    assert gather.sent == 12 * MiB * 3 // 4
    assert reduced.sent == 2 * 24 * MiB * 7 // 8


def test_names_are_shortened():
    first = hlo.collectives(fixture("v5p_ring"), mesh_of(1, 4, 4, 1))[0]
    assert first.name == "jvp()/block/attend/ppermute"


def test_summary_adds_up_by_opcode_axes_and_role():
    rows = hlo.summary(hlo.collectives(fixture("v5p_sparsecore"), mesh_of(1, 4, 4, 1)))
    assert [(r.opcode, r.role, r.ops, r.executions, r.bytes // MiB) for r in rows] == [
        (SCATTER, "keys", 2, 6, 96),
        (REDUCE, "gradients", 1, 3, 72),
        (GATHER, "weights", 2, 6, 12),
        (REDUCE, "other", 1, 1, 0),
    ]
    assert [(r.asynchronous, r.beside_matmul) for r in rows] == [(1, 1), (1, 1), (0, 0), (0, 0)]
    h100 = hlo.summary(hlo.collectives(fixture("h100"), mesh_of(1, 4, 2, 1)))
    keys = next(r for r in h100 if (r.opcode, r.role) == (GATHER, "keys"))
    assert keys.asynchronous == 1 and keys.beside_matmul == pytest.approx(24 / 50)


def program(body, entry="", attributes="is_scheduled=true"):
    """A module with one more computation `body` and an entry."""
    return f"HloModule test, {attributes}\n\n{body}\n\nENTRY %main (x: f32[8]) -> f32[8] {{\n{entry}\n}}\n"


SUM = 'metadata={op_name="jit(step)/transpose(jvp())/block/dot_general"}'


def test_a_fusion_of_all_reduce_and_cut_is_a_reduce_scatter():
    text = program(
        "%all-reduce-scatter.3 (p: bf16[64,1024]) -> bf16[16,1024] {\n"
        "  %p = bf16[64,1024]{1,0} parameter(0)\n"
        f"  %all-reduce.9 = bf16[64,1024]{{1,0}} all-reduce(%p), channel_id=4, replica_groups=[1,4]<=[4], {SUM}\n"
        "  ROOT %cut = bf16[16,1024]{1,0} dynamic-slice(%all-reduce.9), dynamic_slice_sizes={16,1024}\n}",
        "  %x = bf16[64,1024]{1,0} parameter(0)\n"
        "  ROOT %fusion.1 = bf16[16,1024]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.3",
    )
    (c,) = hlo.collectives(text, mesh_of(1, 4, 1, 1))
    assert told(c) == (SCATTER, FSDP, 64 * 1024 * 2, 1, False, "", "gradients")
    assert c.sent == 64 * 1024 * 2 * 3 // 4


@pytest.mark.parametrize("index,role", [(0, "gradients"), (1, "weights")])
def test_an_all_reduce_gathers_if_its_own_operand_is_written_into_zeros(index, role):
    text = program(
        "%both (p: f32[64,64]) -> (f32[64,64], f32[64,64]) {\n"
        "  %p = f32[64,64]{1,0} parameter(0)\n"
        "  %sum = f32[64,64]{1,0} add(%p, %p)\n"
        "  %put = f32[64,64]{1,0} dynamic-update-slice(%zeros, %p, %at, %at)\n"
        "  ROOT %two = (f32[64,64]{1,0}, f32[64,64]{1,0}) tuple(%sum, %put)\n}",
        "  %x = f32[64,64]{1,0} parameter(0)\n"
        "  %fusion.1 = (f32[64,64]{1,0}, f32[64,64]{1,0}) fusion(%x), kind=kLoop, calls=%both\n"
        f"  %one = f32[64,64]{{1,0}} get-tuple-element(%fusion.1), index={index}\n"
        f"  ROOT %y = f32[64,64]{{1,0}} all-reduce(%one), replica_groups=[1,4]<=[4], {SUM}",
    )
    (c,) = hlo.collectives(text, mesh_of(1, 4, 1, 1))
    assert (c.opcode, c.role) == (REDUCE, role)


def wrapped(start="", end="async-done(%started)"):
    return program(
        "%wrapped (p: bf16[4,8,64,128]) -> bf16[4,8,64,128] {\n"
        "  %p = bf16[4,8,64,128]{3,2,1,0} parameter(0)\n"
        "  ROOT %swap = bf16[4,8,64,128]{3,2,1,0} all-to-all(%p), replica_groups={{0,1},{2,3}}, dimensions={1}\n}",
        "  %x = bf16[4,8,64,128]{3,2,1,0} parameter(0)\n"
        "  %started = ((bf16[4,8,64,128]), bf16[4,8,64,128]) async-start(%x), calls=%wrapped" + start + "\n"
        "  %mix = f32[512,512]{1,0} add(%x, %x)\n"
        f"  ROOT %y = bf16[4,8,64,128]{{3,2,1,0}} {end}",
    )


def test_collectives_wrapped_in_async_start():
    (c,) = hlo.collectives(wrapped(), mesh_of(1, 2, 2, 1))
    assert told(c) == ("all-to-all", CONTEXT, 4 * 8 * 64 * 128 * 2, 1, True, "compute", "keys")


def test_what_has_no_done_or_is_marked_synchronous_runs_beside_nothing():
    for text in (wrapped(end="copy(%x)"), wrapped(', backend_config={"is_sync":true}')):
        (c,) = hlo.collectives(text, mesh_of(1, 2, 2, 1))
        assert (c.asynchronous, c.window) == (False, "")


LOOP = """%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  %two = s32[] constant(2)
  %i = s32[] get-tuple-element(%p), index=0
  %v = f32[8] get-tuple-element(%p), index=1
  %next = s32[] add(%i, %two)
  %sum = f32[8] all-reduce(%v), replica_groups=[2,2]<=[4], to_apply=%add
  ROOT %out = (s32[], f32[8]) tuple(%next, %sum)
}

%cond (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %bound = s32[] BOUND
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}"""
ENTRY = """  %x = f32[8] parameter(0)
  %zero = s32[] constant(1)
  %start = (s32[], f32[8]) tuple(%zero, %x)
  %loop = (s32[], f32[8]) while(%start), condition=%cond, body=%body{}
  ROOT %y = f32[8] get-tuple-element(%loop), index=1"""


@pytest.mark.parametrize(
    "bound,noted,count",
    [
        ("constant(8)", "", 4),  # 1, 3, 5, 7
        ("constant(9)", "", 4),
        ("constant(9)", ', backend_config={"known_trip_count":{"n":"32"}}', 32),
    ],
)
def test_loop_lengths(bound, noted, count):
    (c,) = hlo.collectives(program(LOOP.replace("BOUND", bound), ENTRY.format(noted)), mesh_of(1, 2, 2, 1))
    assert (c.count, c.axes) == (count, CONTEXT)


def test_a_loop_of_unknown_length_counts_once_and_says_so():
    text = program(LOOP.replace("BOUND", "custom-call()"), ENTRY.format(""))
    (c,) = hlo.collectives(text, mesh_of(1, 2, 2, 1))
    assert c.count == 1 and "unknown length" in c.name


def test_kernels_with_line_breaks_in_their_attributes():
    text = program(
        "",
        "  %x = f32[8] parameter(0)\n"
        '  %splash_fwd.3 = f32[8] custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={meta={\n'
        '"blocks": 512}\n'
        '}}, metadata={op_name="jit(f)/splash"}\n'
        '  %buffer = f32[8] custom-call(), custom_call_target="AllocateBuffer"\n'
        '  %soft = f32[8] custom-call(%x), custom_call_target="__cudnn$fmhaSoftmax"\n'
        "  ROOT %y = f32[8] all-reduce(%splash_fwd.3), replica_groups={}",
    )
    assert hlo.custom_kernels(text) == {"tpu_custom_call splash_fwd": 1, "__cudnn$fmhaSoftmax": 1}
    (c,) = hlo.collectives(text, mesh_of(1, 2, 2, 1))
    assert c.axes == BOTH  # no groups: all devices
    assert parse(text).by_name["main"]["splash_fwd.3"].op_name == "jit(f)/splash"


GROUPS = {
    "replica_groups={{0,2},{1,3},{4,6},{5,7}}": CONTEXT,
    "replica_groups=[4,2]<=[8]": TENSOR,
    "replica_groups=[4,2]<=[2,4]T(1,0)": FSDP,
    "replica_groups=[2,4]<=[2,4]T(1,0)": ("fsdp", "tensor"),  # {0,4,1,5}, {2,6,3,7}
    "replica_groups=[4,2]<=[2,2,2]T(0,2,1)": CONTEXT,
    "replica_groups=mesh['data'=1,'fsdp'=2,'context'=2,'tensor'=2] {'context'}": CONTEXT,
    "replica_groups=mesh['a'=2,'b'=4] {'a'}": FSDP,
    "replica_groups=mesh['a'=8] {'a':(2)2}": CONTEXT,
    "replica_groups=mesh['a'=2,'b'=2,'c'=2], device_ids=([2,2,2]T(2,1,0)) {'a'}": TENSOR,
    "source_target_pairs={{0,0},{1,1},{2,6},{6,2},{3,7},{7,3}}": FSDP,
    "replica_groups={{0,1,2,3,4,5,6,7}}": ("fsdp", "context", "tensor"),
    "replica_groups={{0,8}}": ("?",),
    "replica_groups=[8,1]<=[8]": (),
    "source_target_pairs={{0,0},{1,1}}": (),
    "nothing=here": ("?",),
}


@pytest.mark.parametrize("spelled,axes", GROUPS.items(), ids=range(len(GROUPS)))
def test_groups_in_every_spelling(spelled, axes):
    line = parse(program("", f"  ROOT %y = f32[8] all-reduce(%x), {spelled}, to_apply=%add")).by_name["main"]["y"]
    assert axes_of(groups(line, 8), mesh_of(1, 2, 2, 2)) == axes


def test_shapes_and_their_padding():
    first, second, third = arrays("(bf16[2,9,1]{2,1,0:T(8,128)(2,1)}, /*index=1*/(pred[3], f32[100]{0:T(128)S(1)}))")
    assert (first.text, first.bytes, first.padded_bytes) == ("bf16[2,9,1]", 36, 2 * 16 * 128 * 2)
    assert (second.bytes, third.bytes, third.padded_bytes, third.space) == (3, 400, 512, 1)
    assert [a.bytes for a in arrays("(f8e4m3fn[16]{0}, s4[5], c64[2], token[])")] == [16, 3, 16, 0]


def test_largest_buffers_lie_in_main_memory_and_are_made_there():
    text = program(
        "%update (p: f32[8]) -> f32[2048,1024] {\n"
        "  ROOT %put = f32[2048,1024]{1,0} dynamic-update-slice(%p, %q, %at, %at)\n}",
        "  %x = f32[1024,1024]{1,0:T(8,128)} parameter(0)\n"
        '  %a = f32[4096,1]{1,0:T(8,128)} add(%x, %x), metadata={op_name="jit(step)/while/body/norm/add"}\n'
        '  %b = f32[4096,1]{1,0:T(8,128)} add(%x, %x), metadata={op_name="jit(step)/while/body/norm/add"}\n'
        "  %fast = f32[1024,1024]{1,0:T(8,128)S(1)} copy(%x)\n"
        "  %view = (f32[1024,1024]{1,0:T(8,128)}) tuple(%x)\n"
        "  %two = (f32[512]{0:T(128)}, f32[256]{0:T(128)}) fusion(%x), kind=kLoop, "
        "output_to_operand_aliasing={{0}: (0, {})}, calls=%f\n"
        "  %grown = f32[2048,1024]{1,0:T(8,128)} fusion(%x), kind=kLoop, calls=%update\n"
        "  ROOT %y = f32[8,128]{1,0:T(8,128)} copy(%a)",
    )
    assert hlo.largest_buffers(text) == [
        (4096 * 128 * 4, "f32[4096,1]", "norm/add"),
        (8 * 128 * 4, "f32[8,128]", ""),
        (1024, "f32[256]", ""),
    ]
    assert hlo.largest_buffers(text, top=1) == [(4096 * 128 * 4, "f32[4096,1]", "norm/add")]
    assert hlo.largest_buffers(text, arguments=True) == [(4 * MiB, "f32[1024,1024]", "")]


@pytest.mark.parametrize(
    "text,error",
    [
        ("", "starts with 'HloModule'"),
        ("module @jit_step {", "found 'module @jit_step {'"),
        (program("", "  ROOT %x = f32[8] parameter(0)", "entry=1"), "no schedule"),
        ("HloModule m, is_scheduled=true\n\n%f (p: f32[]) -> f32[] {\n  ROOT %p = f32[] parameter(0)\n}\n", "no ENTRY"),
        (fixture("v5p_ring")[:-40], "ends within the computation"),
    ],
)
def test_other_texts_are_refused(text, error):
    for read in (hlo.opcode_counts, hlo.custom_kernels, hlo.largest_buffers, lambda t: hlo.collectives(t, {"data": 1})):
        with pytest.raises(ValueError, match=error):
            read(text)


# As libtpu 0.0.42.1 and 0.0.50.1 say it; the long form is of older ones.
SHORT = (
    "Ran out of memory on HBM, the total memory required for HLO temporaries (39.13G) exceeds available HBM (15.75G)."
)
LONG = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. \
Used 20.25G of 15.75G hbm. Exceeded hbm capacity by 4.50G.

Total hbm usage >= 20.51G:
    reserved        263.00M
    program          20.25G
    arguments            0B

  Largest program allocations in hbm:

  1. Size: 4.00G
     Operator: op_name="jit(step)/transpose(jvp())/while/body/checkpoint/block/up/dot_general" source_file="a.py"
     Shape: bf16[8,16384,16384]{2,1,0:T(8,128)(2,1)}
     Unpadded size: 4.00G
     XLA label: fusion.12 = fusion(copy-done.3), kind=kOutput, calls=fused_computation.9
     Allocation type: HLO temp
     ==========================

  2. Size: 512.00M
     Shape: f32[1048576,1]{1,0:T(8,128)}
     Unpadded size: 4.00M
     Extra memory due to padding: 508.00M (128.0x expansion)
     XLA label: copy.1 = copy(fusion.2)
     Allocation type: HLO temp
     ==========================
"""


def test_out_of_memory_of_a_tpu_compiler():
    for text in (
        f"RESOURCE_EXHAUSTED: {SHORT}",
        f"RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: {SHORT} HLO module: f.",
    ):
        assert hlo.oom(text) == hlo.OutOfMemory(round(39.13 * 2**30), round(15.75 * 2**30), ())
    found = hlo.oom(LONG)
    assert (found.needed_bytes, found.available_bytes) == (round(20.25 * 2**30), round(15.75 * 2**30))
    assert found.buffers == (
        (4 * 2**30, "bf16[8,16384,16384]", "transpose(jvp())/block/up/dot_general"),
        (512 * MiB, "f32[1048576,1]", ""),
    )


@pytest.mark.parametrize(
    "text,needed,available",
    [
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 85899345920 bytes.", 85899345920, None),
        ("RESOURCE_EXHAUSTED: Out of memory allocating: failed to allocate 1.50GiB", round(1.5 * 2**30), None),
        ("Attempting to allocate 2.00G. That was not possible. There are 512.00M free.", 2 * 2**30, 512 * MiB),
        ("The byte size of input/output arguments (3,221,225,472) exceeds the base limit (1.00GiB)", 3 * 2**30, 2**30),
    ],
)
def test_out_of_memory_of_an_allocator(text, needed, available):
    assert hlo.oom(text) == hlo.OutOfMemory(needed, available)


def test_other_errors_are_no_out_of_memory():
    with pytest.raises(ValueError, match="no size in the message: 'INTERNAL: Mosaic failed'"):
        hlo.oom("INTERNAL: Mosaic failed")


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 0, 2, 1)], ids=str)
def test_a_program_compiled_here(order):
    """Groups name positions in the mesh, whatever the order of its devices."""
    devices = np.asarray(jax.devices())[list(order)].reshape(1, 2, 2, 1)
    mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 4)
    rows, keys, pieces = P(("data", "fsdp"), "context"), P(("data", "fsdp"), None, "context"), P(None, "fsdp")

    def multiply(x, w):
        return x @ jax.lax.all_gather(w, "fsdp", axis=1, tiled=True)

    def attend(q):
        k = jax.lax.all_gather(q, "context", axis=2, tiled=True)
        scores = jnp.einsum("bhsd,bhld->bhsl", q, k)
        turned = jax.lax.ppermute(q, "context", [(0, 1), (1, 0)])
        swapped = jax.lax.all_to_all(q, "context", 1, 2, tiled=True)
        return jnp.einsum("bhsl,bhld->bhsd", scores, k) + turned + jnp.mean(swapped)

    def layer(x, w):
        x = jax.shard_map(multiply, mesh=mesh, in_specs=(rows, pieces), out_specs=rows, check_vma=False)(x, w)
        heads = x.reshape(*x.shape[:2], 2, -1).transpose(0, 2, 1, 3)
        y = jax.shard_map(attend, mesh=mesh, in_specs=keys, out_specs=keys, check_vma=False)(heads)
        return y.transpose(0, 2, 1, 3).reshape(x.shape), None

    def loss(weights, x):
        return jnp.sum(jax.lax.scan(layer, x, weights)[0] ** 2)

    def like(shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    step = jax.jit(jax.grad(loss), out_shardings=NamedSharding(mesh, P(None, None, "fsdp")))
    text = step.lower(like((3, 64, 64), P(None, None, "fsdp")), like((4, 256, 64), rows)).compile().as_text()
    found = {(c.opcode, c.axes, c.role): c for c in hlo.collectives(text, dict(mesh.shape))}

    gathered = found[GATHER, FSDP, "weights"]
    assert (gathered.bytes, gathered.count, gathered.asynchronous) == (64 * 64 * 4, 3, False)
    scattered = found[SCATTER, FSDP, "gradients"]
    assert (scattered.bytes, scattered.sent, scattered.count) == (64 * 64 * 4, 64 * 64 * 2, 3)
    held = found[GATHER, CONTEXT, "keys"]
    assert (held.bytes, held.count) == (2 * 2 * 256 * 32 * 4, 3)
    assert found[PERMUTE, CONTEXT, "keys"].bytes == 2 * 2 * 128 * 32 * 4
    assert found["all-to-all", CONTEXT, "keys"].count == 3
    assert {axes for _, axes, _ in found} <= {FSDP, CONTEXT}
    assert hlo.opcode_counts(text)[SCATTER] == 2  # of a layer's weight, and of its keys
