"""LPIPS beside the authors' own implementation, on the same weights. Needs the extras [peers] and [perceptual]."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidgen.objectives import lpips as ours

torch = pytest.importorskip("torch")
PLAN = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


def plain_vgg16(params) -> torch.nn.Sequential:
    """VGG16's convolutional part, in the order of torchvision's `vgg16().features`."""
    layers, channels, number = [], 3, 0
    for width in PLAN:
        if width == "M":
            layers.append(torch.nn.MaxPool2d(2, 2))
            continue
        conv = torch.nn.Conv2d(channels, width, 3, padding=1)
        layer = params[f"conv_{number}"]
        with torch.no_grad():
            conv.weight.copy_(torch.from_numpy(np.array(layer["kernel"].transpose(3, 2, 0, 1))))
            conv.bias.copy_(torch.from_numpy(np.array(layer["bias"])))
        layers += [conv, torch.nn.ReLU(inplace=False)]
        channels, number = width, number + 1
    return torch.nn.Sequential(*layers)


@pytest.fixture(scope="module")
def params():
    if ours.perceptual.missing("lpips"):
        pytest.skip(ours.perceptual.missing("lpips"))
    return ours.load()


@pytest.fixture(scope="module")
def theirs(params):
    """`lpips.LPIPS(net="vgg")`, which wants torchvision for nothing but the layers of VGG16."""
    models = types.ModuleType("torchvision.models")
    models.vgg16 = lambda pretrained=True: types.SimpleNamespace(features=plain_vgg16(params))
    vision = types.ModuleType("torchvision")
    vision.models = models
    saved = {name: sys.modules.get(name) for name in ("torchvision", "torchvision.models")}
    sys.modules.update({"torchvision": vision, "torchvision.models": models})
    try:
        lpips = pytest.importorskip("lpips")
        return lpips.LPIPS(net="vgg", verbose=False)
    finally:
        for name, module in saved.items():
            sys.modules.pop(name) if module is None else sys.modules.__setitem__(name, module)


def test_the_heads_are_the_ones_that_the_authors_ship(theirs, params):
    for i in range(5):
        head = getattr(theirs, f"lin{i}").model[-1].weight.detach().numpy().reshape(-1)
        np.testing.assert_array_equal(params[f"head_{i}"], head)


@pytest.mark.parametrize("size", [(64, 64), (16, 16), (45, 71)])
def test_distance_and_gradient_are_the_authors(theirs, params, size):
    rng = np.random.default_rng(sum(size))
    a = np.cumsum(rng.normal(size=(3, *size, 3)), axis=2)
    a = (a / np.abs(a).max()).astype(np.float32)
    b = np.clip(a + 0.2 * rng.normal(size=a.shape), -1, 1).astype(np.float32)
    b[1] = a[1][::-1]  # a far pair

    def swap(x):
        return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))

    leaf = swap(a).requires_grad_()
    expected = theirs(leaf, swap(b)).reshape(-1)
    expected.sum().backward()
    distance = jax.jit(ours.lpips)
    value, vjp = jax.vjp(lambda x: distance(params, x, jnp.asarray(b)), jnp.asarray(a))
    expected = expected.detach().numpy()
    assert expected.min() > 0.05
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    gradient = leaf.grad.numpy().transpose(0, 2, 3, 1)
    (found,) = vjp(jnp.ones(3))
    assert np.abs(np.asarray(found) - gradient).max() < 1e-3 * np.abs(gradient).max()
