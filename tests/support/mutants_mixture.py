"""Mixtures of heads that are wrong in one way: subclasses of the plug, and forward passes that skip."""

import torch
import torch.nn.functional as F

from mha_book.variants.mixture_of_heads import MixtureOfHeads, Routes, skip_heads
from support.mutants import Mutant, named


class _OverAll(MixtureOfHeads):
    def route(self, x):
        _, chosen, scores = super().route(x)
        k = self.num_active - self.num_shared
        weights = F.pad(k * scores[..., self.num_shared :], (self.num_shared, 0), value=1.0)
        return Routes(weights * chosen, chosen, scores)


class _LastShared(MixtureOfHeads):
    def route(self, x):
        return Routes(*(part.roll(-self.num_shared, -1) for part in super().route(x)))


class _Unscaled(MixtureOfHeads):
    def route(self, x):
        weights, chosen, scores = super().route(x)
        return Routes(weights / (self.num_active - self.num_shared), chosen, scores)


class _OneForAll(MixtureOfHeads):
    def route(self, x):
        return Routes(*(part.expand(*x.shape[:2], -1) for part in super().route(x.mean((0, 1), keepdim=True))))


class _HeadsChoose(MixtureOfHeads):
    def route(self, x):
        _, chosen, scores = super().route(x)
        flat = scores.flatten(0, 1)
        count = round(len(flat) * (self.num_active - self.num_shared) / (self.num_heads - self.num_shared))
        best = flat.argsort(dim=0, descending=True, stable=True)[:count]
        chosen = torch.zeros_like(flat, dtype=torch.bool).scatter(0, best, True).view_as(chosen)
        chosen[..., : self.num_shared] = True
        return Routes(chosen.to(scores.dtype), chosen, scores)


class _FromTheRight(MixtureOfHeads):
    def route(self, x):
        s, own = self.num_shared, self.router.weight
        turned = MixtureOfHeads(own.shape[1], self.num_heads, self.num_active, num_shared=s, dtype=own.dtype)
        turned.router.load_state_dict({name: p.flip(0) for name, p in self.router.state_dict().items()})
        parts = MixtureOfHeads.route(turned, x)
        return Routes(*(torch.cat([part[..., :s], part[..., s:].flip(-1)], -1) for part in parts))


ROUTERS = named(
    Mutant("softmax over all", "The weights are those of a softmax over all routed heads, chosen or not.", _OverAll),
    Mutant("last heads shared", "The heads that every token takes are the last, not the first.", _LastShared),
    Mutant("not scaled", "The weights of the routed heads sum to 1 instead of their number.", _Unscaled),
    Mutant("one choice for all", "All tokens take the heads that the mean token would.", _OneForAll),
    Mutant("heads choose", "Heads take their best tokens of the batch, not tokens their best heads.", _HeadsChoose),
    Mutant("ties from the right", "Of equal logits those of higher heads are taken.", _FromTheRight),
)


def _without_weights(layer, x, **options):
    plug, route = layer.finish, layer.finish.route

    def ones(x):
        _, chosen, scores = route(x)
        return Routes(chosen.to(x.dtype), chosen, scores)

    plug.route = ones
    try:
        return skip_heads(layer, x, **options)
    finally:
        del plug.route


def _no_padding(layer, x, key_mask=None, **options):
    return skip_heads(layer, x, **options)


def _start_aligned(layer, x, is_causal=False, mask=None, **options):
    if is_causal:
        late = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril(1)
        mask = late if mask is None else mask & late
    return skip_heads(layer, x, mask=mask, **options)


def _bias_for_each(layer, x, **options):
    y = skip_heads(layer, x, **options)
    return y + (layer.finish.num_active - 1) * layer.out_proj.bias


SKIPS = named(
    Mutant("without weights", "Each head that is chosen counts with weight 1.", _without_weights),
    Mutant("padding seen", "Keys that are padding are looked at.", _no_padding),
    Mutant("one key late", "A causal query sees the key after its own.", _start_aligned),
    Mutant("a bias for each head", "The bias of the output product is added once for each head.", _bias_for_each),
)
