"""What heads are worth, wrong in one way: (heads, scale, fill) -> heads; slopes -> scores; scores -> heads."""

import torch

from support.mutants import Mutant, named

SCALINGS = named(
    Mutant(
        "strided heads",
        "A head is taken for every h-th channel, not for a stripe.",
        lambda heads, scale, fill: (heads.unflatten(-1, (-1, scale.shape[-1])) * scale[..., None, :]).flatten(-2),
    ),
    Mutant(
        "no fill",
        "A head that is off gives 0, whatever it should give instead.",
        lambda heads, scale, fill: (heads.unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]).flatten(-2),
    ),
    Mutant(
        "fill is added",
        "What a head gives instead is added in full, also where the head is on.",
        lambda heads, scale, fill: (
            (heads.unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]).add(0 if fill is None else fill).flatten(-2)
        ),
    ),
)
# slopes: one h for each sequence of each batch, as a list of b h
OF_A_LOSS = named(
    Mutant(
        "signs kept", "Slopes of opposite sign cancel between batches.", lambda slopes: sum(s.sum(0) for s in slopes)
    ),
    Mutant(
        "sequence by sequence",
        "The size is taken of each sequence, though a batch has one loss.",
        lambda slopes: sum(s.abs().sum(0) for s in slopes),
    ),
)
OF_OUTPUTS = named(
    Mutant(
        "cross terms",
        "The slopes of all sequences are added before the square.",
        lambda slopes: sum(s.sum(0).square() for s in slopes),
    ),
    Mutant("no square", "The size of a slope, not its square.", lambda slopes: sum(s.abs().sum(0) for s in slopes)),
)


def _all_heads(scores):
    return sorted((worth, name, i) for name, score in scores.items() for i, worth in enumerate(score.tolist()))


def _named(chosen):
    found = {}
    for _, name, i in sorted(chosen, key=lambda one: one[2]):
        found[name] = (*found.get(name, ()), i)
    return found


CHOICES = named(
    Mutant(
        "nobody stays",
        "A layer may lose all its heads.",
        lambda scores, count, keep: _named(_all_heads(scores)[:count]),
    ),
    Mutant(
        "the best go",
        "The heads of most worth are taken out.",
        lambda scores, count, keep: _named(_all_heads(scores)[::-1][:count]),
    ),
    Mutant(
        "layers alike",
        "Every layer loses as many.",
        lambda scores, count, keep: {
            name: tuple(sorted(torch.argsort(score)[: count // len(scores)].tolist())) for name, score in scores.items()
        },
    ),
)
