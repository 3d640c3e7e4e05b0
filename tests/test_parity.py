"""Every implementation against the float64 loop, outputs and gradients, by the tolerance rule.

Every pair of choices meets in some case. All combinations: `make parity` (an hour or two).
"""

import os
from functools import partial

import pytest
import torch

from mha_book import MultiHeadAttention, fused_attend
from mha_book.heads.single_head import plain_attention as definition
from mha_book.instruments.testing import SIZES, assert_as_exact, reference_attention
from mha_book.kernels.backends import BACKENDS, attention
from support.pairs import every_pair, full_grid

s = SIZES
CHOICES = {
    "attend": ["definition", "fused_attend", "math", "sdpa", "flex", "auto"],
    "dtype": [torch.float64, torch.float32, torch.bfloat16, torch.float16],
    "lengths": [(5, 7), (6, 6), (7, 5), (1, 7), (5, 1), (1, 1)],
    "groups": [6, 3, 1],
    "mask": ["none", "m", "n m", "h n m", "b 1 n m", "b 1 1 m", "m of 1", "nothing visible"],
    "bias": ["none", "m", "h n m", "b h n m", "m of 1"],
    "is_causal": [False, True],
    "window": [None, 1, 3, (2, 1), (None, 1), (0, None), (40, 40)],
    "softcap": [None, 1.5],
    "sinks": [False, True],
    "scale": [None, 0.2, -0.3],
    "values": ["d", "wider", "narrower"],
    "layout": ["contiguous", "tokens first"],
}
CASES = full_grid(CHOICES) if os.environ.get("MHA_FULL_GRID") else every_pair(CHOICES) + every_pair(CHOICES, seed=1)
EXTRAS = "window", "softcap", "sinks"  # options that came with chapter 7


def implementation(case):
    "The function, and what of this call it lacks."
    name = case["attend"]
    if name in ("definition", "fused_attend"):
        return {"definition": definition, "fused_attend": fused_attend}[name], None
    return partial(attention, impl=name), "softcap" if name == "sdpa" and case["softcap"] else None


def size_of(axes, n, m):
    "The shape that a string such as 'b 1 n m' names."
    if axes == "m of 1":
        return [1]
    return [{"b": s.b, "h": s.h, "n": n, "m": m, "1": 1}[axis] for axis in axes.split()]


def inputs(case):
    "q, k, v in float64, and the options, all rounded to the case's dtype so that the definition sees the same numbers."
    n, m = case["lengths"]
    dv = {"d": s.d, "wider": s.dv, "narrower": s.d - 3}[case["values"]]
    shapes = (s.b, s.h, n, s.d), (s.b, case["groups"], m, s.d), (s.b, case["groups"], m, dv)
    heads = [torch.randn(shape).to(case["dtype"]).double() for shape in shapes]
    if case["layout"] == "tokens first":
        heads = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in heads]
    options = {"is_causal": case["is_causal"], "scale": case["scale"]}
    if case["mask"] == "nothing visible":
        options["mask"] = torch.zeros(n, m, dtype=torch.bool)
    elif case["mask"] != "none":
        options["mask"] = torch.rand(size_of(case["mask"], n, m)) < 0.6
    if case["bias"] != "none":
        options["bias"] = torch.randn(size_of(case["bias"], n, m)).to(case["dtype"]).double()
    if case["attend"] not in ("definition", "fused_attend"):
        options |= {name: case[name] for name in EXTRAS if case[name]}
        if case["sinks"]:
            options["sinks"] = torch.randn(s.h).to(case["dtype"]).double()
    return heads, options


def outcome(attend, heads, options, dtype, upstream):
    "The output and the gradients of q, k, v, bias and sinks, computed in `dtype`."
    learned = [name for name in ("bias", "sinks") if name in options]
    leaves = [t.to(dtype).requires_grad_() for t in [*heads, *(options[name] for name in learned)]]
    out = attend(*leaves[:3], **options | dict(zip(learned, leaves[3:])))
    if not out.requires_grad:  # nothing was visible, so the loop touched nothing
        return [out, *map(torch.zeros_like, leaves)]
    grads = torch.autograd.grad(out, leaves, upstream.to(out), allow_unused=True)
    return [out, *(torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves))]


def name_of(case):
    return "-".join(str(getattr(value, "__name__", value)) for value in case.values())


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_parity(case):
    heads, options = inputs(case)
    attend, lacking = implementation(case)
    if lacking:
        rounded = [t.to(case["dtype"]) for t in heads]
        with pytest.raises(NotImplementedError, match=f'impl="{case["attend"]}" lacks {lacking}; .*math'):
            attend(*rounded, **options)
        return
    upstream = torch.randn(*heads[0].shape[:3], heads[2].shape[-1]).to(case["dtype"]).double()
    plainly = definition if case["attend"] in ("definition", "fused_attend") else partial(attention, impl="math")
    exact = outcome(reference_attention, heads, options, torch.float64, upstream)
    plain = outcome(plainly, heads, options, case["dtype"], upstream)
    with torch.set_grad_enabled(case["attend"] != "flex"):  # which has no backward pass on a CPU
        got = (outcome if torch.is_grad_enabled() else outputs)(attend, heads, options, case["dtype"], upstream)
    # a gradient of a sink is a sum in which much cancels: the largest of all gradients stands for each of them
    sizes = [exact[0].detach().abs().max(), *[max(g.detach().abs().max() for g in exact[1:])] * (len(exact) - 1)]
    for mine, true, simple, size in zip(got, exact, plain, sizes):
        assert mine.dtype == case["dtype"]
        assert_as_exact(mine, true, simple, size.item())


def outputs(attend, heads, options, dtype, upstream):
    "The output alone."
    options = {name: value.to(dtype) if name in ("bias", "sinks") else value for name, value in options.items()}
    return [attend(*(t.to(dtype) for t in heads), **options)]


def test_every_implementation_is_here():
    assert set(BACKENDS) < set(CHOICES["attend"])


def test_every_pair_is_covered():
    cases = [{name: CHOICES[name].index(value) for name, value in case.items()} for case in every_pair(CHOICES)]
    for a, values in CHOICES.items():
        for b, others in CHOICES.items():
            if a < b:
                assert len({(case[a], case[b]) for case in cases}) == len(values) * len(others)


LAYERS = {
    "groups": [6, 3, 1],
    "context": ["none", "same width", "another width"],
    "bias": [True, False],
    "norm": [None, torch.nn.RMSNorm],
    "is_causal": [False, True],
    "padding": [False, True],
    "dtype": [torch.float64, torch.float32],
}


@pytest.mark.parametrize("case", every_pair(LAYERS), ids=name_of)
def test_the_layer_is_projections_and_the_loop(case):
    width = {"none": None, "same width": s.e, "another width": 11}[case["context"]]
    layer = MultiHeadAttention(
        s.e,
        s.h,
        num_kv_heads=case["groups"],
        head_dim=s.d,
        out_dim=13,
        bias=case["bias"],
        qk_norm=case["norm"],
        context_dim=11 if width == 11 else None,
        dtype=torch.float64,
    )
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(s.b, s.n, s.e, dtype=torch.float64)
    context = None if width is None else torch.randn(s.b, s.m, width, dtype=torch.float64)
    tokens = x if context is None else context
    padding = torch.arange(tokens.shape[1]) < torch.tensor([[3], [9]]) if case["padding"] else None
    expected = by_hand(layer, x, tokens, padding, case["is_causal"])
    layer = layer.to(case["dtype"])
    got = layer(
        x.to(case["dtype"]),
        None if context is None else context.to(case["dtype"]),
        key_mask=padding,
        is_causal=case["is_causal"],
    )
    torch.testing.assert_close(got.double(), expected, atol=1e-12 if case["dtype"] == torch.float64 else 1e-4, rtol=0)


def by_hand(layer, x, tokens, padding, is_causal):
    "The layer's output in plain algebra: every head's own rows, one after the other, and the loop."
    stacked = [p for p in (layer.in_proj, layer.context_proj) if p is not None]
    rows = [row for p in stacked for row in p.weight]
    biases = [b for p in stacked for b in (p.bias if p.bias is not None else torch.zeros(len(p.weight), dtype=x.dtype))]

    def head(part, i, inputs):
        chosen = range(len(rows))[layer.layout.rows(part, i)]
        return torch.stack([inputs @ rows[r] + biases[r] for r in chosen], dim=-1)

    h, g, d = layer.layout
    q = torch.stack([head("q", i, x) for i in range(h)], dim=1)
    k, v = (torch.stack([head(part, i, tokens) for i in range(g)], dim=1) for part in "kv")
    if layer.q_norm is not None:

        def normed(t, norm):
            size = (t.square().mean(-1, keepdim=True) + torch.finfo(t.dtype).eps).sqrt()
            return t / size * norm.weight

        q, k = normed(q, layer.q_norm), normed(k, layer.k_norm)
    mask = None if padding is None else padding[:, None, None]
    y = reference_attention(q, k, v, mask=mask, is_causal=is_causal)
    side_by_side = torch.cat([y[:, i] for i in range(h)], dim=-1)
    return layer.out_proj(side_by_side)
