"""What the backward pass finds in memory, what it computes again, and what waits in the host's memory: by name.

`config.model.remat` is a preset, or presets and single tensors one after the other: "attention, mlp_up=offload".
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from vidgen.config import ConfigError

# Per block, in the order in which they are made; sizes per token of width W, with an MLP of ratio r.
NAMES = {
    "residual": "W: what the block gets; always kept, here or offloaded",
    "attention_norm": "W: normed and modulated",
    "query": "W: before its norm, as key",
    "key": "W",
    "value": "W",
    "attention_out": "W: of the kernel, before the output product",
    "attention_lse": "one number a head, f32: with attention_out it spares blockwise its second run; splash keeps both "
    "as attention_out, dense and cudnn run again whatever is kept",
    "attention_project": "W: after the output product",
    "cross_query": "W",
    "cross_key": "W, of text tokens",
    "cross_value": "W, of text tokens",
    "cross_out": "W",
    "cross_lse": "one number a head, f32",
    "cross_project": "W",
    "mlp_up": "r W: before the activation",
    "mlp_down": "W",
}
ACTIONS = ("save", "recompute", "offload")

_ATTENTION = {"attention_out": "save", "attention_lse": "save"}
PRESETS: dict[str, dict[str, str]] = {
    # Nothing is computed again.
    "none": dict.fromkeys(NAMES, "save"),
    # Every block is computed again from its input: least memory, a third more FLOPs.
    "full": {},
    # All but self-attention, whose FLOPs grow with the square of the tokens, is computed again.
    "attention": _ATTENTION,
    # Results of matrix products are kept, so that next to none is computed again.
    "products": dict.fromkeys((n for n in NAMES if n not in ("residual", "attention_norm")), "save"),
    # Next to nothing stays on the device: block inputs and attention's results wait on the host.
    "offload": {"residual": "offload", "attention_out": "offload", "attention_lse": "save"},
}


def parse(text: str) -> dict[str, str]:
    """name → save, recompute or offload, of `config.model.remat`; raises ConfigError."""
    actions = dict.fromkeys(NAMES, "recompute")
    parts = list(filter(None, (part.strip() for part in text.split(","))))
    if "none" in parts and text != "none":
        raise ConfigError(f"config.model.remat={text!r}: none keeps all there is and stands alone; products is like it")
    for part in parts:
        name, equals, action = (x.strip() for x in part.partition("="))
        if not equals and name in PRESETS:
            actions |= PRESETS[name]
        elif equals and name in NAMES and action in ACTIONS:
            actions[name] = action
        else:
            known = NAMES if equals else PRESETS
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near and near[0] != name else ""
            raise ConfigError(
                f"config.model.remat={text!r}: {part!r} is neither a preset ({', '.join(PRESETS)}) nor NAME=ACTION "
                f"with a name of {', '.join(NAMES)} and an action of {', '.join(ACTIONS)}{hint}"
            )
    return actions


def saved(text: str) -> frozenset[str]:
    """The tensors that the backward pass does not compute again, kept or offloaded; raises ConfigError."""
    return frozenset(name for name, action in parse(text).items() if action != "recompute") | {"residual"}


def rematerialised(block: type[nn.Module], text: str, scanned: bool) -> type[nn.Module]:
    """The module under the policy of `config.model.remat`.

    `scanned`: whether it is the body of a loop, which by itself keeps the compiler from merging what is computed again
    with what was computed first.
    """
    return block if text == "none" else nn.remat(block, prevent_cse=not scanned, policy=policy(text))


def policy(text: str) -> Callable[..., Any] | None:
    """The policy for `jax.checkpoint`; None: compute all again. Gathered weights are never kept."""
    actions = parse(text)
    kept = [name for name, action in actions.items() if action == "save"]
    offloaded = [name for name, action in actions.items() if action == "offload"]
    if offloaded:
        return jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=kept,
            names_which_can_be_offloaded=offloaded,
            offload_src="device",
            offload_dst="pinned_host",
        )
    return jax.checkpoint_policies.save_only_these_names(*kept) if kept else None
