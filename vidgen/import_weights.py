"""`vidgen import`: another project's weights as a weights directory, or a whole pipeline as a directory of them."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import os
from collections.abc import Mapping

from vidgen import weights
from vidgen.config import ConfigError
from vidgen.interop import checkpoint, diffusers, pipelines

FORMATS = ("diffusers",)


@dataclasses.dataclass(frozen=True)
class Result:
    """What was written.

    output: the directory.
    name: the class of diffusers, of a model or of a pipeline, or the kind of weights directory.
    parameters: how many numbers.
    dtype: in the other project's files, such as "bfloat16", or "bfloat16 (150 tensors), float32 (44)".
    gib: of the arrays in `output`.
    digest: of the weights directory that was written or read; of a pipeline, over those of its parts. Empty for an
      export of averaged weights that are in no weights directory.
    parts: {name: class} of a pipeline.
    """

    output: str
    name: str
    parameters: int
    dtype: str
    gib: float
    digest: str
    parts: dict[str, str] = dataclasses.field(default_factory=dict)


def run(source: str, output: str, *, format: str = "diffusers") -> Result:
    """Reads `source`, a directory that diffusers' or transformers' `save_pretrained` wrote, and makes `output`.

    Of a model that is a weights directory, its arrays in the dtypes of the files; of a whole pipeline
    (`model_index.json`) what `vidgen/interop/pipelines.py` says, which can be sampled from and fine-tuned. One array at
    a time is in memory. Raises ConfigError; `output` is then not there.
    """
    if format not in FORMATS:
        raise ConfigError(f"--format={format}: known are {', '.join(FORMATS)}")
    for directory in (source, os.path.join(source, "weights")):
        if os.path.exists(os.path.join(directory, weights.JSON)):
            raise ConfigError(
                f"{source}: {directory} has {weights.JSON}, so it is a weights directory of vidgen already; use it as "
                "it is"
            )
    if pipelines.is_imported(source):
        raise ConfigError(f"{source}: holds {pipelines.PIPELINE}, so it is imported already; use it as it is")
    result = _pipeline(source, output) if pipelines.is_pipeline(source) else _model(source, output)
    _print(source, result)
    return result


def _model(source: str, output: str) -> Result:
    checkpoint.check_new(output)  # before the work
    model = diffusers.read(source)
    with checkpoint.new_directory(output, model.arrays.nbytes) as made:
        digest = diffusers.store(model, made)
    arrays = model.arrays
    return Result(output, model.name, arrays.parameters, dtypes(model.dtypes), arrays.nbytes / 2**30, digest)


def _pipeline(source: str, output: str) -> Result:
    with checkpoint.new_directory(output, pipelines.size(source)) as made:
        parts = dict(pipelines.store(source, made, output))
    if reason := pipelines.describe(output).get("reason"):
        print(f"{output}: can be exported, and its parts used; it can't be sampled from: {reason}", flush=True)
    return of_parts(output, pipelines.describe(output)["index"].get("_class_name", "pipeline"), parts)


def of_parts(output: str, name: str, parts: Mapping[str, pipelines.Part]) -> Result:
    """The result for a whole pipeline."""
    for part, found in parts.items():
        what = f"{found.cls}, {found.nbytes / 2**30:.3g} GiB"
        if found.kind != pipelines.COPIED:
            what += f", {found.parameters:,} parameters in {dtypes(found.dtypes)}"
            what += f", digest {found.digest}" if found.digest else ", the averaged weights"
        else:
            what += ", copied as it is"
        print(f"  {part}: {what}", flush=True)
    digests = [part.digest for part in parts.values() if part.kind != pipelines.COPIED]
    return Result(
        output=output,
        name=name,
        parameters=sum(part.parameters for part in parts.values()),
        dtype=dtypes({f"{name}/{key}": dtype for name, part in parts.items() for key, dtype in part.dtypes.items()}),
        gib=sum(part.nbytes for part in parts.values()) / 2**30,
        digest=hashlib.sha256(" ".join(digests).encode()).hexdigest()[:16] if all(digests) else "",
        parts={name: part.cls for name, part in parts.items()},
    )


def _print(source: str, result: Result) -> None:
    print(
        f"{source}: {result.name}, {result.parameters:,} parameters in {result.dtype}\n"
        f"{result.output}: {result.gib:.3g} GiB, digest {result.digest}",
        flush=True,
    )


def dtypes(found: Mapping[str, str]) -> str:
    """{tensor: dtype} in words, the most frequent dtype first."""
    counts = collections.Counter(found.values()).most_common()
    if len(counts) < 2:
        return counts[0][0] if counts else "none"
    (first, n), *rest = counts
    return ", ".join([f"{first} ({n} tensors)", *(f"{dtype} ({count})" for dtype, count in rest)])
