"""All options of attention together, on shapes, layouts and sizes that nobody would choose, against the loop."""

import math
from functools import partial
from typing import NamedTuple

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from mha_book import MultiHeadAttention, explain_dispatch
from mha_book.instruments.testing import assert_as_exact, reference_attention
from mha_book.kernels.backends import BACKENDS, attention, attention_weights

settings.register_profile("book", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("book")
DTYPES = torch.float64, torch.float32, torch.bfloat16, torch.float16


# Any call


class Problem(NamedTuple):
    "A call of `attention`; q, k, v, bias and sinks are in the dtype under test."

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    options: dict
    grad: bool = False


def strided(t, layout):
    "The numbers of `t` (for `expanded`: of a part of it) at other places in memory."
    if layout == "transposed":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "width first":
        return t.mT.contiguous().mT
    if layout == "sliced":
        return torch.stack([t, torch.full_like(t, 7e3)], dim=-1).flatten(-2)[..., ::2]
    if layout == "narrowed":
        return torch.nn.functional.pad(t, (3, 2, 1, 2), value=7e3)[..., 1:-2, 3:-2]
    if layout.startswith("expanded"):
        axis = {"expanded batch": 0, "expanded heads": 1, "expanded tokens": 2}[layout]
        return t.narrow(axis, 0, min(1, t.shape[axis])).expand(t.shape)
    return t


LAYOUTS = st.sampled_from(
    [
        "contiguous",
        "transposed",
        "width first",
        "sliced",
        "narrowed",
        "expanded batch",
        "expanded heads",
        "expanded tokens",
    ]
)


@st.composite
def broadcastable(draw, shape):
    "Some shape that broadcasts to `shape`, and whether the tensor is to be expanded to all of it."
    kept = [size if draw(st.booleans()) else 1 for size in shape]
    return kept[draw(st.integers(0, len(shape) - 1)) :], draw(st.booleans())


def spread(t, full, expanded):
    return t.expand(full) if expanded else t


def largest_logit(q, k, scale):
    "A bound of every scaled dot product, and of everything that is added up for it."
    if 0 in q.shape or 0 in k.shape:
        return 0.0
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return ((q.double().abs() @ k.double().abs().mT).max() * abs(scale)).item()


@st.composite
def sizes(draw):
    "b, h, g, n, m, d, dv; sometimes so many keys that `auto` takes torch's kernel."
    g, r = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    b, n, m, d, dv = (draw(st.integers(*ends)) for ends in ((0, 2), (0, 4), (0, 6), (1, 9), (1, 9)))
    if draw(st.booleans()):
        b, n, m = max(b, 1), max(n, 1), draw(st.integers(16, 19))
    return b, g * r, g, n, m, d, dv


@st.composite
def problems(draw, dtype=None):
    "Heads of any size, layout and magnitude, and any options that `attention` knows, for both tensors and numbers."
    b, h, g, n, m, d, dv = draw(sizes())
    dtype = draw(st.sampled_from(DTYPES)) if dtype is None else dtype
    torch.manual_seed(draw(st.integers(0, 10**6)))
    options = {
        "scale": draw(st.sampled_from([None, None, None, 0.2, -0.4, 0.0, 50.0, 1e4, 1e-3, 4e-5, 1e-6])),
        "is_causal": draw(st.booleans()),
        "window": draw(windows(m)),
        "softcap": draw(st.sampled_from([None, None, 0.5, 30.0, 1e4])),
    }
    q, k, v = (torch.randn(shape, dtype=torch.float64) for shape in ((b, h, n, d), (b, g, m, d), (b, g, m, dv)))
    q = draw(resized(q, k, options["scale"], dtype))
    q, k, v = (strided(t.to(dtype), draw(LAYOUTS)) for t in (q, k, v))
    if draw(st.booleans()):
        options["mask"] = draw(masks((b, h, n, m)))
    if draw(st.booleans()):
        options["bias"] = draw(biases((b, h, n, m), dtype))
    if draw(st.booleans()):
        options["sinks"] = draw(sinks_of(h, dtype))
    return Problem(q, k, v, options, draw(st.booleans()))


@st.composite
def resized(draw, q, k, scale, dtype):
    "Queries whose largest logit is what was drawn: from one that vanishes to one that a float16 just holds."
    wanted = draw(st.sampled_from([None, None, 1.0, 10.0, 1e4, 1e-8, 0.0]))
    had = largest_logit(q, k, q.shape[3] ** -0.5 if scale is None else scale)
    if wanted == 0.0:
        return q * torch.finfo(dtype).tiny * 0.1  # subnormal numbers
    if wanted is None or had == 0.0:
        return q
    return q * min(wanted / had, 1e4 / q.abs().max().item())


@st.composite
def masks(draw, full):
    "A mask that hides nothing, a part or everything, and broadcasts to `full`."
    shape, expanded = draw(broadcastable(full))
    return spread(torch.rand(shape) < draw(st.sampled_from([0.0, 0.2, 0.6, 1.0])), full, expanded)


@st.composite
def biases(draw, full, dtype):
    "A bias of any size and level, as low as half the lowest number of its dtype, with -inf in some places."
    shape, expanded = draw(broadcastable(full))
    bias = torch.randn(shape) * draw(st.sampled_from([1.0, 1.0, 1e-8, 5e3]))
    far = -3e4 if dtype == torch.float16 else -1e9
    lowest = torch.finfo(dtype).min if dtype != torch.float64 else -1e300
    bias = bias + draw(st.sampled_from([0.0, 0.0, 3e4, -3e4, far, lowest / 2]))
    hidden = torch.rand(shape) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    return spread(bias.masked_fill(hidden, -math.inf).to(dtype), full, expanded)


SINK_LEVELS = [
    [0.0],
    [0.0, 9.0],
    [-1e4],
    [1e4],
    [-math.inf],
    [math.inf],
    [-math.inf, 0.0, math.inf, 1e4, -3e4],
]


@st.composite
def sinks_of(draw, h, dtype):
    "A sink for each head, near one of the levels that were drawn together."
    levels = torch.tensor(draw(st.sampled_from(SINK_LEVELS)))
    return (torch.randn(h) + levels[torch.randint(len(levels), (h,))]).to(dtype)


@st.composite
def windows(draw, m):
    side = st.sampled_from([None, 0, 1, 2, m, m + 5, 10**30])
    width = st.sampled_from([1, 2, 3, max(1, m - 1), max(1, m), m + 9])
    return draw(st.one_of(st.none(), width, st.tuples(side, side)))


# The check


def plainly(q, k, v, *, mask=None, bias=None, is_causal=False, window=None, scale=None, softcap=None, sinks=None):
    "The definition in the dtype of its inputs, written once more and without any function of the package."
    b, h, n, d = q.shape
    m, group = k.shape[2], torch.arange(h) // max(1, h // max(1, k.shape[1]))
    logits = (q * (d**-0.5 if scale is None else scale)) @ k[:, group].mT
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logits = logits if bias is None else logits + bias
    left, right = (window - 1, 0) if isinstance(window, int) else window or (None, None)
    right = 0 if is_causal else right
    ahead = torch.arange(m) - (m - n + torch.arange(n)[:, None])  # of the query's own place
    seen = torch.ones(n, m, dtype=torch.bool)
    seen = seen if left is None else seen & (ahead >= -min(left, n + m))
    seen = seen if right is None else seen & (ahead <= min(right, n + m))
    seen = (seen if mask is None else seen & mask) & (logits > -math.inf)
    logits = logits.masked_fill(~seen, -math.inf)
    sink = logits.new_full((h, 1, 1), -math.inf) if sinks is None else sinks[:, None, None]
    sink = sink.clamp(max=torch.finfo(q.dtype).max)
    row = torch.cat([logits, sink.expand(b, h, n, 1)], dim=-1)
    row = row.masked_fill((row == -math.inf).all(-1, keepdim=True), 0.0).softmax(-1)[..., :-1]
    return row.masked_fill(~seen, 0.0) @ v[:, group]


def bits(t):
    "A copy of what `t` holds, as bytes."
    return t.detach().clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


def learned(problem):
    "Names of the options that have a gradient."
    return [name for name in ("bias", "sinks") if name in problem.options]


def magnitudes(problem, exact, upstream):
    """How large the numbers are that errors are relative to: for the output the values, for a gradient what is added
    up for it; both times the size of the logits, since an error in a logit is one in the exponent.
    """
    q, k, v, options, _ = problem
    scale = q.shape[3] ** -0.5 if options["scale"] is None else options["scale"]
    added = [t[t.isfinite()].abs() for name in learned(problem) for t in [options[name].double()]]
    size = lambda *ts: max([t.detach().double().abs().max().item() for t in ts if t.numel()], default=0.0)  # noqa: E731
    cond = max(1.0, largest_logit(q, k, scale) / 8, size(*added) / 8)
    through = size(v) * size(upstream) * v.shape[3]
    parts = [size(v), through * size(k) * abs(scale), through * size(q) * abs(scale), size(upstream)]
    parts += [through] * len(learned(problem))
    return [cond * max(part, size(t)) for part, t in zip(parts, exact)]


def lacking(impl, problem):
    "What an implementation says that it has not, as the tests of chapter 7 state it."
    scale = problem.options["scale"]
    if impl == "sdpa":
        odd = scale is not None and not 2**-15 <= abs(scale) < 2**15
        return bool(problem.options["softcap"]) or ("sinks" in problem.options and odd)
    sizes = *problem.q.shape, *problem.k.shape, problem.v.shape[3]
    return impl == "flex" and (0 in sizes or problem.grad)


def check(problem, ways):
    """Every way to compute attention is the loop: its output, and its gradients where they are asked for.

    `ways` are functions, or names of implementations. Inputs are left as they were, to the bit.
    """
    q, k, v, options, grad = problem
    given = [q, k, v, *(t for t in options.values() if isinstance(t, torch.Tensor))]
    before = [bits(t) for t in given]
    upstream = torch.randn(*q.shape[:3], v.shape[3]).to(q.dtype).double()
    run = outcome if grad else outputs
    wide = {name: t.double() if name in ("bias", "sinks") else t for name, t in options.items()}
    exact = run(reference_attention, [t.double() for t in (q, k, v)], wide, upstream)
    plain = run(plainly, [q, k, v], options, upstream)
    for way in ways:
        named = isinstance(way, str)
        attend = partial(attention, impl=way) if named else way
        if named and lacking(way, problem):
            with pytest.raises(NotImplementedError, match=f'impl="{way}" lacks .*impl="auto"'):
                run(attend, [q, k, v], options, upstream)
        else:
            compare(problem, way, run(attend, [q, k, v], options, upstream), exact, plain, upstream)
    assert all(torch.equal(bits(t), old) for t, old in zip(given, before)), "an input was changed"


def compare(problem, way, got, exact, plain, upstream):
    "Hold the output of one way, and its gradients if there are any, to the tolerance rule."
    dtype = problem.q.dtype
    names = ["out", "q", "k", "v", *learned(problem)]
    for name, mine, true, simple, size in zip(names, got, exact, plain, magnitudes(problem, exact, upstream)):
        assert mine.dtype == dtype, (way, name)
        overflows = size >= torch.finfo(dtype).max / 64  # by definition, in any implementation
        if mine.numel() and not overflows:
            try:
                assert_as_exact(mine, true, simple, size)
            except AssertionError as wrong:
                raise AssertionError(f"{way}, {name}: {wrong}") from None


def outputs(attend, heads, options, upstream):
    "The output alone."
    return [attend(*heads, **options)]


def outcome(attend, heads, options, upstream):
    "The output, and the gradients of q, k, v, bias and sinks, all as they lie in memory."
    names = [name for name in ("bias", "sinks") if name in options]
    leaves = [t.detach().requires_grad_() for t in [*heads, *(options[name] for name in names)]]
    out = attend(*leaves[:3], **options | dict(zip(names, leaves[3:])))
    if not out.requires_grad:  # nothing was visible, so the loop touched nothing
        return [out, *map(torch.zeros_like, leaves)]
    grads = torch.autograd.grad(out, leaves, upstream.to(out), allow_unused=True)
    return [out, *(torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves))]


# All options together


@settings(max_examples=800)
@given(problems())
def test_every_call_is_the_loop(problem):
    check(problem, ["math", "sdpa", "auto"])


@settings(max_examples=200)
@given(problems(torch.float64))
def test_in_float64_every_call_is_the_loop(problem):
    check(problem._replace(grad=True), ["math", "sdpa", "auto"])


@given(problems())
def test_every_call_by_flex_is_the_loop(problem):
    check(problem._replace(grad=False), ["flex"])


def test_both_ways_of_auto_are_tried():
    chosen = set()

    @settings(max_examples=100)
    @given(problems())
    def collect(problem):
        chosen.add(explain_dispatch(problem.q, problem.k, problem.v, **problem.options).impl)

    collect()
    assert chosen == {"math", "sdpa"}


# The same for the weights, and for the layer


@settings(max_examples=60)
@given(problems(torch.float64))
def test_weights_are_the_loop_over_the_identity(problem):
    q, k, _, options, _ = problem
    weights = attention_weights(q, k, **options)
    eye = torch.eye(k.shape[2], dtype=q.dtype).expand(*k.shape[:2], -1, -1)
    exact = reference_attention(q, k, eye, **options)
    assert_as_exact(weights, exact, exact, magnitudes(problem, [exact], exact)[0]) if weights.numel() else None
    # rows sum to 1, to 0 where nothing is seen, and with a sink to what the sink leaves
    total, seen = weights.sum(-1), (exact > 0).any(-1)
    assert weights.min() >= 0 if weights.numel() else True
    assert not total[~seen].any()
    if "sinks" not in options:
        torch.testing.assert_close(total[seen], torch.ones_like(total[seen]), atol=1e-12, rtol=0)
    else:
        assert (total <= 1 + 1e-12).all()
        silent = (options["sinks"] == -math.inf)[:, None].expand_as(seen) & seen
        torch.testing.assert_close(total[silent], torch.ones_like(total[silent]), atol=1e-12, rtol=0)
        assert not total[(options["sinks"] == math.inf)[:, None].expand_as(total)].any()


@settings(max_examples=80)
@given(problems(), st.integers(1, 9), st.booleans(), st.sampled_from(["math", "sdpa", "auto"]), st.data())
def test_the_layer_is_its_projections_and_the_loop(problem, width, across, impl, data):
    "Grouped heads, padding, mask and bias, with the options bound to the plug; in float64."
    q, k, _, options, _ = problem
    b, h, n, d, g, m = *q.shape, *k.shape[1:3]
    across = across or n != m
    bound = {name: options[name] for name in ("window", "softcap", "scale")}
    if "sinks" in options:
        bound["sinks"] = options["sinks"].double()
    plug = partial(attention, impl="math" if impl == "sdpa" and lacking(impl, problem) else impl, **bound)
    layer = MultiHeadAttention(width, h, num_kv_heads=g, head_dim=d, attend=plug, dtype=torch.float64)
    x = torch.randn(b, n, width, dtype=torch.float64)
    context = torch.randn(b, m, width, dtype=torch.float64) if across else None
    call = {name: options[name] for name in ("mask", "is_causal") if name in options}
    call["bias"] = options["bias"].double() if "bias" in options else None
    real = torch.rand(b, m) < 0.7 if data.draw(st.booleans()) else None
    y = layer(x, context, key_mask=real, **call)
    heads = [
        by_row(layer, part, count, x if part == "q" or context is None else context)
        for part, count in (("q", h), ("k", g), ("v", g))
    ]
    mask = options.get("mask", torch.tensor(True))
    call["mask"] = mask if real is None else mask & real[:, None, None]
    loop = reference_attention(*heads, **call, **bound)
    expected = layer.out_proj(torch.cat([loop[:, i] for i in range(h)], dim=-1))
    size = max(1.0, largest_logit(*heads[:2], d**-0.5 if bound["scale"] is None else bound["scale"]) / 8)
    extra = [
        t[t.isfinite()].abs().max().item()
        for t in (call["bias"], bound.get("sinks"))
        if t is not None and t.isfinite().any()
    ]
    if y.numel():
        assert_as_exact(y, expected, expected, max(size, *extra, 1.0) * max(1.0, expected.abs().max().item()))


def by_row(layer, part, count, tokens):
    "Queries, keys or values, each head from its own rows of the matrix."
    rows = [layer.layout.rows(part, i) for i in range(count)]
    return torch.stack([tokens @ layer.in_proj.weight[r].T + layer.in_proj.bias[r] for r in rows], dim=1)


# The check can fail: attention with one fault is noticed, and so is an input that was written to


def faulty(name):
    "`attention` with one fault."

    def attend(q, k, v, **options):
        groups = q.shape[1] // k.shape[1]
        return FAULTS[name](
            lambda q, k, v, **changed: attention(q, k, v, impl="math", **options | changed), q, k, v, options, groups
        )

    return attend


def cap_after_mask(attend, q, k, v, options, groups):
    "The cap lifts what is hidden from minus infinity to minus the cap."
    if not options["softcap"]:
        return attend(q, k, v)
    m, cap, hidden = k.shape[2], options["softcap"], -torch.inf
    eye = torch.eye(m, dtype=q.dtype).expand(*k.shape[:2], -1, -1)
    seen = attend(q * 0, k, eye, bias=None, sinks=None) > 0
    scale = q.shape[3] ** -0.5 if options["scale"] is None else options["scale"]
    logits = ((q * scale) @ k.repeat_interleave(groups, 1).mT + options.get("bias", 0.0)).masked_fill(~seen, hidden)
    weights = (cap * torch.tanh(logits / cap)).softmax(-1)
    return weights @ v.repeat_interleave(groups, 1)


def window_too_wide(attend, q, k, v, options, groups):
    window = options["window"]
    return attend(q, k, v, window=window + 1 if isinstance(window, int) else window)


def tiled_heads(attend, q, k, v, options, groups):
    return attend(q, k.repeat(1, groups, 1, 1), v.repeat(1, groups, 1, 1))


def sink_twice(attend, q, k, v, options, groups):
    return attend(q, k, v, sinks=options["sinks"] + math.log(2) if "sinks" in options else None)


def start_aligned(attend, q, k, v, options, groups):
    n, m = q.shape[2], k.shape[2]
    first = torch.ones(n, m, dtype=torch.bool).tril() & options.get("mask", torch.tensor(True))
    return attend(q, k, v, mask=first, is_causal=False) if options["is_causal"] else attend(q, k, v)


def written_to(attend, q, k, v, options, groups):
    out = attend(q, k, v)
    if q.numel():
        q.detach()[..., :1, :1].neg_()
    return out


FAULTS = {
    "the cap after the mask": cap_after_mask,
    "a window one too wide": window_too_wide,
    "tile instead of repeat_interleave": tiled_heads,
    "a sink counted twice": sink_twice,
    "causality from the start": start_aligned,
    "an input written to": written_to,
    "the bias dropped": lambda attend, q, k, v, options, groups: attend(q, k, v, bias=None),
    "the mask dropped": lambda attend, q, k, v, options, groups: attend(q, k, v, mask=None),
    "the scale dropped": lambda attend, q, k, v, options, groups: attend(q, k, v, scale=None),
    "the sink dropped": lambda attend, q, k, v, options, groups: attend(q, k, v, sinks=None),
    "scores in half the digits": lambda attend, q, k, v, options, groups: attend(
        (q.half() if q.dtype == torch.float32 else q.float()).to(q.dtype), k, v
    ),
    "a gradient lost": lambda attend, q, k, v, options, groups: attend(q, k.detach(), v),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault):
    @settings(max_examples=300, database=None, phases=[Phase.generate], report_multiple_bugs=False)
    @given(problems())
    def try_it(problem):
        check(problem, [faulty(fault)])

    with pytest.raises(AssertionError):
        try_it()


def test_without_a_fault_nothing_is_noticed():
    FAULTS["none"] = lambda attend, q, k, v, options, groups: attend(q, k, v)
    try:

        @given(problems())
        def try_it(problem):
            check(problem, [faulty("none")])

        try_it()
    finally:
        del FAULTS["none"]


def test_a_refusal_that_nobody_expected_is_noticed(monkeypatch):
    everything = BACKENDS["sdpa"]
    monkeypatch.setitem(BACKENDS, "sdpa", type(everything)(everything.run, lambda call: "it all", everything.declines))

    @settings(phases=[Phase.generate], database=None)
    @given(problems())
    def try_it(problem):
        check(problem, ["sdpa"])

    with pytest.raises(NotImplementedError):
        try_it()
