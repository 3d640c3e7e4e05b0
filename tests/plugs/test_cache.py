"""The cache changes nothing: however texts are cut, padded and interrupted, each row's outputs are those of the row
alone."""

import copy
import inspect
import types
from functools import partial
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mha_book.plugs.cache
from mha_book.heads.layer import MultiHeadAttention
from mha_book.instruments.testing import SIZES
from mha_book.kernels.backends import attention
from mha_book.plugs.cache import KVCache
from mha_book.plugs.logits import SinkAttention
from mha_book.plugs.positions import ALiBi, RelativeBias
from mha_book.plugs.rope import RoPE
from mha_book.plugs.rope_scaling import RoPENTKScaling, RoPEYaRNScaling
from mha_book.variants.grouped import folded_attend
from support.refusals import refused

settings.register_profile("book", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("book")
s = SIZES
float64 = dict(dtype=torch.float64)
close = partial(torch.testing.assert_close, atol=1e-12, rtol=0)


# --- position schemes, and what `attend` may be: one line each ------------------------------------------------------


def sinks():
    plug = SinkAttention(s.h, **float64)
    nn.init.normal_(plug.sinks)
    return plug


def buckets():
    plug = RelativeBias(s.h, num_buckets=6, max_distance=5, bidirectional=False, **float64)
    nn.init.normal_(plug.weight)
    return plug


ROPE = partial(RoPE, s.d, 30.0)
POSITIONS = {
    "no position": None,
    "RoPE": ROPE(),
    "RoPE, neighbours": ROPE(pairing="interleaved"),
    "RoPE in part": ROPE(rotary_dim=4),
    "RoPE, NTK-aware": ROPE(frequencies=RoPENTKScaling(4)),
    "RoPE, YaRN": ROPE(frequencies=RoPEYaRNScaling(4, 8, fast_turns=4), magnitude=1.1),
}
ATTENDS = {
    "fused": lambda: None,
    "math": lambda: partial(attention, impl="math"),
    "window": lambda: partial(attention, window=3),
    "softcap": lambda: partial(attention, softcap=1.5),
    "sinks": sinks,
    "folded": lambda: folded_attend,
    "ALiBi": lambda: ALiBi(s.h),
    "T5's buckets": buckets,
}
ROLLING = {
    "keeps all": {},
    "rolls": dict(window=3),
    "rolls, first 2 stay": dict(window=2, keep_first=2),
    "window 1": dict(window=1, keep_first=1),
}


def build(position=None, attend=None, g=s.g, **options):
    torch.manual_seed(1)
    layer = MultiHeadAttention(
        s.e, s.h, num_kv_heads=g, head_dim=s.d, position=position, attend=attend, **float64, **options
    ).requires_grad_(False)
    for name, p in layer.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p)
    return layer


def cache_for(rows, max_len, g=s.g, kind=KVCache, **options):
    cache = kind(rows, g, max_len, s.d, **float64, **options)
    for buffer in cache.k, cache.v:  # memory that nobody wrote
        buffer.fill_(float("nan"))
    return cache


# --- texts, cut and padded ------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    "One call: of each row, padding before its new tokens, and how many there are; the rest is padding after them."

    width: int
    rows: tuple  # of (lead, count)


@st.composite
def pieces(draw, rows=s.b, padded=True, most=4):
    width = draw(st.integers(1, most))
    if not padded:
        return Piece(width, ((0, width),) * rows)
    counts = [draw(st.integers(0, width)) for _ in range(rows)]
    return Piece(width, tuple((draw(st.integers(0, width - count)), count) for count in counts))


def texts(draw_pieces):
    return st.lists(draw_pieces, min_size=1, max_size=7)


def slack(options, wanted):
    "Slots: few enough that the memory's end is reached, and chunks do not fit in place."
    return options["window"] + options.get("keep_first", 0) + wanted if options else 40


def tokens(cut):
    "A text for each row, as long as its pieces say."
    torch.manual_seed(2)
    return [torch.randn(sum(p.rows[r][1] for p in cut), s.e, **float64) for r in range(len(cut[0].rows))]


def decode(layer, cache, rows, cut):
    "Each row's outputs for its real tokens, piece by piece. Padding is loud."
    done, out = [0] * len(rows), [[] for _ in rows]
    for piece in cut:
        x, real = torch.full((len(rows), piece.width, s.e), 7.0, **float64), torch.zeros(len(rows), piece.width).bool()
        for r, (lead, count) in enumerate(piece.rows):
            x[r, lead : lead + count] = rows[r][done[r] : done[r] + count]
            real[r, lead : lead + count] = True
            done[r] += count
        every = real.all() and piece.width % 2  # sometimes it is said that all are real, sometimes not
        y = layer(x, is_causal=True, cache=cache, key_mask=None if every else real)
        for r, (lead, count) in enumerate(piece.rows):
            out[r].append(y[r, lead : lead + count])
    return [torch.cat(parts) for parts in out]


def rolling_mask(n, window=None, keep_first=0):
    "The closed form: place p sees place j where j < keep_first or p - j < window."
    p, j = torch.arange(n)[:, None], torch.arange(n)
    return (j < keep_first) | (p - j < (window or n))


def alone(layer, row, **rolling):
    "The whole row at once, without a cache."
    return layer(row[None], is_causal=True, mask=rolling_mask(len(row), **rolling))[0]


def assert_same(layer, cut, cache, **rolling):
    rows = tokens(cut)
    for got, row in zip(decode(layer, cache, rows, cut), rows):
        close(got, alone(layer, row, **rolling))
    assert cache.seen.tolist() == [len(row) for row in rows]


# a window of its own, or a bias by slots, takes first tokens that stay for as near, or as far, as they stand
BY_SLOT = "window", "ALiBi", "T5's buckets"
PAIRS = [("RoPE", attend) for attend in ATTENDS] + [(position, "fused") for position in POSITIONS if position != "RoPE"]
GRID = [
    (position, attend, rolling)
    for position, attend in PAIRS
    for rolling in ROLLING
    if not (attend in BY_SLOT and "keep_first" in ROLLING[rolling])
]


@pytest.mark.parametrize("position, attend, rolling", GRID)
@given(data=st.data())
def test_any_cut_gives_what_each_row_gives_alone(position, attend, rolling, data):
    rolling = ROLLING[rolling]
    cut = data.draw(texts(pieces(padded=data.draw(st.booleans()))))
    layer = build(POSITIONS[position], ATTENDS[attend]())
    cache = cache_for(s.b, slack(rolling, data.draw(st.integers(0, 4))), **rolling)
    with torch.set_grad_enabled(data.draw(st.booleans())):
        assert_same(layer, cut, cache, **rolling)


ONE_BY_ONE = [Piece(1, ((0, 1),) * s.b)] * 9
CUTS = {
    "one by one": ONE_BY_ONE,
    "at once": [Piece(9, ((0, 9),) * s.b)],
    "uneven": [Piece(w, ((0, w),) * s.b) for w in (4, 1, 3, 1)],
    "left padding": [Piece(4, ((0, 4), (3, 1)))] + ONE_BY_ONE[:5],
    "right padding": [Piece(4, ((0, 4), (0, 1)))] + ONE_BY_ONE[:5],
    "padding in the middle": [Piece(2, ((0, 2), (0, 2))), Piece(3, ((2, 1), (0, 2))), Piece(3, ((1, 1), (3, 0)))],
}


@torch.no_grad()
def named_cut(cut, rolling, g=s.g, kind=KVCache, spare=1):
    cache = cache_for(s.b, slack(ROLLING[rolling], spare), g=g, kind=kind, **ROLLING[rolling])
    assert_same(build(ROPE(), g=g, qk_norm=nn.RMSNorm), CUTS[cut], cache, **ROLLING[rolling])


@pytest.mark.parametrize("g", [1, s.g, s.h])
@pytest.mark.parametrize("rolling", ROLLING)
@pytest.mark.parametrize("cut", CUTS)
def test_named_cuts_with_heads_in_groups(cut, rolling, g):
    named_cut(cut, rolling, g)


def test_a_mask_and_a_bias_of_the_call_hold_beside_the_cache():
    layer, x = build(ROPE()), torch.randn(s.b, 9, s.e, **float64)
    mask, bias = torch.rand(s.b, s.h, 9, 9) < 0.6, torch.randn(s.h, 9, 9, **float64)
    with torch.no_grad():
        whole = layer(x, mask=mask, bias=bias, is_causal=True)
        cache, rows = cache_for(s.b, 9), []
        for start, end in ((0, 4), (4, 5), (5, 9)):
            part = slice(start, end)
            rows.append(
                layer(x[:, part], mask=mask[:, :, part, :end], bias=bias[:, part, :end], is_causal=True, cache=cache)
            )
    close(torch.cat(rows, dim=1), whole)


# --- calls that fail, reorder, reset --------------------------------------------------------------------------------

RAGGED = torch.tensor([[True, True, True, True], [False, True, True, False]])


def started(kind=KVCache, rolling="keeps all", max_len=12, **layer_options):
    "A layer, a cache that has taken a padded prompt, and the prompt."
    layer, x = build(ROPE(), **layer_options), torch.randn(s.b, 4, s.e, **float64)
    cache = cache_for(s.b, max_len, kind=kind, **ROLLING[rolling])
    layer(x, key_mask=RAGGED, is_causal=True, cache=cache)
    return layer, cache, x


def image(cache):
    "All that a cache has: numbers and places."
    region = [t[:, :, cache.start : cache.end].clone() for t in (cache.k, cache.v)]
    return cache.start, cache.end, cache.ragged, cache.seen.tolist(), *region


def same_image(cache, before):
    return all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(image(cache), before))


def failing(layer, cache):
    "Calls that raise, each in another place."
    token, tall = torch.randn(s.b, 1, s.e, **float64), torch.randn(s.b, 40, s.e, **float64)
    wide = copy.copy(layer)
    wide.__dict__ = layer.__dict__ | {"attend": lambda q, k, v, **options: v[..., :2]}
    fails = {
        "attend": lambda: wide(token, cache=cache),
        "mask": lambda: layer(token, mask=torch.ones(2, 3).bool(), cache=cache),
        "bias": lambda: layer(token, bias=torch.ones(99), cache=cache),
        "holes": lambda: layer(
            torch.randn(s.b, 3, s.e, **float64), cache=cache, key_mask=torch.tensor([[True, False, True]] * s.b)
        ),
        "no rows": lambda: cache.reorder(torch.tensor([], dtype=torch.int64)),
        "rows that are not there": lambda: cache.reorder(torch.tensor([0, s.b])),
    }
    return fails | ({} if cache.window else {"full": lambda: layer(tall, cache=cache)})


def check_failures(rolling="keeps all", kind=KVCache):
    layer, cache, _ = started(kind, rolling)
    twin, before = copy.deepcopy(cache), image(cache)
    for name, call in failing(layer, cache).items():
        with pytest.raises((ValueError, TypeError, RuntimeError, IndexError)):
            call()
        assert same_image(cache, before), name
        new = torch.randn(s.b, 2, s.e, **float64)
        one, other = (layer(new, is_causal=True, cache=copy.deepcopy(c)) for c in (cache, twin))
        assert torch.equal(one, other), name


@pytest.mark.parametrize("rolling", ROLLING)
@pytest.mark.parametrize("grad", [False, True])
def test_after_a_call_that_failed_the_next_is_right(rolling, grad):
    with torch.set_grad_enabled(grad):
        check_failures(rolling)


@torch.no_grad()
def check_reorder(rolling="keeps all", kind=KVCache, chosen=(1, 1, 0)):
    layer, cache, x = started(kind, rolling)
    rows = torch.tensor(chosen)
    layer.attention_map(torch.randn(s.b, 1, s.e, **float64), cache=cache)  # appended, and forgotten
    cache.reorder(rows)
    with pytest.raises(RuntimeError, match="append comes first"):
        cache.commit()
    other = cache_for(len(rows), 12, kind=kind, **ROLLING[rolling])
    layer(x[rows], key_mask=RAGGED[rows], is_causal=True, cache=other)
    for n in (1, 2, 1, 1, 3):
        new = torch.randn(len(rows), n, s.e, **float64)
        close(*(layer(new, is_causal=True, cache=c) for c in (cache, other)))
    assert cache.seen.tolist() == other.seen.tolist() == [8 + RAGGED[r].sum() for r in chosen]


@pytest.mark.parametrize("chosen", [(1, 1, 0), (0,), (1, 0), (0, 1, 1, 0, 1)])
@pytest.mark.parametrize("rolling", ROLLING)
def test_reordered_rows_are_those_that_were_chosen(rolling, chosen):
    check_reorder(rolling, chosen=chosen)


@torch.no_grad()
def check_looks_and_resets(kind=KVCache, rolling="rolls, first 2 stay"):
    layer, cache, x = started(kind, rolling)
    before, new = image(cache), torch.randn(s.b, 5, s.e, **float64)
    layer.attention_map(new, is_causal=True, cache=cache)
    assert same_image(cache, before)
    cache.append(*torch.randn(2, s.b, s.g, 3, s.d, **float64))  # replaced by the next one
    layer(new, is_causal=True, cache=cache)
    twin = started(kind, rolling)[1]
    twin.reset()
    layer(x, key_mask=RAGGED, is_causal=True, cache=twin)
    layer(new, is_causal=True, cache=twin)
    token = torch.randn(s.b, 1, s.e, **float64)
    assert torch.equal(*(layer(token, is_causal=True, cache=c) for c in (cache, twin)))
    twin.append(*torch.randn(2, s.b, s.g, 1, s.d, **float64))
    twin.reset()
    assert twin.seen.tolist() == [0] * s.b and "used 0 of" in repr(twin)
    with pytest.raises(RuntimeError, match="append comes first"):
        twin.commit()


@pytest.mark.parametrize("rolling", ROLLING)
def test_looks_change_nothing_and_a_reset_cache_is_new(rolling):
    check_looks_and_resets(rolling=rolling)


# --- memory, dtypes, gradients --------------------------------------------------------------------------------------


@torch.no_grad()
def check_ordinary_steps(kind=KVCache):
    for rolling in ROLLING:
        cache = cache_for(s.b, 12, kind=kind, **ROLLING[rolling])
        for _ in range(20 if ROLLING[rolling] else 12):
            k, v, mask = cache.append(*torch.randn(2, s.b, s.g, 1, s.d, **float64))
            assert mask is None and k._base is cache.k and v._base is cache.v
            cache.commit()


def test_an_ordinary_step_moves_nothing_and_needs_no_mask():
    check_ordinary_steps()


def test_the_view_ends_where_the_tokens_end():
    cache = cache_for(1, 8)
    for n in range(1, 9):
        k, v, _ = cache.append(*torch.full((2, 1, s.g, 1, s.d), float(n), **float64))
        cache.commit()
        assert k[0, 0, :, 0].tolist() == v[0, 0, :, 0].tolist() == list(range(1, n + 1))
    assert cache.nbytes == 2 * s.g * 8 * s.d * 8 and repr(cache) == "KVCache(1 rows, 3 heads of 8, used 8 of 8)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_are_kept_as_they_came(dtype):
    cache = KVCache(s.b, s.g, 9, s.d, value_dim=s.dv, dtype=dtype)
    k, v = torch.randn(s.b, s.g, 5, s.d, dtype=dtype), torch.randn(s.b, s.g, 5, s.dv, dtype=dtype)
    for part in (0, 3), (3, 5):
        shown = cache.append(k[:, :, slice(*part)], v[:, :, slice(*part)])
        cache.commit()
    assert torch.equal(shown[0], k) and torch.equal(shown[1], v) and shown[0].dtype == dtype


@pytest.mark.parametrize("rolling", ROLLING)
def test_gradients_are_those_of_a_constant_past(rolling):
    layer, x = build(ROPE()).requires_grad_(True), torch.randn(s.b, 9, s.e, **float64)
    cache = cache_for(s.b, 12, **ROLLING[rolling])
    layer(x[:, :5], is_causal=True, cache=cache)
    new = x[:, 5:].clone().requires_grad_()
    layer(new, is_causal=True, cache=cache).square().sum().backward()
    got = [new.grad, *(p.grad.clone() for p in layer.parameters())]
    layer.zero_grad()
    again, mask = x[:, 5:].clone().requires_grad_(), rolling_mask(9, **ROLLING[rolling])
    q, k, v, _ = layer._heads(torch.cat([x[:, :5], again], dim=1), None, None, None, None)
    q, k, v = q[:, :, 5:], *(torch.cat([t[:, :, :5].detach(), t[:, :, 5:]], dim=2) for t in (k, v))
    out = layer.out_proj(attention(q, k, v, mask=mask[5:], is_causal=True).transpose(1, 2).flatten(2))
    out.square().sum().backward()
    for a, b in zip(got, [again.grad, *(p.grad for p in layer.parameters())]):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
    assert not cache.k.requires_grad and cache.k.grad_fn is None


def test_a_graph_survives_later_calls():
    "What a call read may not be overwritten before its backward pass."
    layer, cache = build(ROPE()).requires_grad_(True), cache_for(s.b, 4, window=2)
    losses = [layer(torch.randn(s.b, 1, s.e, **float64), cache=cache).square().sum() for _ in range(9)]
    sum(losses).backward()


def test_what_was_made_in_inference_mode_works_outside_and_back():
    layer, x = build(ROPE()), torch.randn(s.b, 6, s.e, **float64)
    whole = layer(x, is_causal=True)
    with torch.inference_mode():
        cache = cache_for(s.b, 8)
        parts = [layer(x[:, :2], is_causal=True, cache=cache)]
        cache.reorder(torch.arange(s.b))
    parts.append(layer(x[:, 2:3], is_causal=True, cache=cache))
    with torch.no_grad():
        parts.append(layer(x[:, 3:5], is_causal=True, cache=cache))
    with torch.inference_mode():
        parts.append(layer(x[:, 5:], is_causal=True, cache=cache))
    close(torch.cat(parts, dim=1), whole)


# --- what is refused ------------------------------------------------------------------------------------------------


def new(b=s.b, g=s.g, n=1, d=s.d, dtype=torch.float64, device=None):
    return torch.zeros(b, g, n, d, dtype=dtype, device=device)


REFUSED = {
    "rows": (lambda c: c.append(new(b=3), new(b=3)), ValueError, ("batch", "2", "3")),
    "heads": (lambda c: c.append(new(g=6), new(g=6)), ValueError, ("heads", "3", "6")),
    "width": (lambda c: c.append(new(d=9), new()), ValueError, ("width", "8", "9", "k ")),
    "value width": (lambda c: c.append(new(), new(d=9)), ValueError, ("width", "v ")),
    "lengths": (lambda c: c.append(new(n=2), new()), ValueError, ("one value for every key",)),
    "rank": (lambda c: c.append(new()[0], new()[0]), ValueError, ("batch, heads, tokens, width",)),
    "dtype": (lambda c: c.append(new(dtype=torch.float32), new()), TypeError, ("float64", "float32", "dtype=")),
    "value dtype": (lambda c: c.append(new(), new(dtype=torch.half)), TypeError, ("float16", "v ")),
    "device": (lambda c: c.append(new(device="meta"), new(device="meta")), ValueError, ("cpu", "meta", "device=")),
    "real, dtype": (lambda c: c.append(new(), new(), torch.ones(s.b, 1)), TypeError, ("real", "bool")),
    "real, shape": (lambda c: c.append(new(), new(), torch.ones(s.b, 2).bool()), ValueError, ("real", "(2, 1)")),
    "holes": (
        lambda c: c.append(new(n=3), new(n=3), torch.tensor([[True] * 3, [True, False, True]])),
        ValueError,
        ("row 1", "padding"),
    ),
    "full": (
        lambda c: (c.append(new(n=8), new(n=8)), c.commit(), c.append(new(), new())),
        ValueError,
        ("cache full: 8 of 8 used", "1 more", "max_len"),
    ),
    "too long at once": (lambda c: c.append(new(n=9), new(n=9)), ValueError, ("0 of 8 used", "9 more")),
    "too long in one row": (
        lambda c: (
            c.append(new(n=5), new(n=5), torch.tensor([[True] * 5, [False] * 4 + [True]])),
            c.commit(),
            c.append(new(n=4), new(n=4), torch.tensor([[True] * 4] * 2)),
        ),
        ValueError,
        ("5 of 8 used", "4 more"),
    ),
    "commit alone": (lambda c: c.commit(), RuntimeError, ("append",)),
    "rows as a list": (lambda c: c.reorder([0]), TypeError, ("rows", "int64")),
    "rows as floats": (lambda c: c.reorder(torch.ones(2)), TypeError, ("rows", "int64")),
    "no rows": (lambda c: c.reorder(torch.zeros(0).long()), ValueError, ("at least one row",)),
    "row numbers": (lambda c: c.reorder(torch.tensor([0, 2])), IndexError, ("0 to 1",)),
    "below 0": (lambda c: c.reorder(torch.tensor([0, -1])), IndexError, ("0 to 1",)),
    "max_len 0": (lambda c: KVCache(1, 1, 0, 1), ValueError, ("max_len",)),
    "float": (lambda c: KVCache(1, 1, 8.0, 1), TypeError, ("max_len",)),
    "window 0": (lambda c: KVCache(1, 1, 8, 1, window=0), ValueError, ("window",)),
    "first without a window": (lambda c: KVCache(1, 1, 8, 1, keep_first=2), ValueError, ("keep_first", "window")),
    "first below 0": (lambda c: KVCache(1, 1, 8, 1, window=2, keep_first=-1), ValueError, ("keep_first",)),
    "no room to roll": (lambda c: KVCache(1, 1, 5, 1, window=4, keep_first=2), ValueError, ("max_len 5", "6")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_with_a_way_out(own_messages, name):
    call, error, words = REFUSED[name]
    cache = cache_for(s.b, 8)
    with refused(error, *words):
        call(cache)


# --- planted faults -------------------------------------------------------------------------------------------------


def check_all(kind):
    "A short form of the tests above."
    for rolling in ROLLING:
        for cut in CUTS:
            for spare in (0, 3):
                named_cut(cut, rolling, kind=kind, spare=spare)
    for rolling in "keeps all", "rolls, first 2 stay":
        with torch.no_grad():
            check_failures(rolling, kind)
        check_reorder(rolling, kind)
        check_looks_and_resets(kind, rolling)
    check_ordinary_steps(kind)
    with pytest.raises(ValueError, match="8 of 8 used"):
        REFUSED["full"][0](cache_for(s.b, 8, kind=kind))
    with torch.enable_grad():
        cache = cache_for(s.b, 40, kind=kind)
        assert_same(build(ROPE()), CUTS["uneven"], cache)


FAULTS = {
    "keeps one too few": ("keep_first + window - 1", "keep_first + max(window - 2, 0)"),
    "keeps one too many": (
        "max_len if window is None else keep_first + window - 1",
        "max_len if window is None else keep_first + window",
    ),
    "window one too wide": ("(cache.window - 1, None)", "(cache.window, None)"),
    "window one too narrow": ("(cache.window - 1, None)", "(max(cache.window - 2, 0), None)"),
    "no mask for chunks that roll": ("rolls = cache.window is not None and", "rolls = False and"),
    "a mask for padding only": ("if rolls:\n        near", "if False:\n        near"),
    "no mask for ragged rows": ("rolls or cache.ragged or call.ragged", "rolls"),
    "rows forgotten after the call": ("self.ragged or call.ragged", "call.ragged"),
    "first tokens not carried": ("start > cache.start and cache.keep_first", "False"),
    "first tokens of ragged rows by slot": ("if cache.ragged:    #", "if False:    #"),
    "first tokens hidden": ("near | (token < cache.keep_first)[:, None, None]", "near"),
    "shifts by the padding behind": ("call.lead[:, None]\n    moved", "call.trail[:, None]\n    moved"),
    "does not shift": ("(slots - lead).clamp(min=0), slots)", "slots, slots)"),
    "padding stays on the right": ("(m - call.trail - count)", "(m - count)"),
    "mask forgets the padding behind": ("first = m - call.trail - count", "first = m - count"),
    "padding counts as tokens": ("added = n - lead - trail", "added = n + 0 * lead"),
    "seen not counted": ("self.seen = self.seen + call.added", "self.seen = self.seen + 1"),
    "counted before the call succeeds": ("shown = [place(", "self.seen = self.seen + call.added; shown = [place("),
    "committed at once": (
        "return *shown, _visible(self, call, n, shown[0].shape[2])",
        "seen = _visible(self, call, n, shown[0].shape[2]); self.commit(); "
        "self._call = _Call(0, 0, 0, 0); return *shown, seen",
    ),
    "drops before it shows": (
        "buffer.narrow(2, cache.start, old), new]",
        "buffer.narrow(2, cache.start, old)[:, :, max(0, old + new.shape[2] - cache.most - 1):], new]",
    ),
    "reorder forgets lengths": ("self.seen[rows], None", "self.seen[:1].expand(len(rows)), None"),
    "reorder keeps what was appended": ("self.seen, self._call = self.seen[rows], None", "self.seen = self.seen[rows]"),
    "reset keeps what was appended": (
        "        self._call = None\n",
        "        self._call = getattr(self, '_call', None)\n",
    ),
    "values where keys belong": ("zip((cache.k, cache.v), call.laid_out)", "zip((cache.v, cache.k), call.laid_out)"),
    "does not know that it is full": ("call.longest > cache.max_len", "False"),
    "written one slot too far": (
        "buffer.narrow(2, cache.end, new",
        "buffer.narrow(2, min(cache.end + 1, cache.max_len - new.shape[2]), new",
    ),
    "moved to the front without its end": ("start, end = 0, end - start", "start = 0"),
    "last instead of first tokens": ("token < cache.keep_first, token, token +", "token < 0, token, token +"),
    "rows aligned at the left": ("(length - kept)[:, None]", "0 * kept[:, None]"),
}


def planted(old, new):
    "The module's cache with a fault in it."
    source = inspect.getsource(mha_book.plugs.cache)
    assert source.count(old) == 1, (old, source.count(old))
    module = types.ModuleType("mha_book.broken_cache")
    module.__package__ = "mha_book"
    exec(source.replace(old, new), module.__dict__)
    return module.KVCache


def test_the_short_form_passes_without_a_fault():
    check_all(KVCache)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_noticed(own_messages, name):
    kind = planted(*FAULTS[name])
    with pytest.raises(BaseException) as noticed:
        check_all(kind)
    assert not isinstance(noticed.value, (NameError, SyntaxError)), noticed.value
