"""The layer does no more than a hand-written minimal one: the same operations in order, the same peak bytes."""

import pytest
import torch

from mha_book import MultiHeadAttention, fused_attend
from mha_book.instruments.device import peak_bytes
from support.minimal_layer import MinimalLayer, torch_layer
from support.profiler import operations


def step(layer, x, **options):
    "Forward and backward, from and to fresh gradients."

    def run():
        layer.zero_grad()
        layer(x, **options).sum().backward()

    return run


@pytest.mark.usefixtures("own_messages")  # shape checking would add operations of its own
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("groups", [6, 3])
class TestSameWork:
    def layers(self, groups):
        layer = MultiHeadAttention(48, 6, num_kv_heads=groups)
        return layer, MinimalLayer(layer), torch.randn(2, 64, 48)

    def test_it_computes_the_same(self, groups, is_causal):
        ours, minimal, x = self.layers(groups)
        assert torch.equal(ours(x, is_causal=is_causal), minimal(x, is_causal=is_causal))

    def test_the_same_operations(self, groups, is_causal):
        ours, minimal, x = self.layers(groups)
        with torch.no_grad():
            forward = [operations(lambda: layer(x, is_causal=is_causal)) for layer in (ours, minimal)]
        assert forward[0] == forward[1]
        steps = [step(layer, x, is_causal=is_causal) for layer in (ours, minimal)]
        assert operations(steps[0]) == operations(steps[1])

    def test_the_same_bytes(self, groups, is_causal):
        ours, minimal, x = self.layers(groups)
        with torch.no_grad():
            forward = [peak_bytes(lambda: layer(x, is_causal=is_causal)) for layer in (ours, minimal)]
        assert forward[0] == forward[1]
        assert peak_bytes(step(ours, x, is_causal=is_causal)) == peak_bytes(step(minimal, x, is_causal=is_causal))


@pytest.mark.usefixtures("own_messages")
def test_a_copy_would_be_seen():
    layer = MultiHeadAttention(48, 6)
    copying = MultiHeadAttention(48, 6, attend=lambda q, k, v, **options: fused_attend(q.contiguous(), k, v, **options))
    x = torch.randn(2, 64, 48)
    with torch.no_grad():
        assert operations(lambda: copying(x)) != operations(lambda: layer(x))
        assert peak_bytes(lambda: copying(x)) > peak_bytes(lambda: layer(x))


def test_it_is_torchs_layer_with_the_same_weights():
    layer, x = MultiHeadAttention(48, 6, dtype=torch.float64), torch.randn(2, 5, 48, dtype=torch.float64)
    torch.nn.init.normal_(layer.in_proj.bias)
    theirs = torch_layer(layer, dtype=torch.float64)
    future = torch.ones(5, 5, dtype=torch.bool).triu(1)  # theirs: True = may not look
    padding = torch.tensor([[False] * 5, [False, False, False, True, True]])
    expected, weights = theirs(x, x, x, attn_mask=future, key_padding_mask=padding, average_attn_weights=False)
    options = dict(is_causal=True, key_mask=~padding)
    torch.testing.assert_close(layer(x, **options), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(layer.attention_map(x, **options), weights, atol=1e-12, rtol=0)
