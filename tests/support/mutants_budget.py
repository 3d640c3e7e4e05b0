"""Models that give each input a level and get one thing wrong: AdaptiveHeads -> (*batch, levels) -> Budgeted."""

import torch

from mha_book.variants.head_budget import Budgeted


def _grouped(ways, batch, levels):
    "Outputs level by level, and which rows they are."
    rows = [(levels == i).nonzero()[:, 0] for i in range(len(ways.models))]
    parts = [ways.models[i](*(t[at] for t in batch)) for i, at in enumerate(rows)]
    return [torch.cat(same) for same in zip(*parts)], torch.cat(rows)


def _not_put_back(ways):
    "Rows stay in the order of their levels."

    def forward(*batch, levels):
        output, _ = _grouped(ways, batch, levels)
        return Budgeted(output, levels, ways.counts[levels])

    return forward


def _there_and_not_back(ways):
    "The order of the groups is applied once more, instead of its inverse."

    def forward(*batch, levels):
        output, rows = _grouped(ways, batch, levels)
        return Budgeted([x[rows] for x in output], levels, ways.counts[levels])

    return forward


def _largest_for_all(ways):
    "Everybody gets the level that most of the batch wants."

    def forward(*batch, levels):
        most = torch.bincount(levels).argmax()
        return Budgeted(ways.models[most](*batch), levels, ways.counts[levels])

    return forward


def _heads_that_went(ways):
    "Reports how many heads are off."

    def forward(*batch, levels):
        found = ways(*batch, levels=levels)
        return found._replace(num_heads=ways.counts.max() - found.num_heads)

    return forward


def _of_the_batch(ways):
    "Reports the mean over the batch."

    def forward(*batch, levels):
        found = ways(*batch, levels=levels)
        return found._replace(num_heads=torch.full_like(levels, int(found.num_heads.double().mean())))

    return forward


GROUPINGS = {
    make.__name__.strip("_"): make
    for make in (_not_put_back, _there_and_not_back, _largest_for_all, _heads_that_went, _of_the_batch)
}
