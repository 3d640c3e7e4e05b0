"""Wrong mixings: classes in place of `MixedHeads`; wrong folds: layer -> layer; and wrong mixed outputs."""

import copy

import torch
from torch import nn
from torch.nn.utils import parametrize

from mha_book.variants.mixed_projections import MixedHeads, fold_mixing, mix_output_heads
from support.mutants import Mutant, named


class _Transposed(MixedHeads):
    def _mixed(self, part, rows):
        if part not in self.parts:
            return rows
        heads, matrix = rows.reshape(*self.sizes[part], -1), getattr(self, f"{part}_mixing").to(rows.dtype)
        return (
            torch.tensordot(matrix, heads, ([0], [0])).reshape(rows.shape)
            if self.across == "heads"
            else (matrix.mT @ heads).reshape(rows.shape)
        )


class _EveryNthRow(MixedHeads):
    def _mixed(self, part, rows):
        count, width = self.sizes[part]
        turned = rows.reshape(width, count, -1).transpose(0, 1).reshape(rows.shape)
        mixed = super()._mixed(part, turned)
        return mixed.reshape(count, width, -1).transpose(0, 1).reshape(rows.shape)


class _WithoutBiases(MixedHeads):
    def forward(self, rows):
        return rows if rows.dim() == 1 else super().forward(rows)


class _OfOneHead(MixedHeads):
    def _mixed(self, part, rows):
        if part not in self.parts or self.across == "heads":
            return super()._mixed(part, rows)
        width = self.sizes[part][1]
        return torch.cat([super()._mixed(part, rows)[:width], rows[width:]])


class _UnderAutocast(MixedHeads):
    def forward(self, rows):
        blocks = rows.split([count * width for count, width in self.sizes.values()])
        return torch.cat([*map(self._mixed, self.sizes, blocks)]).to(rows.dtype)


class _FromNoise(MixedHeads):
    def reset_parameters(self):
        super().reset_parameters()
        with torch.no_grad():
            for matrix in self.parameters():
                matrix += 1e-6 * torch.randn_like(matrix)


MIXINGS = named(
    Mutant("transposed", "Multiplies by the transpose of each matrix.", _Transposed),
    Mutant("every n-th row", "Takes the rows of a head from all over the part.", _EveryNthRow),
    Mutant("without biases", "Mixes the weights and leaves the biases as they are.", _WithoutBiases),
    Mutant("of one head", "Multiplies the rows of the first head alone.", _OfOneHead),
    Mutant("under autocast", "Mixes the weights in bfloat16 where autocast is on.", _UnderAutocast),
    Mutant("from noise", "Begins a little beside the identity.", _FromNoise),
)


def _by_torch(layer):
    new = copy.deepcopy(layer)
    for module in [*new.modules()]:
        for kind in ("weight", "bias"):
            if parametrize.is_parametrized(module, kind):
                parametrize.remove_parametrizations(module, kind)
    return new


def _unmixed(layer):
    new = fold_mixing(layer)
    for name in layer.parts():
        old = getattr(layer, name)
        if parametrize.is_parametrized(old):
            with torch.no_grad():
                getattr(new, name).weight.copy_(old.parametrizations.weight.original)
    return new


def _thawed(layer):
    return fold_mixing(layer).requires_grad_()


def _shared(layer):
    new = fold_mixing(layer)
    new.out_proj = layer.out_proj
    return new


FOLDS = named(
    Mutant("by torch", "Takes the parametrizations off a copy, which breaks the original.", _by_torch),
    Mutant("unmixed", "Leaves the rows that were trained, and forgets the mixing.", _unmixed),
    Mutant("thawed", "Makes frozen weights ones that are trained.", _thawed),
    Mutant("shared output", "Shares its output projection with the original.", _shared),
)


def _outputs_transposed(layer, mixing):
    return mix_output_heads(layer, mixing.mT)


def _rows_of_the_output(layer, mixing):
    new, h = copy.deepcopy(layer), layer.layout.num_heads
    columns = new.out_proj.weight.data.unflatten(1, (-1, h))
    new.out_proj.weight = nn.Parameter(torch.einsum("ij,ewi->ewj", mixing, columns).flatten(1))
    return new


OUTPUTS = named(
    Mutant("outputs transposed", "Mixes the outputs with the transposed matrix.", _outputs_transposed),
    Mutant("interleaved columns", "Takes the columns of a head from all over the matrix.", _rows_of_the_output),
)
