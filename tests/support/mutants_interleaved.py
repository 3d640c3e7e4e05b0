"""Interleaved heads that are wrong in one way: subclasses of the plug."""

import torch

from mha_book.variants.interleaved_heads import InterleavedHeads
from support.mutants import Mutant, named


class _Strict(InterleavedHeads):
    def _options(self, call):
        made = super()._options(call)
        parts, queries = self.mix_k.shape[1], self.mix_q.shape[1]
        keys = torch.arange(call.k.shape[2] * parts)
        turns = torch.arange(queries).repeat(call.q.shape[1])[:, None, None]
        places = torch.arange(call.k.shape[2] - call.q.shape[2], call.k.shape[2])[:, None]
        strict = keys <= places * parts + turns
        return made | dict(mask=strict if made["mask"] is None else made["mask"] & strict)


class _InBlocks(InterleavedHeads):
    def _options(self, call):
        made, parts, m = super()._options(call), self.mix_k.shape[1], call.k.shape[2]
        for name in ("mask", "bias"):
            extra = made[name]
            if extra is not None and extra.shape[-1] == m * parts:
                made[name] = extra.unflatten(-1, (m, parts)).transpose(-1, -2).flatten(-2)
        return made


class _PseudoPlaces(InterleavedHeads):
    def _options(self, call):
        made, parts = super()._options(call), self.mix_k.shape[1]
        if call.sides == (None, None):
            return made
        return (
            made | dict(mask=call.mask, bias=call.bias, is_causal=True)
            if parts == 1
            else made | dict(mask=None, is_causal=True)
        )


class _Own(InterleavedHeads):
    def values(self, v):
        return v.repeat_interleave(self.mix_v.shape[1], 2)


class _Mean(InterleavedHeads):
    def collapsed(self, out):
        return out.unflatten(1, (self.mix_q.shape[0], -1)).mean(2)


class _OtherQueries(InterleavedHeads):
    def queries(self, q):
        h, parts = self.mix_q.shape[:2]
        return super().queries(q).unflatten(1, (h, parts)).transpose(1, 2).flatten(1, 2)


WRONG = named(
    Mutant("strict", "A pseudo-query sees the pseudo-keys of its own token only up to its own number.", _Strict),
    Mutant("in blocks", "Masks and biases are repeated as if pseudo-keys stood in blocks of all tokens.", _InBlocks),
    Mutant("pseudo-places", "Causality and windows are left to a kernel that counts pseudo-keys.", _PseudoPlaces),
    Mutant("own values", "Pseudo-values are copies of the head's own values.", _Own),
    Mutant("plain mean", "Pseudo-outputs are averaged, whatever was learned.", _Mean),
    Mutant("other queries", "Pseudo-queries stand in the order of their numbers, not of their heads.", _OtherQueries),
)
