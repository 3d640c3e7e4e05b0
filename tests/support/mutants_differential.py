"""Wrong ways to subtract heads, and to weigh without a sum: classes in place of those of the package."""

import math

import torch
from torch.nn import functional as F

from mha_book.heads.single_head import repeat_groups
from mha_book.kernels.backends import call_logits, checked_call
from mha_book.variants.differential import DifferentialAttention, SigmoidAttention, SubtractHeads
from support.mutants import Mutant, named


class _Neighbours(DifferentialAttention):
    def forward(self, q, k, v, **options):
        wide = self._on_wide_values(q, k, v, options)
        mixed = wide[:, 0::2] - self.factor() * wide[:, 1::2]
        mixed = (1 - self.lambda_init) * F.rms_norm(mixed, mixed.shape[-1:], eps=self.eps)
        return mixed.unflatten(-1, (2, -1)).transpose(2, 3).flatten(1, 2)


class _OwnValues(DifferentialAttention):
    def _on_wide_values(self, q, k, v, options):
        own = self.attend(q, k, v, **options)
        return torch.cat([own, own], -1)


class _NormBefore(DifferentialAttention):
    def forward(self, q, k, v, **options):
        wide = self._on_wide_values(q, k, v, options)
        first, second = F.rms_norm(wide, wide.shape[-1:], eps=self.eps).chunk(2, dim=1)
        mixed = (1 - self.lambda_init) * (first - self.factor() * second)
        return mixed.unflatten(-1, (2, -1)).transpose(2, 3).flatten(1, 2)


class _HalvesApart(DifferentialAttention):
    def forward(self, q, k, v, **options):
        right = super().forward(q, k, v, **options)
        return torch.cat([right[:, 0::2], right[:, 1::2]], 1)


class _NoStart(DifferentialAttention):
    def factor(self):
        return super().factor() - self.lambda_init


class _Unscaled(DifferentialAttention):
    def forward(self, q, k, v, **options):
        return super().forward(q, k, v, **options) / (1 - self.lambda_init)


PAIRS = named(
    Mutant("neighbours", "Each head is paired with its neighbour, and not with that of the other half.", _Neighbours),
    Mutant("own values", "Both heads of a pair read the values of their own group.", _OwnValues),
    Mutant("norm before", "Each map's output is normed before the subtraction.", _NormBefore),
    Mutant("halves apart", "The halves of a pair's output are put h/2 heads apart.", _HalvesApart),
    Mutant("no start", "The factor begins at 0, without the number of the layer.", _NoStart),
    Mutant("unscaled", "The factor 1 - lambda_init is left out.", _Unscaled),
)


class _ByHalves(SubtractHeads):
    def forward(self, heads, x):
        first, second = heads.chunk(2, dim=-1)
        factors = self.factors(x)
        first, second = (t.unflatten(-1, (factors.shape[-1], -1)) for t in (first, second))
        return (first - factors[..., None] * second).flatten(-2)


class _Added(SubtractHeads):
    def factors(self, x):
        return -super().factors(x)


class _NoSigmoid(SubtractHeads):
    def factors(self, x):
        return self.lambda_proj(x)


class _Shared(SubtractHeads):
    def factors(self, x):
        return super().factors(x).mean(1, keepdim=True).expand(-1, x.shape[1], -1)


class _FinishFirst(SubtractHeads):
    def forward(self, heads, x):
        plug, self.finish = self.finish, None
        try:
            return super().forward(heads if plug is None else plug(heads, x), x)
        finally:
            self.finish = plug


SUBTRACTIONS = named(
    Mutant("by halves", "The first half of the heads minus the second: heads of other groups.", _ByHalves),
    Mutant("added", "The second head is added.", _Added),
    Mutant("no sigmoid", "The factor is the logit itself.", _NoSigmoid),
    Mutant("shared", "All tokens of a sequence share one factor.", _Shared),
    Mutant("finish first", "The plug that comes next is given both heads of each pair.", _FinishFirst),
)


class _Sigmoid(SigmoidAttention):
    def shift(self, logits):
        seen = (logits != -math.inf).sum(-1, keepdim=True).clamp(min=1)
        return logits - seen.to(logits.dtype).log() if self.bias is None else logits + self.bias

    def weights(self, logits, mask):
        return torch.sigmoid(self.shift(logits))

    def forward(self, q, k, v, **options):
        call = checked_call(q, k, v, window=self.window, scale=self.scale, **options)
        weights = self.weights(call_logits(call), call.all_masks)
        return weights @ repeat_groups(v, q.shape[1])


class _OfAllKeys(_Sigmoid):
    def shift(self, logits):
        return logits - math.log(logits.shape[-1]) if self.bias is None else logits + self.bias


class _Normed(_Sigmoid):
    def weights(self, logits, mask):
        weights = super().weights(logits, mask)
        return weights / weights.sum(-1, keepdim=True).clamp(min=1e-9)


class _HiddenByZero(_Sigmoid):
    def weights(self, logits, mask):
        hidden = logits == -math.inf
        return torch.sigmoid(self.shift(logits).masked_fill(hidden, 0.0))


class _Divided(_Sigmoid):
    def weights(self, logits, mask):
        seen = (logits != -math.inf).sum(-1, keepdim=True).clamp(min=1)
        return torch.sigmoid(logits) / seen if self.bias is None else torch.sigmoid(logits + self.bias)


class _NoBias(_Sigmoid):
    def shift(self, logits):
        return logits if self.bias is None else super().shift(logits)


SIGMOIDS = named(
    Mutant("of all keys", "The bias counts hidden keys as well.", _OfAllKeys),
    Mutant("normed", "The weights of a query are divided by their sum.", _Normed),
    Mutant("hidden by zero", "A hidden key has the logit 0, and the weight 1/2.", _HiddenByZero),
    Mutant("divided", "The sigmoid is divided by the number of keys, which is no bias.", _Divided),
    Mutant("no bias", "There is no bias unless one is given.", _NoBias),
)
