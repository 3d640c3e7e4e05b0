"""Layers and plugs that mix by token in one wrong way."""

import torch
import torch.nn.functional as F
from torch import nn

from mha_book.variants.composed_heads import ComposedHeads, MultiTokenAttention
from support.mutants import Mutant, named


class _Swapped(ComposedHeads):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        own = self.of_queries.forward
        self.of_queries.forward = lambda x: own(x).unflatten(-1, (2, -1)).flip(-2).flatten(-2)


class _OneMix(ComposedHeads):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        own = self.of_queries.forward
        self.of_queries.forward = lambda x: own(x).mean(2, keepdim=True).expand(-1, -1, x.shape[1], -1)


class _ByTheOtherEnd(ComposedHeads):
    def _see(self, x, context, value, mask, key_mask, cache):
        q, k, v, mask = super()._see(x, context, value, mask, key_mask, cache)
        own = self.of_keys(x if context is None else context).unflatten(1, (-1, k.shape[1])).transpose(1, 2)
        own = own.transpose(2, 3).flatten(3).to(k.dtype)
        return q, torch.cat([k[..., : self.layout.head_dim], own], -1) if cache is None else k, v, mask


class _Transposed(ComposedHeads):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        own = self.attend._compose
        self.attend._compose = lambda each, fixed, *tokens: own(each, fixed.T, *tokens)


LAYERS = named(
    Mutant("stages swapped", "What a token says of logits is done to weights, and the other way round.", _Swapped),
    Mutant("one mix", "All queries of a text are mixed by the mean of what their tokens say.", _OneMix),
    Mutant("groups interleaved", "A key's numbers are dealt to the heads as i % g, not i // (h / g).", _ByTheOtherEnd),
    Mutant("matrix transposed", "A head speaks where it should listen.", _Transposed),
)


class _NoZeros(MultiTokenAttention):
    def _convolve(self, logits, call):
        h, rows, keys = self.kernel.shape
        padded = F.pad(logits, (keys // 2, keys // 2, rows - 1, 0))
        return F.conv2d(padded, self.kernel.to(logits.dtype).flip(1)[:, None], groups=h)


class _OwnRowsOnly(MultiTokenAttention):
    def _convolve(self, logits, call):
        mask = call.all_masks
        return _NoZeros._convolve(self, logits if mask is None else logits.masked_fill(~mask, 0.0), call)


class _Backwards(MultiTokenAttention):
    def _convolve(self, logits, call):
        turned = nn.Parameter(self.kernel.flip(1))
        own, self.kernel = self.kernel, turned
        try:
            return super()._convolve(logits, call)
        finally:
            self.kernel = own


class _Convolution(MultiTokenAttention):
    def _convolve(self, logits, call):
        own, self.kernel = self.kernel, nn.Parameter(self.kernel.flip(2))
        try:
            return super()._convolve(logits, call)
        finally:
            self.kernel = own


PLUGS = named(
    Mutant("no zeros", "Masked logits enter the kernel as they are, so the future comes in.", _NoZeros),
    Mutant("own rows only", "What another query sees and this one does not comes in by the row above.", _OwnRowsOnly),
    Mutant("rows backwards", "The kernel's first row is for the query that is farthest back.", _Backwards),
    Mutant("a true convolution", "The kernel is turned along the keys.", _Convolution),
)
