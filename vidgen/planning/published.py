"""Steps that others have measured and published, by our estimate: what it is worth.

MaxDiffusion's README, "Wan training": Wan 2.1 14B on clips of 81 x 720 x 1280, v5p-8 (4 chips), global batch 1, 36.0 s
a step, 135.9 TFLOP/s a device (https://github.com/AI-Hypercomputer/maxdiffusion).
"""

from __future__ import annotations

from vidgen import config as configs
from vidgen.geometry import Geometry
from vidgen.planning.flops import Pairs, StepFlops, step_flops
from vidgen.planning.hardware import parse_topology
from vidgen.planning.roofline import Roofline, predict
from vidgen.planning.traffic import communication, memory_traffic

MAXDIFFUSION_STEP_SECONDS = 36.0
TOKENS = 75_600  # 81 x 720 x 1280 pixels in tokens of 4 x 16 x 16
LATENTS = Geometry(stride=(4, 8, 8), patch=(1, 2, 2), channels=16)


def wan():
    """The shape of Wan 2.1 14B, a clip of 81 x 720 x 1280 a step."""
    c = configs.base()
    c.model.update(width=5120, layers=40, heads=40, mlp_dim=13_824, residual="bfloat16")
    c.model.update(shared_modulation=True, text_mlp=True, absolute="none", final="table", bias=True)
    c.text.update(width=4096, layers=0, heads=32)
    c.rows.update(count=1, tokens=TOKENS, text=512, caption=512, segments=1)
    c.optimizer.name = "adamw"
    return c


def wan_step(kernel: str, saved: frozenset[str], executed: Pairs) -> tuple[StepFlops, Roofline]:
    """The step of `wan` on four v5p that share its tokens and gather keys and values."""
    c, topology, sizes = wan(), parse_topology("v5p:2x2x1"), {"data": 1, "fsdp": 1, "context": 4, "tensor": 1}
    flops = step_flops(c, LATENTS.features, TOKENS**2, 0, TOKENS * 512, executed=executed, saved=saved, kernel=kernel)
    roofline = predict(
        topology,
        sizes,
        flops,
        kernel=kernel,
        head=128,
        hbm_bytes=memory_traffic(c, LATENTS.features, sizes, recomputed=True),
        traffic=communication(c, sizes, accumulate=1, strategy="gather"),
        tokens=TOKENS,
    )
    return flops, roofline


def maxdiffusion_step() -> tuple[StepFlops, Roofline]:
    """MaxDiffusion's step with its own choices.

    Tokens in four pieces, whole keys and values gathered; its remat policy keeps results of blocks' parts, none of
    which spares the kernel a second forward run; its `flash` is JAX's splash kernel, for whose default block sizes
    (1024) queries and keys are padded and whose backward pass is not fused.
    """

    def padded(n):
        return -(-n // 1024) * 1024

    queries = 4 * padded(TOKENS // 4)
    executed = Pairs(queries * padded(TOKENS), 0, queries * 512, 0)
    return wan_step("splash_unfused", frozenset({"residual"}), executed)
