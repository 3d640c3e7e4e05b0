"""Named mutants: wrong on purpose, so that a check can show that it notices. Each is a behaviour, none is a text.

A mutant says in one sentence what is wrong with it, and `apply` makes it: what goes in and comes out stands with each
group. `source` is where the bug was really seen, if it was.
"""

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from mha_book.heads.layer import MultiHeadAttention
from mha_book.kernels.backends import attention


@dataclass(frozen=True)
class Mutant:
    "Something that is wrong in one way."

    name: str
    says: str  # what is wrong, in one sentence
    apply: Callable  # makes it
    source: str = ""  # a link, where it is a real bug


def named(*mutants: Mutant) -> dict[str, Mutant]:
    "By their names."
    found = {mutant.name: mutant for mutant in mutants}
    assert len(found) == len(mutants)
    return found


# --- the layer: layer -> a layer whose queries, keys and values are others ---


def _with_rows(order):
    "A layer whose rows stand in another order; `order` gets h, g, d and the numbers of the rows."

    def apply(layer):
        wrong = copy.deepcopy(layer)
        rows = torch.arange(wrong.in_proj.out_features)
        moved = order(*layer.layout, rows)
        with torch.no_grad():
            wrong.in_proj.weight.copy_(layer.in_proj.weight[moved])
            wrong.in_proj.bias.copy_(layer.in_proj.bias[moved])
        return wrong

    return apply


def _tokens_for_heads(h, g, d, rows):
    "Rows of q as if the width came before the heads."
    return torch.cat([rows[: h * d].view(h, d).T.flatten(), rows[h * d :]])


def _values_for_keys(h, g, d, rows):
    q, k, v = rows.split((h * d, g * d, g * d))
    return torch.cat([q, v, k])


def _one_row_late(h, g, d, rows):
    return rows.roll(-1)


LAYER = named(
    Mutant(
        "width before heads", "A head takes every h-th row instead of d rows in a row.", _with_rows(_tokens_for_heads)
    ),
    Mutant(
        "values for keys", "The stacked matrix is read as q, v, k instead of q, k, v.", _with_rows(_values_for_keys)
    ),
    Mutant("one row late", "Every head's rows begin one row too far down.", _with_rows(_one_row_late)),
)


# --- other inputs: layer -> a layer of another class that shares its projections ---


class _ReadsWeights(MultiHeadAttention):
    def qkv(self, x, context=None, *, value=None, offset=0):
        if context is None:
            return super().qkv(x, value=value, offset=offset)
        keys, proj, (h, g, d) = context if value is None else value, self.in_proj, self.layout
        both = (F.linear(t, proj.weight, proj.bias).unflatten(-1, (h + 2 * g, d)) for t in (x, keys))
        q, kv = (t.transpose(1, 2) for t in both)
        return q[:, :h], *kv[:, h:].split(g, 1)


class _ForgetsValues(MultiHeadAttention):
    def qkv(self, x, context=None, *, value=None, offset=0):
        return super().qkv(x, context, offset=offset)


def _as_class(kind):
    def apply(layer):
        wrong = copy.copy(layer)
        wrong.__class__ = kind
        return wrong

    return apply


INPUTS = named(
    Mutant("reads weights", "With a context the weight is read, the module not called.", _as_class(_ReadsWeights)),
    Mutant("forgets values", "Values are made of the input of the keys.", _as_class(_ForgetsValues)),
)


# --- the clip: (layer, factors) multiplies rows, in place, so that head i's logits are to shrink by factors[i] ---


def _tiled(layer, factors):
    h, _, d = layer.layout
    layer.in_proj.weight[: h * d].mul_(factors.repeat(d)[:, None])


def _each_in_turn(layer, factors):
    h, g, _ = layer.layout
    for i, factor in enumerate(factors.tolist()):
        for part, head in ("q", i), ("k", i // (h // g)):
            layer.in_proj.weight[layer.layout.rows(part, head)] *= factor**0.5


def _no_biases(layer, factors):
    h, _, d = layer.layout
    layer.in_proj.weight[: h * d].mul_(factors.repeat_interleave(d)[:, None])


CLIPS = named(
    Mutant("tiled", "Factors are laid over the rows h by h instead of d rows a head.", _tiled),
    Mutant("each in turn", "Shared keys are multiplied once for every query head that uses them.", _each_in_turn),
    Mutant("no biases", "Weights are multiplied, biases are left as they are.", _no_biases),
)


# --- grouped heads ---


def _tiled_heads(heads, copies):
    return heads.repeat(copies, *[1] * (heads.dim() - 1))


def _mixed_fold(q, k, v):
    r, g, n = q.shape[1] // k.shape[1], k.shape[1], q.shape[2]
    folded = attention(q.unflatten(1, (r, g)).transpose(1, 2).flatten(2, 3), k, v)
    return folded.unflatten(2, (r, n)).flatten(1, 2)


def _forgets(name):
    "(layer, turned layer): one parameter of the turned layer is the old one again."

    def apply(layer, turned):
        with torch.no_grad():
            turned.get_parameter(name).copy_(layer.get_parameter(name))
        return turned

    return apply


REPEATS = named(  # (heads, copies) -> more heads
    Mutant("tiled heads", "Key-value heads are laid out 0 1 2 0 1 2 instead of 0 0 1 1 2 2.", _tiled_heads)
)
FOLDS = named(  # (q, k, v) -> output
    Mutant(
        "fold by i mod g", "Query head i is folded under key-value head i mod g instead of i // (h / g).", _mixed_fold
    )
)
TURNS = named(
    *(
        Mutant(f"forgets {name}", f"Heads are turned, and {name} is not turned with them.", _forgets(name))
        for name in ("in_proj.weight", "in_proj.bias", "out_proj.weight")
    )
)


# --- the nine ways: (monkeypatch, module nine_ways, name of the way) swaps what this way calls ---

_FUSED = ["SDPA, causal flag", "SDPA, mask", "nn.MultiheadAttention, no weights"]
_TORCHS = ["nn.MultiheadAttention", "nn.MultiheadAttention, no weights"]


def _wrong_scale(patch, nine_ways, name):
    if name in _FUSED:
        kernel = F.scaled_dot_product_attention
        patch.setattr(F, "scaled_dot_product_attention", lambda *args, **more: kernel(*args, **more | dict(scale=1.0)))
    elif name == "FlexAttention":
        kernel = nine_ways.flex_attention
        patch.setattr(nine_ways, "flex_attention", lambda *args, **more: kernel(*args, **more, scale=1.0))
    elif name == "nn.MultiheadAttention":
        product = torch.baddbmm
        patch.setattr(torch, "baddbmm", lambda mask, q, k: product(mask, 2 * q, k))
    else:
        patch.setattr(nine_ways, "math", SimpleNamespace(sqrt=float, inf=math.inf))


def _wrong_mask(patch, nine_ways, name):
    if name == "SDPA, causal flag":
        kernel = F.scaled_dot_product_attention
        patch.setattr(F, "scaled_dot_product_attention", lambda *args, is_causal: kernel(*args))
    elif name == "FlexAttention":

        def blocks(n, device):
            return nine_ways.create_block_mask(lambda b, h, i, j: i + 1 >= j, None, None, n, n, device=device)

        patch.setattr(nine_ways, "_blocks", blocks)
    else:

        def one_too_many(n, m, device):
            return torch.ones(n, m, dtype=torch.bool, device=device).tril(1)

        patch.setattr(nine_ways, "causal_mask", one_too_many)


def _wrong_merge(patch, nine_ways, name):
    if name == "list of heads":
        join = torch.cat
        patch.setattr(torch, "cat", lambda parts, dim=0: join(parts[::-1], dim))
    elif name in _TORCHS:
        build = nn.MultiheadAttention.__init__

        def more_heads(self, *args, **more):
            build(self, *args, **more)
            self.num_heads, self.head_dim = 2 * self.num_heads, self.head_dim // 2

        patch.setattr(nn.MultiheadAttention, "__init__", more_heads)
    else:
        patch.setattr(nine_ways, "merge_heads", lambda x: x.reshape(len(x), x.shape[2], -1))


WAYS = named(
    Mutant("wrong scale", "Logits are divided by another number than the root of d.", _wrong_scale),
    Mutant("wrong mask", "Every query sees one key too many.", _wrong_mask),
    Mutant("wrong merge", "The heads are put together in another order.", _wrong_merge),
)


# --- device: plugs that make tensors on the default device, which is not that of the heads ---


def _table_here(q, k, *, offset):
    table = torch.arange(q.shape[2], dtype=q.dtype)[:, None]
    return q * table, k * table


def _mask_here(q, k, v, **options):
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


DEVICES = named(  # plugs: the first for `position`, the second for `attend`
    Mutant("position table", "A table of positions is made wherever tensors are made by default.", _table_here),
    Mutant("mask in a plug", "A mask is made wherever tensors are made by default.", _mask_here),
)

ALL = dict(
    itertools.chain.from_iterable(
        group.items() for group in (LAYER, INPUTS, CLIPS, REPEATS, FOLDS, TURNS, WAYS, DEVICES)
    )
)
