"""Ways to mix heads, each as a layer in place of the plain one: what `mha-book mixing` compares."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..heads.layer import MultiHeadAttention
from ..variants.collaborative_heads import CollaborativeHeads
from ..variants.composed_heads import ComposedHeads, MultiTokenAttention
from ..variants.differential import DifferentialAttention, DifferentialHeads, SigmoidAttention
from ..variants.interleaved_heads import InterleavedHeads
from ..variants.mixed_projections import fold_mixing, knock_heads_, mix_kv_heads_
from ..variants.talking_heads import TalkingHeads

Sizes = dict[str, Any]  # embed_dim, num_heads, head_dim, out_dim, and perhaps position
PLAIN, PLACED, TWICE = "plain", "plain, learned places", "plain, twice the query heads"


@dataclass(frozen=True)
class Kind:
    "One way to mix heads, and what the chapter proves of it."

    place: str  # where heads meet
    folds: bool  # whether it can be taken into the matrices of a plain layer afterwards
    kernel: str  # which fused kernel computes it
    make: Callable[[Sizes, int], nn.Module]  # sizes and the layer's index -> a layer that begins as its paper says
    base: str = PLAIN  # what it is compared with: keys that all heads share cannot be turned head by head

    def served(self, layer: nn.Module) -> nn.Module:
        "The layer as it is used after training."
        return fold_mixing(layer) if self.folds and not isinstance(layer.attend, nn.Module) else layer


def _plain(sizes: Sizes, **plugs: Any) -> MultiHeadAttention:
    return MultiHeadAttention(**sizes, bias=False, **plugs)


def _attend(plug: Callable[[Sizes, int], nn.Module]) -> Callable[[Sizes, int], nn.Module]:
    "A kind that is a plug for `attend`."
    return lambda sizes, index: _plain(sizes, attend=plug(sizes, index))


def _talking(**which: bool) -> Callable[[Sizes, int], nn.Module]:
    return _attend(lambda sizes, index: TalkingHeads(sizes["num_heads"], **which))


def _collaborative(sizes: Sizes, index: int) -> nn.Module:
    "Keys as wide as all plain heads together."
    e, h, d, out = (sizes[name] for name in ("embed_dim", "num_heads", "head_dim", "out_dim"))
    return CollaborativeHeads(e, h, h * d, value_dim=d, out_dim=out, bias=False)


def _twice(sizes: Sizes, index: int) -> nn.Module:
    "Two query heads for each key-value head, as a layer of pairs has, and nothing is subtracted."
    h = sizes["num_heads"]
    return MultiHeadAttention(**sizes | dict(num_heads=2 * h), num_kv_heads=h, bias=False)


class _Pairs(nn.Module):
    "Of 2h heads side by side: head 2i, and a factor for each pair times head 2i + 1, taken off or added."

    def __init__(self, num_heads: int, sign: int):
        super().__init__()
        self.logits, self.sign = nn.Parameter(torch.zeros(num_heads)), sign

    def forward(self, heads: Tensor, x: Tensor) -> Tensor:
        first, second = heads.unflatten(-1, (len(self.logits), 2, -1)).unbind(-2)
        return (first + self.sign * torch.sigmoid(self.logits)[:, None] * second).flatten(-2)


def _pairs(sign: int) -> Callable[[Sizes, int], nn.Module]:
    "A layer of pairs whose factors are the same for all tokens."

    def make(sizes: Sizes, index: int) -> nn.Module:
        layer = DifferentialHeads(**sizes, bias=False)
        layer.finish = _Pairs(sizes["num_heads"], sign)
        return layer

    return make


KINDS = {
    PLAIN: Kind("nowhere", True, "any", lambda sizes, index: _plain(sizes)),
    PLACED: Kind("nowhere", True, "any", lambda sizes, index: _plain(sizes), PLACED),
    TWICE: Kind("nowhere", True, "any", _twice),
    "knocking heads": Kind("q, k, v", True, "any", lambda sizes, index: knock_heads_(_plain(sizes))),
    "keys and values mixed": Kind("k, v", True, "any", lambda sizes, index: mix_kv_heads_(_plain(sizes))),
    "interleaved heads": Kind("q, k, v", False, "any", _attend(lambda s, index: InterleavedHeads(s["num_heads"], 2))),
    "collaborative heads": Kind("q, k", False, "wide keys", _collaborative, PLACED),
    "talking heads, logits": Kind("logits", False, "wide keys", _talking(weights=False)),
    "talking heads, weights": Kind("weights", False, "wide values", _talking(logits=False)),
    "talking heads": Kind("logits and weights", False, "wide heads", _talking()),
    "multi-token attention": Kind(
        "logits and weights", False, "none", _attend(lambda s, _: MultiTokenAttention(s["num_heads"]))
    ),
    "composed heads": Kind(
        "logits and weights", False, "none", lambda sizes, index: ComposedHeads(**sizes, bias=False)
    ),
    "differential, normed": Kind(
        "weights", False, "wide values", _attend(lambda s, i: DifferentialAttention(s["num_heads"], s["head_dim"], i))
    ),
    "differential, paired": Kind("outputs", False, "any", lambda sizes, index: DifferentialHeads(**sizes, bias=False)),
    "sigmoid weights": Kind("nowhere", False, "none", _attend(lambda sizes, index: SigmoidAttention())),
}
# pairs taken apart: with a factor for all tokens they are plain layers of twice the heads, whose output matrix is tied
CONTROLS = {
    "pairs, one factor for all tokens": Kind("outputs", True, "any", _pairs(-1)),
    "pairs, added": Kind("outputs", True, "any", _pairs(1)),
}
