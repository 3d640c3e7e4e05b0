"""The layer beside a minimal one and torch's own, with the same weights: `make bench`.

CPU time, one thread, in turns. A ratio is the time relative to the minimal layer; the minimal layer's own line is the
A/A band, the ratio of a thing to itself: a difference inside it is no difference. Leave the machine alone meanwhile.
"""
import platform

import torch
from minimal_layer import MinimalLayer, torch_layer

from mha_book import MultiHeadAttention
from mha_book.testing import time_ratios

SIZES = [(1, 8, 64, 4), (4, 256, 768, 12), (2, 1024, 768, 12)]


def contestants(b, n, e, h, train):
    "What is compared at one size, by name; each entry is a call."
    ours, x = MultiHeadAttention(e, h).train(train), torch.randn(b, n, e)
    minimal, theirs = MinimalLayer(ours).train(train), torch_layer(ours).train(train)
    future = torch.nn.Transformer.generate_square_subsequent_mask(n)
    calls = {
        "minimal fused layer": lambda: minimal(x, is_causal=True),
        "MultiHeadAttention": lambda: ours(x, is_causal=True),
        "nn.MultiheadAttention": lambda: theirs(x, x, x, attn_mask=future, is_causal=True, need_weights=False)[0],
        "the same, with weights": lambda: theirs(x, x, x, attn_mask=future)[0],
    }
    return {name: (lambda call=call: call().sum().backward()) if train else call for name, call in calls.items()}


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"CPU {platform.processor() or platform.machine()}, float32, one thread, torch {torch.__version__}, causal")
    for b, n, e, h in SIZES:
        for train in (False, True):
            title = "forward and backward" if train else "forward, no gradient"
            print(f"\n{title}: batch {b}, {n} tokens, width {e}, {h} heads", flush=True)
            with torch.set_grad_enabled(train):
                ratios = time_ratios(contestants(b, n, e, h, train), min_seconds=0.02)
            for name, ratio in ratios.items():
                note = "  <- A/A band" if name == "minimal fused layer" else ""
                print(f"  {name:24} {ratio!s:22} {ratio.seconds * 1e6:10.0f} µs{note}", flush=True)


if __name__ == "__main__":
    main()
