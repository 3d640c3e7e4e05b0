"""Attention in parts is attention: any options, cuts, order and nesting; and everything that is no merge is noticed."""

import itertools
import math
import subprocess
import sys
from functools import partial, reduce

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mha_book.heads.single_head import causal_mask, join_masks
from mha_book.instruments.testing import SIZES, assert_as_exact, reference_attention
from mha_book.kernels.backends import attention, attention_logits, window_mask
from mha_book.kernels.merging import attention_with_lse, merge_attention
from support.refusals import refused

settings.register_profile("book", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("book")
s = SIZES
LEARNED = "q", "k", "v", "bias", "sinks"


# --- calls, and calls in parts --------------------------------------------------------------------------------------


def random_call(n=s.n, m=s.m, groups=s.g, dv=s.dv, b=s.b, r=2, d=s.d, size=1.0):
    "Tensors and options of a call that has everything, in float64."
    double = partial(torch.randn, dtype=torch.float64)
    h = groups * r
    tensors = dict(
        q=double(b, h, n, d) * size,
        k=double(b, groups, m, d),
        v=double(b, groups, m, dv),
        bias=double(h, n, m),
        sinks=double(h),
    )
    return tensors, dict(mask=torch.rand(b, 1, n, m) < 0.7, is_causal=True, window=(4, 0), scale=0.4, softcap=2.5)


def in_parts(cuts, q, k, v, *, mask=None, bias=None, is_causal=False, window=None, sinks=None, **others):
    """Outs and lses over the keys between neighbouring cuts. Causality and window become a mask; the part that
    starts at 0 has the sinks."""
    n, m = q.shape[2], k.shape[2]
    sees = join_masks(mask, causal_mask(n, m) if is_causal else None, window_mask(n, m, window or (None, None)))
    sees = sees.expand(*q.shape[:3], m)
    bias = None if bias is None else bias.expand(*q.shape[:3], m)
    return tuple(
        zip(
            *(
                attention_with_lse(
                    q,
                    k[:, :, a:b],
                    v[:, :, a:b],
                    mask=sees[..., a:b],
                    bias=None if bias is None else bias[..., a:b],
                    sinks=None if a else sinks,
                    **others,
                )
                for a, b in zip(cuts, cuts[1:])
            )
        )
    )


def outcome(call, tensors, dtype, upstream):
    "The output and the gradients of all that is learned, computed in `dtype`."
    leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in tensors.items()}
    out = call(**leaves)
    if not out.requires_grad:  # the loop saw nothing
        return [out, *(torch.zeros_like(leaf) for leaf in leaves.values())]
    grads = torch.autograd.grad(out, list(leaves.values()), upstream.to(out), allow_unused=True)
    return [out, *(torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves.values()))]


def assert_parts_are_the_whole(cuts, tensors, options, dtype=torch.float64, parts=in_parts, merge=merge_attention):
    "Output and gradients by the tolerance rule, against the loop; the log-sum-exp against one sum."
    tensors = {name: t.to(dtype).double() for name, t in tensors.items()}  # all see the same numbers
    upstream = torch.randn(*tensors["q"].shape[:3], tensors["v"].shape[-1]).to(dtype).double()
    exact = outcome(partial(reference_attention, **options), tensors, torch.float64, upstream)
    plain = outcome(partial(attention, impl="math", **options), tensors, dtype, upstream)
    got = outcome(lambda **t: merge(*parts(cuts, **t, **options))[0], tensors, dtype, upstream)
    sizes = [exact[0].abs().max() if exact[0].numel() else torch.tensor(1.0)]
    sizes += [max((g.abs().max() for g in exact[1:] if g.numel()), default=torch.tensor(1.0))] * len(exact[1:])
    for mine, true, simple, size in zip(got, exact, plain, sizes):
        assert mine.dtype == dtype
        if true.numel():
            assert_as_exact(mine, true, simple, size.item())
    if dtype == torch.float64:
        _, lse = merge(*parts(cuts, **tensors, **options))
        torch.testing.assert_close(lse, one_sum(tensors, options), atol=1e-12, rtol=1e-12)


def one_sum(tensors, options):
    "The log-sum-exp by one sum of powers, the largest logit taken out."
    tensors = {name: t for name, t in tensors.items() if name != "v"}
    sinks = tensors.pop("sinks", None)
    logits = attention_logits(**tensors, **options)
    if sinks is not None:
        logits = torch.cat([logits, sinks[:, None, None].expand(*logits.shape[:3], 1)], -1)
    if not logits.shape[-1]:
        return torch.full(logits.shape[:3], -math.inf, dtype=logits.dtype)
    top = logits.amax(-1, keepdim=True).clamp(min=-1e300)
    return (logits - top).exp().sum(-1).log() + top[..., 0]


# --- the theorem, on many calls -------------------------------------------------------------------------------------


@st.composite
def calls(draw):
    "Any options together, any cuts, empty parts among them."
    n, m, b, g, r, d, dv = (
        draw(st.integers(low, high)) for low, high in ((1, 4), (0, 6), (1, 2), (1, 2), (1, 3), (1, 4), (1, 4))
    )
    torch.manual_seed(draw(st.integers(0, 1000)))
    tensors, _ = random_call(n, m, g, dv, b, r, d, draw(st.sampled_from([0.01, 1.0, 30.0])))
    for name in "bias", "sinks":
        if draw(st.booleans()):
            del tensors[name]
    if "bias" in tensors and draw(st.booleans()):
        tensors["bias"][torch.rand(tensors["bias"].shape) < 0.3] = -math.inf
    mask = torch.rand(b, 1, n, m) < draw(st.sampled_from([0.0, 0.3, 0.8]))
    options = dict(
        mask=draw(st.sampled_from([None, mask])),
        is_causal=draw(st.booleans()),
        window=draw(st.sampled_from([None, 1, 2, (1, 1), (None, 0), (0, None)])),
        softcap=draw(st.sampled_from([None, 1.5])),
        scale=draw(st.sampled_from([None, -0.4])),
    )
    inner = sorted(draw(st.lists(st.integers(0, m), max_size=4)))
    return tensors, options, [0, *inner, m]


@given(calls())
def test_the_merge_of_any_parts_is_the_whole(call):
    tensors, options, cuts = call
    if len(cuts) > 2 and cuts[1] == 0:  # the first part alone has the sinks: there is one that starts at 0
        cuts = [0, *[c for c in cuts if c]] if cuts[-1] else [0, 0]
    assert_parts_are_the_whole(cuts, tensors, options)


@given(calls(), st.randoms())
def test_any_order_and_any_tree(call, random):
    tensors, options, cuts = call
    tensors.pop("sinks", None)
    outs, lses = in_parts(cuts, **tensors, **options)
    whole, parts = merge_attention(outs, lses), list(zip(outs, lses))
    while len(parts) > 1:
        random.shuffle(parts)
        taken = random.randint(1, len(parts))
        parts = [*parts[taken:], merge_attention(*zip(*parts[:taken]))]
    for got, expected in zip(parts[0], whole):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


ROWS = list(itertools.product([torch.float32, torch.bfloat16, torch.float16], [[0, 7], [0, 3, 7], [0, 1, 2, 4, 7]]))


@pytest.mark.parametrize("dtype, cuts", ROWS, ids=str)
@pytest.mark.parametrize("size", [0.1, 1.0, 10.0])
def test_in_low_precision_by_the_tolerance_rule_gradients_too(dtype, cuts, size):
    for keep in LEARNED, LEARNED[:4], LEARNED[:3]:
        tensors, options = random_call(size=size)
        tensors = {name: tensors[name] for name in keep}
        assert_parts_are_the_whole(cuts, tensors, options, dtype)
        assert_parts_are_the_whole(cuts, tensors, {}, dtype)


# --- what is no merge is noticed ------------------------------------------------------------------------------------


def by_powers(outs, lses):
    powers = torch.stack(lses).exp()
    return ((powers / powers.sum(0))[..., None] * torch.stack(outs)).sum(0), powers.sum(0).log()


def base_two(outs, lses):
    "As if the numbers were logarithms to the base 2."
    return merge_attention(outs, [lse * math.log(2) for lse in lses])


def mean(outs, lses):
    return torch.stack(outs).mean(0), torch.stack(lses).logsumexp(0)


def sum_of_numbers(outs, lses):
    return merge_attention(outs, lses)[0], sum(lses)


def in_half(outs, lses):
    return merge_attention(outs, [lse.bfloat16().double() for lse in lses])


def nothing_is_plus_infinity(outs, lses):
    return merge_attention(outs, [lse.masked_fill(lse == -math.inf, math.inf) for lse in lses])


def no_gradient_through_the_number(outs, lses):
    return merge_attention(outs, [lse.detach() for lse in lses])


MERGES = by_powers, base_two, mean, sum_of_numbers, in_half, nothing_is_plus_infinity, no_gradient_through_the_number


@pytest.mark.parametrize("merge", MERGES, ids=lambda merge: merge.__name__)
def test_another_merge_is_noticed(merge):
    tensors, options = random_call()
    if merge is by_powers:  # which is right where all numbers are small
        tensors["bias"] += 800
    assert_parts_are_the_whole([0, 2, 3, 7], tensors, options)
    with pytest.raises(AssertionError):
        assert_parts_are_the_whole([0, 2, 3, 7], tensors, options, merge=merge)


def sinks_in_every_part(cuts, *, sinks, **call):
    parts = [
        in_parts(
            [0, 7],
            **call
            | {name: call[name][..., a:b, :] for name in "kv"}
            | {name: call[name][..., a:b] for name in ("bias", "mask")},
            sinks=sinks,
        )
        for a, b in zip(cuts, cuts[1:])
    ]
    return [[part[i][0] for part in parts] for i in (0, 1)]


def causal_in_every_part(cuts, *, is_causal, **call):
    k, v, bias, mask = (call.pop(name) for name in ("k", "v", "bias", "mask"))
    sinks = call.pop("sinks")
    return tuple(
        zip(
            *(
                attention_with_lse(
                    k=k[:, :, a:b],
                    v=v[:, :, a:b],
                    bias=bias[..., a:b],
                    mask=mask[..., a:b],
                    is_causal=True,
                    sinks=None if a else sinks,
                    **call,
                )
                for a, b in zip(cuts, cuts[1:])
            )
        )
    )


@pytest.mark.parametrize("parts", [sinks_in_every_part, causal_in_every_part], ids=lambda parts: parts.__name__)
def test_parts_that_are_cut_wrongly_are_noticed(parts):
    tensors, options = random_call()
    options |= dict(window=None)
    assert_parts_are_the_whole([0, 3, 7], tensors, options)
    with pytest.raises(AssertionError):
        assert_parts_are_the_whole([0, 3, 7], tensors, options, parts=parts)


# --- small print ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_output_is_attentions_and_the_number_is_float32_or_wider(dtype):
    tensors, options = random_call()
    tensors = {name: t.to(dtype) for name, t in tensors.items()}
    sinks = tensors.pop("sinks")
    out, lse = attention_with_lse(**tensors, **options)
    assert torch.equal(out, attention(**tensors, **options, impl="math"))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for got in (out, lse), attention_with_lse(**tensors, sinks=sinks, **options):
        assert [t.dtype for t in got] == [dtype, wide]
        merged = merge_attention([got[0]], [got[1]])
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(merged, got))  # one part is the whole


def test_the_number_of_rounded_inputs_is_not_rounded():
    tensors, _ = random_call(n=40, m=300)
    q, k, v = (tensors[name].bfloat16() for name in "qkv")
    logits = attention_logits(q, k).double()
    _, lse = attention_with_lse(q, k, v)
    assert (lse.double() - logits.logsumexp(-1)).abs().max() < 1e-5
    assert (lse.bfloat16().double() - lse).abs().max() > 1e-3  # the test can tell


@pytest.mark.parametrize("top", [0.0, 1e2, 1e4, -1e4, 3e37])
def test_numbers_of_any_size(top):
    outs = list(torch.randn(2, 3, 4).unbind())
    out, lse = merge_attention(outs, [torch.full((3,), top), torch.full((3,), top)])
    torch.testing.assert_close(out, (outs[0] + outs[1]) / 2)
    torch.testing.assert_close(lse, torch.full((3,), top + math.log(2)))
    far = top - 1e3 if abs(top) < 1e30 else 0.0
    out, lse = merge_attention(outs, [torch.full((3,), far), torch.full((3,), top)])
    assert torch.equal(out, outs[1]) and torch.equal(lse, torch.full((3,), top))


@pytest.mark.parametrize("sink", [-math.inf, -1e4, 0.0, 1e4, 1e38, math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_sinks_of_any_size_are_attentions(sink, dtype):
    tensors, options = random_call()
    heads = {name: tensors[name].to(dtype) for name in "qkv"}
    sinks = torch.full((s.h,), sink, dtype=torch.float64)
    out, lse = attention_with_lse(**heads, sinks=sinks, **options)
    exact = reference_attention(**heads, sinks=sinks, **options)
    assert_as_exact(out, exact, attention(**heads, sinks=sinks, **options, impl="math"))
    assert not lse.isnan().any() and (lse.double() >= min(sink, 3e38) - 1e32).all()


def test_a_row_that_nobody_sees_stays_nothing_and_learns_nothing():
    outs = [t.requires_grad_() for t in torch.zeros(3, s.n, s.d).unbind()]
    lses = [t.requires_grad_() for t in torch.full((3, s.n), -math.inf).unbind()]
    out, lse = merge_attention(outs, lses)
    assert torch.equal(out, torch.zeros(s.n, s.d)) and (lse == -math.inf).all()
    grads = torch.autograd.grad([out.sum(), lse.sum()], [*outs, *lses])
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


def test_the_gradient_of_the_merge_is_the_derivative():
    outs, lses = torch.randn(3, s.n, s.d, dtype=torch.float64), torch.randn(3, s.n, dtype=torch.float64)
    lses[1, 2] = -math.inf  # the numeric derivative stays there too

    def merged(outs, *finite):
        rows = list(lses.unbind())
        return merge_attention(
            list(outs.unbind()), [finite[0], torch.where(rows[1] == -math.inf, rows[1], finite[1]), finite[2]]
        )

    inputs = [t.clone().requires_grad_() for t in (outs, lses[0], lses[1].clamp(min=-9), lses[2])]
    assert torch.autograd.gradcheck(merged, inputs)
    assert torch.autograd.gradgradcheck(merged, inputs)


def test_z_loss_has_the_gradient_of_a_plain_log_sum_exp():
    tensors, options = random_call()
    leaves = {name: tensors[name].requires_grad_() for name in LEARNED}
    _, lse = attention_with_lse(**leaves, **options)
    inputs = [leaves[name] for name in ("q", "k", "bias", "sinks")]
    for got, true in zip(*(torch.autograd.grad(t.square().sum(), inputs) for t in (lse, one_sum(leaves, options)))):
        torch.testing.assert_close(got, true, atol=1e-11, rtol=0)


@pytest.mark.parametrize("b, n, m", [(0, 5, 7), (2, 0, 7), (2, 5, 0), (0, 0, 0)])
@pytest.mark.parametrize("sinks", [None, torch.zeros(s.h)])
def test_empty_axes(b, n, m, sinks):
    q, k, v = torch.randn(b, s.h, n, s.d), torch.randn(b, s.g, m, s.d), torch.randn(b, s.g, m, s.dv)
    out, lse = attention_with_lse(q, k, v, sinks=sinks)
    assert out.shape == (b, s.h, n, s.dv) and lse.shape == (b, s.h, n)
    if not m:
        assert out.abs().sum() == 0 and (lse == (-math.inf if sinks is None else 0.0)).all()
    again = merge_attention([out, out], [lse, lse])
    torch.testing.assert_close(again[0], out)


def test_a_running_output_in_float32_stays_there():
    q, k, v = (torch.randn(s.b, s.h, length, s.d).bfloat16() for length in (s.n, 64, 64))
    running = torch.zeros(s.b, s.h, s.n, s.d), torch.full((s.b, s.h, s.n), -math.inf)
    for keys, values in zip(k.split(8, dim=2), v.split(8, dim=2)):
        running = merge_attention(*zip(running, attention_with_lse(q, keys, values)))
        assert running[0].dtype == running[1].dtype == torch.float32
    whole = attention(q, k, v, impl="math")
    exact = reference_attention(q, k, v)
    assert_as_exact(running[0].bfloat16(), exact, whole)


def test_the_widest_dtype_is_worked_in():
    wide = list(torch.randn(2, s.n, s.d, dtype=torch.float64).unbind())
    lses = list(torch.randn(2, s.n).unbind())
    exact = merge_attention(wide, [lse.double() for lse in lses])
    for outs, numbers in (wide, lses), (wide, [lses[0], lses[1].double()]):
        out, lse = merge_attention(outs, numbers)
        assert torch.equal(out, exact[0]) and torch.equal(lse, exact[1])
    out, lse = merge_attention([wide[0].half(), wide[1].bfloat16()], lses)
    assert out.dtype == lse.dtype == torch.float32


def test_memory_layout_does_not_matter_and_inputs_are_left_alone():
    tensors, options = random_call()
    expected = attention_with_lse(**tensors, **options)
    strided = {name: t.transpose(-1, 0).contiguous().transpose(-1, 0) for name, t in tensors.items()}
    before = {name: t.clone() for name, t in strided.items()}
    for got, true in zip(attention_with_lse(**strided, **options), expected):
        torch.testing.assert_close(got, true, atol=1e-12, rtol=0)
    assert all(torch.equal(strided[name], before[name]) for name in before)
    out, lse = torch.randn(1, 1, s.n, s.d), torch.randn(1, 1, s.n)
    wide = out.expand(s.b, s.h, -1, -1), lse.expand(s.b, s.h, -1)  # many numbers in one place
    whole, number = merge_attention([wide[0], wide[0]], [wide[1], wide[1]])
    torch.testing.assert_close(whole, wide[0])
    torch.testing.assert_close(number, wide[1] + math.log(2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_under_vmap(dtype):
    q, k, v = (torch.randn(3, s.b, s.h, length, s.d).to(dtype) for length in (s.n, s.m, s.m))
    mask, sinks = torch.rand(s.n, s.m) < 0.7, torch.randn(3, s.h).to(dtype)
    mask[2] = False

    def halves(q, k, v, sinks):
        first = attention_with_lse(q, k[:, :, :3], v[:, :, :3], mask=mask[:, :3], sinks=sinks, softcap=2.0)
        second = attention_with_lse(q, k[:, :, 3:], v[:, :, 3:], mask=mask[:, 3:], softcap=2.0)
        return merge_attention(*zip(first, second))

    one_by_one = [torch.stack(t) for t in zip(*map(halves, q, k, v, sinks))]
    for got, expected in zip(torch.func.vmap(halves)(q, k, v, sinks), one_by_one):
        torch.testing.assert_close(got, expected, atol=1e-3 if dtype == torch.float16 else 1e-12, rtol=0)
    grads = torch.func.vmap(torch.func.grad(lambda *t: halves(*t)[0].float().square().sum()))(q, k, v, sinks)
    assert grads.isfinite().all() and (grads[:, :, :, 2] == 0).all() and grads.abs().max() > 0


COMPILED = """
import torch
from mha_book.kernels.merging import attention_with_lse, merge_attention
q, k, v, sinks = torch.randn(2, 6, 5, 8), torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 9), torch.randn(6)
def halves(q, k, v):
    first, second = ((a, b) for a, b in zip(k.chunk(2, dim=2), v.chunk(2, dim=2)))
    return merge_attention(*zip(attention_with_lse(q, *first, softcap=2.0, sinks=sinks),
                                attention_with_lse(q, *second, softcap=2.0, window=2)))
whole = torch.compile(halves, backend="eager", fullgraph=True)
for got, expected in zip(whole(q, k, v), halves(q, k, v)):
    torch.testing.assert_close(got, expected)
print("whole")
"""


def test_parts_and_merge_are_one_graph():
    "In a process of its own, for shape checking wraps every function."
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILED], capture_output=True, text=True)
    assert done.stdout == "whole\n", done.stderr[-2000:]


def test_it_needs_no_numbers():
    tensors, options = random_call()
    tensors, mask = {name: t.to("meta") for name, t in tensors.items()}, options.pop("mask").to("meta")
    out, lse = attention_with_lse(**tensors, mask=mask, **options)
    out, lse = merge_attention([out, out], [lse, lse])
    assert out.shape == (s.b, s.h, s.n, s.dv) and lse.shape == (s.b, s.h, s.n) and out.is_meta and lse.is_meta


# --- bad input ------------------------------------------------------------------------------------------------------


def test_annotations_are_checked_here():
    with pytest.raises(jaxtyping.TypeCheckError):
        merge_attention([torch.zeros(5, 8)], [torch.zeros(6)])
    with pytest.raises(jaxtyping.TypeCheckError):
        attention_with_lse(*torch.zeros(3, 2, 6, 5, 8), sinks=torch.zeros(5))


@pytest.mark.usefixtures("own_messages")
class TestBadInput:
    OUT, LSE = torch.zeros(2, 6, 5, 8), torch.zeros(2, 6, 5)

    @pytest.mark.parametrize(
        "outs, lses, error, words",
        [
            ([], [], ValueError, ["0 outs", "0 lses", "at least one part"]),
            ([OUT, OUT], [LSE], ValueError, ["2 outs", "1 lses"]),
            (OUT, LSE, TypeError, ["outs", "one tensor", "(2, 6, 5, 8)", "list", "outs.unbind()"]),
            ([OUT, OUT], torch.stack([LSE, LSE]), TypeError, ["lses", "(2, 2, 6, 5)", "lses.unbind()"]),
            ([OUT, OUT[:, :, :4]], [LSE, LSE[:, :, :4]], ValueError, ["part 1", "(2, 6, 4, 8)", "(2, 6, 5, 8)"]),
            ([OUT, OUT], [LSE, LSE[:, :1]], ValueError, ["part 1", "(2, 1, 5)", "(2, 6, 5)"]),
            ([OUT], [LSE[..., None]], ValueError, ["part 0", "(2, 6, 5, 1)", "(2, 6, 5)"]),
            ([OUT, OUT.to("meta")], [LSE, LSE.to("meta")], ValueError, ["part 1", "meta", "cpu", "no numbers to move"]),
            ([OUT.half(), OUT.half()], [LSE, LSE.half()], TypeError, ["part 1", "float16", "float32"]),
            ([OUT.bfloat16()], [LSE.bfloat16()], TypeError, ["part 0", "bfloat16", "float32"]),
            ([OUT, OUT.to("meta")], [LSE, LSE], ValueError, ["part 1", "meta", "cpu", "no numbers to move"]),
            ([OUT, OUT], [LSE, LSE.to("meta")], ValueError, ["part 1", "meta", "cpu", "no numbers to move"]),
            ([OUT.long()], [LSE], TypeError, ["out of part 0", "int64"]),
            ([OUT, None], [LSE, LSE], TypeError, ["out of part 1", "NoneType"]),
            ([OUT], [LSE.long()], TypeError, ["lse of part 0", "int64"]),
        ],
    )
    def test_parts_that_cannot_be_merged(self, outs, lses, error, words):
        with refused(error, *words):
            merge_attention(outs, lses)

    @pytest.mark.parametrize(
        "change, error, words",
        [
            (dict(v=torch.zeros(2, 3, 6, 9)), ValueError, ["key 7", "value 6"]),
            (dict(mask=torch.zeros(5, 7)), TypeError, ["torch.bool", "bias"]),
            (dict(window=0), ValueError, ["window 0"]),
            (dict(softcap=-1.0), ValueError, ["softcap -1.0"]),
            (dict(scale=math.nan), ValueError, ["scale nan"]),
            (dict(sinks=torch.zeros(5)), ValueError, ["(5,)", "(6,)"]),
            (dict(sinks=1.0), TypeError, ["sinks", "torch.Tensor", "float"]),
        ],
    )
    def test_calls_are_refused_as_attention_refuses_them(self, change, error, words):
        call = dict(q=torch.zeros(2, 6, 5, 8), k=torch.zeros(2, 3, 7, 8), v=torch.zeros(2, 3, 7, 9)) | change
        for function in attention_with_lse, partial(attention, impl="math"):
            with refused(error, *words):
                function(**call)


def test_two_at_a_time_and_all_at_once_lose_the_same():
    "The running merge of many parts in float32, as a ring does it, against float64."
    torch.manual_seed(1)
    outs, lses = torch.randn(64, s.n, s.d), torch.randn(64, s.n) * 20
    exact = merge_attention(list(outs.double().unbind()), list(lses.double().unbind()))[0]
    at_once = merge_attention(list(outs.unbind()), list(lses.unbind()))
    running = reduce(lambda a, b: merge_attention(*zip(a, b)), zip(outs, lses))
    errors = [(t[0] - exact).abs().max().item() for t in (at_once, running)]
    assert max(errors) < 64 * torch.finfo(torch.float32).eps * outs.abs().max()


def test_a_wide_lse_beside_narrow_outputs_stays_wide():
    outs, lses = [torch.zeros(2, 6, 5, 8)] * 2, [torch.randn(2, 6, 5, dtype=torch.float64) for _ in range(2)]
    out, lse = merge_attention(outs, lses)
    assert out.dtype == torch.float32 and lse.dtype == torch.float64
    torch.testing.assert_close(lse, torch.logaddexp(*lses), atol=1e-15, rtol=0)
