"""`vidgen export`: weights of a run, or of a weights directory, as another project reads them."""

from __future__ import annotations

import os
import shutil

from vidgen import weights
from vidgen.config import ConfigError
from vidgen.import_weights import Result, dtypes
from vidgen.interop import checkpoint, diffusers

FORMATS = ("diffusers", "vidgen")


def run(source: str, output: str, *, format: str = "diffusers") -> Result:
    """Writes the weights of `source` to the new directory `output`.

    Args:
      source: a weights directory, or a workdir that has one in `weights/` (its moving average).
      output: must not be there, or be empty.
      format: "diffusers": `config.json` and `diffusion_pytorch_model.safetensors`, for `from_pretrained`; what was
        imported comes out bit for bit, all else in float32. "vidgen": a copy of the weights directory.

    Raises ConfigError; `output` is then not there.
    """
    if format not in FORMATS:
        raise ConfigError(f"--format={format}: known are {', '.join(FORMATS)}")
    directory = weights.find(source)
    with checkpoint.new_directory(output) as made:
        found = weights.load(directory)
        flat = weights.flatten(found.params)
        if format == "diffusers":
            model = diffusers.write(made, found, directory)
            name, stored = model.name, model.dtypes
        else:
            name, stored = found.kind, {path: str(array.dtype) for path, array in flat.items()}
            for file in (weights.JSON, weights.TENSORS, diffusers.SOURCE):
                if os.path.exists(path := os.path.join(directory, file)):
                    shutil.copyfile(path, os.path.join(made, file))
        size = sum(os.path.getsize(os.path.join(made, file)) for file in os.listdir(made) if file.endswith("tensors"))
    result = Result(
        output=output,
        name=name,
        parameters=sum(array.size for array in flat.values()),
        dtype=dtypes(stored),
        gib=size / 2**30,
        digest=found.digest,
    )
    print(
        f"{directory}: weights of kind {found.kind}, digest {found.digest}\n"
        f"{output}: {name}, {result.parameters:,} parameters in {result.dtype}, {result.gib:.3g} GiB",
        flush=True,
    )
    return result
