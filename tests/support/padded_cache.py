"""The least that keeps padding: a cache by the protocol, for tests of the layer and of positions."""

import torch


class PaddedCache:
    "Keeps all tokens of all calls, padding too, and which of them are real."

    def __init__(self, batch):
        self.seen, self.kept, self.pending = torch.zeros(batch, dtype=torch.int64), None, None

    def append(self, k, v, key_mask=None):
        real = torch.ones(len(k), k.shape[2], dtype=torch.bool) if key_mask is None else key_mask
        new = (k, v, real[:, None, None])
        old = self.kept or [t.narrow(dim, 0, 0) for t, dim in zip(new, (2, 2, 3))]
        self.pending = [torch.cat(pair, dim) for *pair, dim in zip(old, new, (2, 2, 3))]
        self.added = real.sum(1)
        return self.pending

    def commit(self):
        self.kept, self.seen = self.pending, self.seen + self.added

    def crop(self, length):
        "Take the last tokens back; all of them are real here."
        self.kept = None if self.kept is None else [t.narrow(dim, 0, length) for t, dim in zip(self.kept, (2, 2, 3))]
        self.seen = torch.zeros_like(self.seen) if self.kept is None else self.kept[2].sum((1, 2, 3))
