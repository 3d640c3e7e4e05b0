"""What a user of the package writes; `make types` has it read by a type checker."""

from functools import partial

import torch
from torch import Tensor, nn

from mha_book import KVCache, MultiHeadAttention, RoPE, SinkAttention, attention


def turned(q: Tensor, k: Tensor, *, offset: int | Tensor) -> tuple[Tensor, Tensor]:
    "A position of one's own."
    return q * (1 + offset), k


plain = MultiHeadAttention(64, 4, attend=partial(attention, window=256), position=RoPE(16))
layer = MultiHeadAttention(64, 4, position=turned, attend=SinkAttention(4), qk_norm=nn.RMSNorm)
cache = KVCache(2, 4, 128, 16)
with torch.no_grad():
    y: Tensor = plain(torch.randn(2, 8, 64), is_causal=True, cache=cache)
    weights: Tensor = layer.attention_map(torch.randn(2, 8, 64), is_causal=True)
cache.crop(4)
