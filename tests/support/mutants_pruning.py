"""Wrong ways to prune a layer: layer, heads that go -> layer."""

import torch

from mha_book.heads.head_counts import with_heads
from mha_book.heads.weight_split import HeadLayout
from mha_book.variants.prune_heads import prune_heads
from support.mutants import Mutant, named


def _taking(order):
    "Pruned in size, with other heads in place of those that stay; `order` says which, for a part."

    def apply(layer, gone):
        layout = prune_heads(layer, gone).layout
        h, g, _ = layer.layout
        kept = [i for i in range(h) if i not in gone]
        kv = sorted({i // (h // g) for i in kept})
        right = dict(q=kept, o=kept, k=kv, v=kv)
        return with_heads(layer, layout, lambda part, rows: rows[order(part, right, layout)])

    return apply


@torch.no_grad()
def _louder(layer, gone):
    new = prune_heads(layer, gone)
    new.out_proj.weight *= layer.layout.num_heads / new.layout.num_heads
    return new


def _masked(layer, gone):
    h, g, d = layer.layout
    index = torch.tensor([*gone], dtype=int)
    return with_heads(
        layer,
        HeadLayout(h, g, d, layer.layout.value_dim),
        lambda part, rows: rows.index_fill(0, index, 0) if part == "o" else rows,
    )


def _first(part, right, layout):
    return [*range(layout.count(part))]


PRUNINGS = named(
    Mutant("the last ones go", "As many heads go, but the last ones.", _taking(_first)),
    Mutant(
        "columns of others",
        "Rows are cut as they should be, and of out_proj the last columns.",
        _taking(lambda part, right, layout: _first(part, right, layout) if part == "o" else right[part]),
    ),
    Mutant(
        "keys of others",
        "Queries, values and columns are right, and the keys are those of the first groups.",
        _taking(lambda part, right, layout: _first(part, right, layout) if part == "k" else right[part]),
    ),
    Mutant("as dropout", "What stays is made larger, as dropout does.", _louder),
    Mutant("only masked", "The columns are 0, and everything is still there.", _masked),
)
