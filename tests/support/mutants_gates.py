"""Wrong gates: classes in place of `HeadGates`; and wrong ways to take gates out of a layer: layer -> layer."""

import copy

import torch

from mha_book.heads.head_counts import with_heads
from mha_book.variants.head_gates import HeadGates
from mha_book.variants.mixed_precision import fill_socket
from mha_book.variants.prune_heads import prune_heads
from support.mutants import Mutant, named


class _ForEachBatch(HeadGates):
    def _drawn(self, batch_size):
        return super()._drawn(1).expand(batch_size, -1, -1)


class _NeverStretched(HeadGates):
    def _drawn(self, batch_size):
        log_alpha = self._wide()
        u = torch.rand(batch_size, 1, len(log_alpha), device=log_alpha.device, dtype=log_alpha.dtype)
        return torch.sigmoid((u.clamp(1e-6, 1 - 1e-6).logit() + log_alpha) / (2 / 3))


class _Behind(HeadGates):
    def forward(self, heads, x):
        plug, self.finish = self.finish, None
        try:
            return super().forward(heads if plug is None else plug(heads, x), x)
        finally:
            self.finish = plug


class _BySigmoid(HeadGates):
    def expected_open(self):
        return torch.sigmoid(self._wide()).sum()


class _AlwaysDrawn(HeadGates):
    def forward(self, heads, x):
        before, self.training = self.training, True
        try:
            return super().forward(heads, x)
        finally:
            self.training = before


class _ByChannel(HeadGates):
    def forward(self, heads, x):
        gates = self._drawn(len(heads)) if self.training else self.gates()
        gated = heads.unflatten(-1, (-1, len(self.log_alpha))) * gates[..., None, :].to(heads.dtype)
        return gated.flatten(-2) if self.finish is None else self.finish(gated.flatten(-2), x)


class _InItsDtype(HeadGates):
    def _wide(self):
        return self.log_alpha


def _mutant(name, says, kind):
    return Mutant(name, says, lambda *sizes, **options: kind(*sizes, **options))


GATES = named(
    _mutant("for each batch", "All sequences of a batch get one set of gates.", _ForEachBatch),
    _mutant("never stretched", "A concrete gate without stretching is never 0 nor 1.", _NeverStretched),
    _mutant("behind the plug", "The layer's own finish sees heads that are not gated.", _Behind),
    _mutant("price by the sigmoid", "The price forgets the stretch and the temperature.", _BySigmoid),
    _mutant("always drawn", "Gates are drawn in eval mode, too.", _AlwaysDrawn),
    _mutant("by channel", "Gates stand at every h-th number, as if heads were interleaved.", _ByChannel),
    _mutant("narrow", "The arithmetic of gates is done in the layer's dtype.", _InItsDtype),
)


def _ungated(layer):
    plain = copy.deepcopy(layer)
    fill_socket(plain, "finish", plain.finish.finish)
    return plain


def _rounded(layer):
    return prune_heads(_ungated(layer), layer.finish.closed())


def _folded(layer, gates):
    scaled = with_heads(
        _ungated(layer),
        layer.layout,
        lambda part, rows: rows * gates[:, None, None].to(rows) if part == "o" else rows,
    )
    return prune_heads(scaled, layer.finish.closed())


FOLDS = named(
    Mutant("half open is open", "Gates between 0 and 1 are taken for 1.", _rounded),
    Mutant(
        "by the chance",
        "Columns are multiplied by the chance that a gate is open.",
        lambda layer: _folded(layer, torch.sigmoid(layer.finish.log_alpha.detach() + 1.5986)),
    ),
    Mutant(
        "never stretched",
        "Columns are multiplied by the sigmoid of log_alpha, without stretching.",
        lambda layer: _folded(layer, torch.sigmoid(layer.finish.log_alpha.detach())),
    ),
)
