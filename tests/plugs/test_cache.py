"""The cache changes nothing: however texts are cut, padded and interrupted, each row's outputs are those of the row
alone."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mha_book.heads.layer import Cache
from mha_book.kernels.backends import attention
from mha_book.plugs.cache import KVCache
from support.caches import (
    ATTENDS,
    CUTS,
    POSITIONS,
    REFUSED,
    ROLLING,
    ROPE,
    assert_cropped,
    assert_same,
    build,
    cache_for,
    close,
    failing,
    float64,
    pieces,
    rolling_mask,
    s,
    slack,
    texts,
)
from support.mutants_caches import SLAB
from support.refusals import refused

settings.register_profile("book", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("book")

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


# --- tokens that are taken back -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rolling", ROLLING)
@given(data=st.data())
def test_after_a_crop_the_cache_never_saw_the_rest(rolling, data):
    options = ROLLING[rolling]
    padded = data.draw(st.booleans())
    first, then = (data.draw(texts(pieces(padded=padded))) for _ in range(2))
    seen = [sum(p.rows[r][1] for p in first) for r in range(s.b)]
    lengths = st.integers(0, max(seen) + 2)
    length = data.draw(lengths | st.lists(lengths, min_size=s.b, max_size=s.b))
    caches = [cache_for(s.b, slack(options, data.draw(st.integers(0, 4))) + 20, **options) for _ in range(2)]
    with torch.set_grad_enabled(data.draw(st.booleans())):
        most = [length] * s.b if isinstance(length, int) else length
        few, window = options.get("keep_first", 0), options.get("window", 0)
        gone = [n > few + window - 1 and few < m < n and window > 1 for n, m in zip(seen, most)]
        if any(gone):
            with pytest.raises(ValueError, match=f"row {gone.index(True)} has seen"):
                assert_cropped(build(ROPE()), first, then, length, *caches)
            assert caches[0].seen.tolist() == seen
        else:
            assert_cropped(build(ROPE()), first, then, length, *caches)


@torch.no_grad()
def check_crops(kind=KVCache):
    cuts = CUTS["left padding"], CUTS["padding in the middle"], CUTS["at once"]
    for options in {}, dict(window=9, keep_first=2), dict(window=1, keep_first=1):
        for first in cuts:
            for length in 0, 1, 3, 20, [4, 2], [2, 4], [0, 5]:
                caches = [cache_for(s.b, 30, kind=kind, **options) for _ in range(2)]
                try:
                    assert_cropped(build(ROPE()), first, CUTS["uneven"], length, *caches)
                except ValueError as error:
                    assert options and "cannot go back" in str(error)
    cache = cache_for(s.b, 9, kind=kind, window=3, keep_first=1)
    cache.append(*torch.zeros(2, s.b, s.g, 6, s.d, **float64))
    cache.commit()
    before = image(cache)
    with pytest.raises(ValueError, match="row 0 has seen 6 tokens and cannot go back to 4.*to 1 or fewer"):
        cache.crop(4)
    assert same_image(cache, before)
    cache.crop(6)
    assert same_image(cache, before)
    cache.crop(1)
    assert cache.seen.tolist() == [1] * s.b


def test_named_crops():
    check_crops()


def test_it_is_a_cache_by_the_protocol():
    assert isinstance(cache_for(1, 4), Cache) and not isinstance([], Cache)


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
    q, k, v = layer.qkv(torch.cat([x[:, :5], again], dim=1))
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
    check_crops(kind)


def test_the_short_form_passes_without_a_fault():
    check_all(KVCache)


@pytest.mark.parametrize("name", SLAB)
def test_a_cache_with_a_fault_is_noticed(own_messages, monkeypatch, name):
    SLAB[name].plant(monkeypatch)
    with pytest.raises(BaseException) as noticed:
        check_all(KVCache)
    assert not isinstance(noticed.value, (NameError, SyntaxError)), noticed.value


@pytest.mark.parametrize("window", [None, 3])
def test_a_length_beyond_every_int_keeps_all(window):
    cache = KVCache(2, 3, 9, 8, window=window)
    cache.append(torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8))
    cache.commit()
    cache.crop(2**70)
    assert cache.seen.tolist() == [5, 5]
    with pytest.raises(ValueError, match="length"):
        cache.crop(-(2**70))
