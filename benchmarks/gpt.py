"""A small GPT in plain torch, to be trained from scratch on the bytes of Python's standard library.

A model is its state dict, as in ``minilm``: names are those of GPT-2, matrices are (outputs, inputs), and bytes have
one embedding for input and output.
"""

import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

CONTEXT = 128
"""Bytes that a model sees at once."""

HEAD_WIDTH = 64
"""Width of an attention head, as in GPT-2."""

_BYTES = 256
_SPREAD = 0.02  # standard deviation of GPT-2's initial matrices


@dataclass(frozen=True, slots=True)
class Shape:
    """How large a model is: about ``12 * layers * width**2`` parameters."""

    layers: int
    width: int
    """A multiple of ``HEAD_WIDTH``."""


def initial(shape: Shape, seed: str) -> dict[str, Tensor]:
    """Return the float32 weights that training starts from, drawn from ``seed``."""
    draw = torch.Generator().manual_seed(int.from_bytes(seed.encode()) % (1 << 63))
    width = shape.width

    def matrix(outputs: int, inputs: int, spread: float = _SPREAD) -> Tensor:
        return spread * torch.randn(outputs, inputs, generator=draw)

    def norm(name: str) -> dict[str, Tensor]:
        return {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}

    weights = {"wte.weight": matrix(_BYTES, width), "wpe.weight": matrix(CONTEXT, width)}
    # What is added to the stream of a model is drawn smaller the more layers add to it.
    added = _SPREAD / (2 * shape.layers) ** 0.5
    for number in range(shape.layers):
        layer = f"h.{number}"
        weights |= norm(f"{layer}.ln_1") | norm(f"{layer}.ln_2")
        for name, outputs, inputs, spread in (
            ("attn.c_attn", 3 * width, width, _SPREAD),
            ("attn.c_proj", width, width, added),
            ("mlp.c_fc", 4 * width, width, _SPREAD),
            ("mlp.c_proj", width, 4 * width, added),
        ):
            weights[f"{layer}.{name}.weight"] = matrix(outputs, inputs, spread)
            weights[f"{layer}.{name}.bias"] = torch.zeros(outputs)
    return weights | norm("ln_f")


def loss(weights: Mapping[str, Tensor], text: Tensor) -> Tensor:
    """Return the mean cross-entropy, in nats, of each byte given those before it.

    Parameters
    ----------
    weights
        What :func:`initial` returned, or was made of it.
    text
        Bytes as int64, shape (sequences, n), 2 <= n <= ``CONTEXT`` + 1.
    """

    def linear(x: Tensor, name: str) -> Tensor:
        return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def normalized(x: Tensor, name: str) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    seen, wanted = text[:, :-1], text[:, 1:]
    x = functional.embedding(seen, weights["wte.weight"]) + weights["wpe.weight"][: seen.shape[1]]
    for number in range(layers(weights)):
        layer = f"h.{number}"
        query, key, value = (
            part.view(*x.shape[:2], -1, HEAD_WIDTH).transpose(1, 2)
            for part in linear(normalized(x, f"{layer}.ln_1"), f"{layer}.attn.c_attn").chunk(3, dim=-1)
        )
        heads = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + linear(heads.transpose(1, 2).flatten(2), f"{layer}.attn.c_proj")
        x = x + linear(
            functional.gelu(linear(normalized(x, f"{layer}.ln_2"), f"{layer}.mlp.c_fc")), f"{layer}.mlp.c_proj"
        )
    logits = functional.linear(normalized(x, "ln_f"), weights["wte.weight"])
    return functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())


def layers(weights: Mapping[str, Tensor]) -> int:
    """Return how many layers a model has."""
    return sum(name.endswith(".ln_1.weight") for name in weights)


@cache
def text() -> Tensor:
    """Return the source of Python's standard library as uint8: top-level modules in the order of their names."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(source.read_bytes() for source in sources)), dtype=torch.uint8)
