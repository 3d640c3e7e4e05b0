"""Properties that hold for any sizes and options, tried on many by hypothesis."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mha_book import MultiHeadAttention, fused_attend, merge_heads, pad_heads
from mha_book.heads.single_head import plain_attention, plain_attention_weights
from mha_book.instruments.testing import reference_attention

settings.register_profile("book", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("book")
KERNELS = st.sampled_from([plain_attention, fused_attend])


@st.composite
def problems(draw):
    "q, k, v in float64 and a mask that lets every query see something."
    g, r = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    b, n, m, d = (draw(st.integers(1, most)) for most in (3, 5, 6, 5))
    torch.manual_seed(draw(st.integers(0, 1000)))
    q = torch.randn(b, g * r, n, d, dtype=torch.float64) * draw(st.sampled_from([0.1, 1.0, 10.0]))
    k, v = torch.randn(2, b, g, m, d, dtype=torch.float64)
    mask = torch.rand(b, 1, n, m) < draw(st.sampled_from([0.3, 0.8]))
    mask |= torch.arange(m) == torch.randint(m, (b, 1, n, 1))
    return q, k, v, mask


def assert_close(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, atol=atol * max(1.0, b.abs().max().item() if b.numel() else 1.0), rtol=0)


def expand(t, q):
    "Key-value heads repeated for their queries."
    return t[:, [i // (q.shape[1] // t.shape[1]) for i in range(q.shape[1])]]


@given(problems(), KERNELS)
def test_it_is_the_loop(problem, attend):
    q, k, v, mask = problem
    assert_close(attend(q, k, v, mask=mask), reference_attention(q, k, v, mask=mask))


@given(problems(), KERNELS)
def test_grouped_heads_are_repeated_heads(problem, attend):
    q, k, v, mask = problem
    assert_close(attend(q, k, v, mask=mask), attend(q, expand(k, q), expand(v, q), mask=mask))


@given(problems())
def test_weights_are_positive_and_sum_to_one(problem):
    q, k, _, mask = problem
    weights = plain_attention_weights(q, k, mask=mask)
    assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert weights.min() >= 0 and weights.masked_select(~mask.expand_as(weights)).abs().sum() == 0


@given(problems(), KERNELS)
def test_queries_of_zero_give_the_mean_of_what_they_see(problem, attend):
    q, k, v, mask = problem
    share = mask.double() / mask.sum(-1, keepdim=True)
    assert_close(attend(torch.zeros_like(q), k, v, mask=mask), share.expand(-1, q.shape[1], -1, -1) @ expand(v, q))


@given(problems(), KERNELS)
def test_outputs_stay_between_the_visible_values(problem, attend):
    q, k, v, mask = problem
    seen = expand(v, q)[:, :, None].expand(-1, -1, q.shape[2], -1, -1)
    hidden = ~mask[..., None].expand_as(seen)
    out = attend(q, k, v, mask=mask)
    assert (out <= seen.masked_fill(hidden, -torch.inf).amax(3) + 1e-12).all()
    assert (out >= seen.masked_fill(hidden, torch.inf).amin(3) - 1e-12).all()


@given(problems(), KERNELS, st.sampled_from([77.0, 1e6]))
def test_what_is_hidden_is_inert(problem, attend, size):
    q, k, v, _ = problem
    real = torch.arange(k.shape[2]) < max(1, k.shape[2] - 2)
    loud_k, loud_v = (torch.where(real[:, None], t, size) for t in (k, v))
    assert torch.equal(attend(q, loud_k, loud_v, mask=real), attend(q, k, v, mask=real))


@given(problems(), KERNELS)
def test_a_hidden_key_is_a_key_cut_away(problem, attend):
    q, k, v, _ = problem
    keep = max(1, k.shape[2] - 2)
    real = torch.arange(k.shape[2]) < keep
    assert_close(attend(q, k, v, mask=real), attend(q, k[:, :, :keep], v[:, :, :keep]))


@given(problems(), KERNELS)
def test_a_number_added_to_a_whole_row_changes_nothing(problem, attend):
    q, k, v, mask = problem
    row = torch.randn(q.shape[2], 1, dtype=q.dtype) * 5
    assert_close(attend(q, k, v, mask=mask, bias=row.expand(-1, k.shape[2])), attend(q, k, v, mask=mask))


@given(problems(), KERNELS)
def test_causal_queries_see_exactly_their_past(problem, attend):
    q, k, v, _ = problem
    q, v = q / (1 + q.abs().max()), v.clone().requires_grad_()  # small logits: no visible key gets a weight of 0
    n, m = q.shape[2], k.shape[2]
    out = attend(q, k, v, is_causal=True)
    for i in range(n):
        (touched,) = torch.autograd.grad(out[:, :, i].sum(), v, retain_graph=True)
        seen = (touched.abs().amax((0, 1, 3)) > 0).tolist()
        assert seen == [j <= m - n + i for j in range(m)]


@given(problems(), KERNELS)
def test_a_mask_and_causality_hold_together(problem, attend):
    q, k, v, mask = problem
    n, m = q.shape[2], k.shape[2]
    both = mask & (torch.arange(m) <= torch.arange(n)[:, None] + m - n)
    assert_close(attend(q, k, v, mask=mask, is_causal=True), attend(q, k, v, mask=both))


@given(problems(), KERNELS)
def test_memory_layout_does_not_matter(problem, attend):
    q, k, v, mask = problem
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert_close(attend(*strided, mask=mask), attend(q, k, v, mask=mask))


@given(problems(), KERNELS)
def test_sentences_do_not_see_each_other(problem, attend):
    q, k, v, mask = problem
    one_by_one = [attend(q[i : i + 1], k[i : i + 1], v[i : i + 1], mask=mask[i : i + 1]) for i in range(len(q))]
    assert_close(torch.cat(one_by_one), attend(q, k, v, mask=mask))


@given(problems(), KERNELS, st.sampled_from([0, 1, 2]))
def test_empty_axes_are_allowed(problem, attend, empty):
    q, k, v, _ = problem
    if empty == 0:
        assert attend(q[:0], k[:0], v[:0]).shape == q[:0].shape
    elif empty == 1:
        assert attend(q[:, :, :0], k, v).shape == q[:, :, :0].shape
    else:
        assert attend(q, k[:, :, :0], v[:, :, :0]).abs().sum() == 0  # no keys: nothing to see, so 0


@given(problems(), KERNELS)
def test_inputs_are_left_as_they_were(problem, attend):
    q, k, v, mask = problem
    before = [t.clone() for t in (q, k, v, mask)]
    attend(q, k, v, mask=mask, is_causal=True)
    assert all(torch.equal(now, then) for now, then in zip((q, k, v, mask), before))


@st.composite
def layers(draw):
    "A layer with any head counts and widths, in float64, and tokens for it."
    g, r, d, e = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 9))
    torch.manual_seed(draw(st.integers(0, 1000)))
    layer = MultiHeadAttention(e, g * r, num_kv_heads=g, head_dim=d, bias=draw(st.booleans()), dtype=torch.float64)
    return layer, torch.randn(draw(st.integers(1, 3)), draw(st.integers(1, 6)), e, dtype=torch.float64)


@given(layers(), st.booleans())
def test_the_attention_map_explains_the_output(problem, is_causal):
    layer, x = problem
    _, _, v = layer.qkv(x)
    weights = layer.attention_map(x, is_causal=is_causal)
    mixed = weights @ expand(v, weights)
    assert_close(layer.out_proj(merge_heads(mixed)), layer(x, is_causal=is_causal))


@given(layers(), st.integers(1, 3), st.booleans())
def test_padded_heads_are_inert_and_stay_so(problem, more, is_causal):
    layer, x = problem
    h, g, _ = layer.layout
    wide = pad_heads(layer, h + more * (h // g))
    assert_close(wide(x, is_causal=is_causal), layer(x, is_causal=is_causal))
    wide(x, is_causal=is_causal).square().sum().backward()
    for part, first, count in (("q", h, h + more * (h // g)), ("k", g, g + more), ("v", g, g + more)):
        for head in range(first, count):
            assert wide.in_proj.weight.grad[wide.layout.rows(part, head)].abs().max() == 0
    assert wide.out_proj.weight.grad[:, layer.out_proj.in_features :].abs().max() == 0


@given(layers(), st.randoms())
def test_the_order_of_heads_means_nothing(problem, random):
    layer, x = problem
    h, g, d = layer.layout
    order = list(range(g))
    random.shuffle(order)
    groups = {"q": [i * (h // g) + j for i in order for j in range(h // g)], "k": order, "v": order}
    rows = torch.cat([torch.arange(10_000)[layer.layout.rows(part, i)] for part in "qkv" for i in groups[part]])
    columns = torch.cat([torch.arange(10_000)[layer.layout.rows("q", i)] for i in groups["q"]])
    before = layer(x)
    with torch.no_grad():
        layer.in_proj.weight.copy_(layer.in_proj.weight[rows])
        if layer.in_proj.bias is not None:
            layer.in_proj.bias.copy_(layer.in_proj.bias[rows])
        layer.out_proj.weight.copy_(layer.out_proj.weight[:, columns])
    assert_close(layer(x), before)


@given(problems(), KERNELS)
def test_a_row_hidden_by_a_bias_of_minus_infinity_is_zero_too(problem, attend):
    leaves = [t.clone().requires_grad_() for t in problem[:3]]
    bias = torch.zeros(leaves[0].shape[2], leaves[1].shape[2], dtype=torch.float64)
    bias[0] = -torch.inf
    out = attend(*leaves, bias=bias)
    grads = torch.autograd.grad(out.square().sum(), leaves)
    assert out[:, :, 0].abs().max() == 0 and grads[0][:, :, 0].abs().max() == 0
    assert all(g.isfinite().all() for g in grads)
