"""The least that a fused multi-head layer can be: one product in, split, torch's kernel, merge, one product out."""

import torch
from torch import nn


class MinimalLayer(nn.Module):
    "No options and no checks. It holds the weights of a `MultiHeadAttention`, so that both compute the same."

    def __init__(self, layer):
        super().__init__()
        self.in_proj, self.out_proj, self.layout = layer.in_proj, layer.out_proj, layer.layout

    def forward(self, x, is_causal=False):
        h, g, d = self.layout
        heads = self.in_proj(x).unflatten(-1, (h + 2 * g, d)).transpose(1, 2)
        q, k, v = heads.split((h, g, g), dim=1)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=h != g)
        return self.out_proj(y.transpose(1, 2).flatten(2))


def torch_layer(layer, **options):
    "torch's own layer with the weights of a `MultiHeadAttention` (h = g, h·d = e)."
    e = layer.in_proj.in_features
    theirs = nn.MultiheadAttention(e, layer.layout.num_heads, batch_first=True, **options)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(layer.in_proj.weight)
        theirs.in_proj_bias.copy_(layer.in_proj.bias)
        theirs.out_proj.load_state_dict(layer.out_proj.state_dict())
    return theirs
