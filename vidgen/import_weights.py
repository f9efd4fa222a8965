"""`vidgen import`: another project's weights as a weights directory, for config.tokenizer.weights and the like."""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Mapping

from vidgen import weights
from vidgen.config import ConfigError
from vidgen.interop import checkpoint, diffusers

FORMATS = ("diffusers",)


@dataclasses.dataclass(frozen=True)
class Result:
    """What was written.

    output: the directory.
    name: the class of diffusers, or the kind of weights directory.
    parameters: how many numbers.
    dtype: in the other project's files, such as "bfloat16", or "bfloat16 (150 tensors), float32 (44)".
    gib: of the arrays in `output`.
    digest: of the weights directory that was written or read.
    """

    output: str
    name: str
    parameters: int
    dtype: str
    gib: float
    digest: str


def run(source: str, output: str, *, format: str = "diffusers") -> Result:
    """Reads `source`, a directory that diffusers' `save_pretrained` wrote, and makes the weights directory `output`.

    Arrays are float32 there, which holds bfloat16 and float16 exactly; `source.json` keeps the dtypes for an export.
    Raises ConfigError; `output` is then not there.
    """
    if format not in FORMATS:
        raise ConfigError(f"--format={format}: known are {', '.join(FORMATS)}")
    for directory in (source, os.path.join(source, "weights")):
        if os.path.exists(os.path.join(directory, weights.JSON)):
            raise ConfigError(
                f"{source}: {directory} has {weights.JSON}, so it is a weights directory of vidgen already; use it as "
                "it is"
            )
    with checkpoint.new_directory(output) as made:
        model = diffusers.read(source)
        kind, config = diffusers.CLASSES[model.name].kind, model.config.to_dict()
        digest = weights.digest(kind, config, model.flat)
        weights.save(made, kind, config, weights.nest(model.flat))
        diffusers.keep(made, model, digest)
    result = Result(
        output=output,
        name=model.name,
        parameters=sum(array.size for array in model.flat.values()),
        dtype=dtypes(model.dtypes),
        gib=sum(array.nbytes for array in model.flat.values()) / 2**30,
        digest=digest,
    )
    print(
        f"{source}: {result.name}, {result.parameters:,} parameters in {result.dtype}\n"
        f"{output}: weights of kind {kind}, float32, {result.gib:.3g} GiB, digest {digest}",
        flush=True,
    )
    return result


def dtypes(found: Mapping[str, str]) -> str:
    """{tensor: dtype} in words, the most frequent dtype first."""
    counts = collections.Counter(found.values()).most_common()
    if len(counts) == 1:
        return counts[0][0]
    (first, n), *rest = counts
    return ", ".join([f"{first} ({n} tensors)", *(f"{dtype} ({count})" for dtype, count in rest)])
