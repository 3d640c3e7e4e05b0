"""Each row of a quantised cache reads as rounding the whole row would, however it came; its bytes are as promised."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mha_book.heads.layer import Cache, commit_once
from mha_book.plugs import quantized_cache as module
from mha_book.plugs.cache import KVCache
from mha_book.plugs.quantize import KV_FORMATS, HeadPrecision, round_keys, round_values
from mha_book.plugs.quantized_cache import (
    Layout,
    Plan,
    QuantizedKVCache,
    QuantizedSlots,
    Row,
    Strip,
    promised_bytes,
)
from support.caches import (
    ATTENDS,
    CUTS,
    REFUSED,
    ROLLING,
    ROPE,
    assert_cropped,
    assert_same,
    build,
    failing,
    float64,
    pieces,
    s,
    serve,
    texts,
)
from support.mutants_caches import Mutant
from support.refusals import refused

settings.register_profile("book", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("book")

assert s.g == 3
MIXED = HeadPrecision(("int4", "int4", "int7"), ("int8", "float16", "int3"), group=3)
EXACT = HeadPrecision(MIXED.keys, MIXED.values, group=3, exact_first=10**6)  # nothing is rounded
FORMATS = st.sampled_from(sorted(KV_FORMATS))


def cache_of(rows=s.b, precision=MIXED, max_len=60, dtype=torch.float32, **options):
    return QuantizedKVCache(rows, precision, max_len, s.d, dtype=dtype, **options)


def exact(rows=s.b, max_len=60, **options):
    return cache_of(rows, EXACT, max_len, torch.float64, **options)


# what a HeadPrecision is made of
PARTS = st.tuples(st.tuples(*[FORMATS] * s.g), st.tuples(*[FORMATS] * s.g), st.integers(1, 5), st.integers(0, 4))


# --- where nothing is rounded it is the exact cache -----------------------------------------------------------------


@pytest.mark.parametrize("position, attend", [("no position", "fused"), *(("RoPE", attend) for attend in ATTENDS)])
@given(data=st.data())
@settings(max_examples=10)
def test_any_cut_gives_what_each_row_gives_alone(position, attend, data):
    cut = data.draw(texts(pieces(padded=data.draw(st.booleans()))))
    with torch.set_grad_enabled(data.draw(st.booleans())):
        assert_same(build(ROPE() if position == "RoPE" else None, ATTENDS[attend]()), cut, exact())


@pytest.mark.parametrize("rolling", ROLLING)
@given(data=st.data())
def test_any_cut_with_a_window(rolling, data):
    cut = data.draw(texts(pieces(padded=data.draw(st.booleans()))))
    with torch.set_grad_enabled(data.draw(st.booleans())):
        assert_same(build(ROPE()), cut, exact(**ROLLING[rolling]), **ROLLING[rolling])


@pytest.mark.parametrize("rolling", ROLLING)
@pytest.mark.parametrize("seed", range(2))
def test_in_a_running_batch_each_row_is_the_row_alone(rolling, seed):
    serve(build(ROPE()), lambda rows: exact(rows, **ROLLING[rolling]), seed, **ROLLING[rolling])


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, dict(window=9, keep_first=2), dict(window=1, keep_first=1)])
def test_after_a_crop_the_cache_never_saw_the_rest(options):
    for first in CUTS.values():
        for length in 0, 1, 3, 20, [4, 2], [2, 4], [0, 5]:
            try:
                assert_cropped(build(ROPE()), first, CUTS["uneven"], length, *(exact(**options) for _ in range(2)))
            except ValueError as error:
                assert options and "cannot go back" in str(error)


@pytest.mark.parametrize("rolling", ROLLING)
@given(data=st.data())
def test_float32_everywhere_is_the_exact_cache_bit_for_bit(rolling, data):
    cut, options = data.draw(texts(pieces(padded=data.draw(st.booleans())))), ROLLING[rolling]
    floats = HeadPrecision.uniform(s.g, "float32", group=data.draw(st.integers(1, 4)))
    torch.manual_seed(3)
    caches = cache_of(precision=floats, **options), KVCache(s.b, s.g, 60, s.d, **options)
    layer = build(ROPE()).float()
    for piece in cut:
        x, real = torch.randn(s.b, piece.width, s.e), torch.zeros(s.b, piece.width).bool()
        for r, (lead, count) in enumerate(piece.rows):
            real[r, lead : lead + count] = True
        got, wanted = (layer(x, is_causal=True, cache=c, key_mask=None if real.all() else real) for c in caches)
        assert torch.equal(got[real], wanted[real])


# --- what is stored: rounding the whole row says it too --------------------------------------------------------------


class Text:
    "One row by the definition: its numbers, and what `round_keys` and `round_values` make of them."

    def __init__(self, precision, first):
        self.precision, self.first = precision, first
        self.k, self.v = (torch.zeros(s.g, 0, s.d) for _ in range(2))

    def add(self, k, v):
        self.k, self.v = torch.cat([self.k, k], 1), torch.cat([self.v, v], 1)

    def read(self):
        first, p = self.first, self.precision
        keys = [round_keys(self.k[None, i : i + 1, first:], form, p.group)[0, 0] for i, form in enumerate(p.keys)]
        values = [round_values(self.v[None, i : i + 1, first:], form)[0, 0] for i, form in enumerate(p.values)]
        pairs = (self.k, keys), (self.v, values)
        return [torch.cat([t[:, :first], torch.stack(rounded)], 1) for t, rounded in pairs]

    def crop(self, length):
        "Keys of a block that is cut are what they read as."
        if length < self.k.shape[1]:
            whole = self.first + max(0, length - self.first) // self.precision.group * self.precision.group
            self.k = torch.cat([self.k[:, :whole], self.read()[0][:, whole:]], 1)[:, :length]
            self.v = self.v[:, :length]

    def fork(self):
        return copy.copy(self)

    def seen(self, window=None, keep_first=0):
        "What a cache with that window shows of it."
        k, v = self.read()
        n = k.shape[1]
        near = torch.arange(n) > n - (window or n + 1)
        near |= torch.arange(n) < keep_first
        return k[:, near], v[:, near]


def assert_reads(cache, rows, new=None, key_mask=None, **rolling):
    "Bit for bit; `new` are keys and values of a call, seen behind the old ones as they are."
    n = 0 if new is None else new[0].shape[2]
    differ = len({row.seen(**rolling)[0].shape[1] for row in rows}) > 1
    k, v, mask = cache.append(*(torch.zeros(2, len(rows), s.g, 0, s.d) if new is None else new), key_mask)
    assert mask is not None or not differ and (key_mask is None or key_mask.all())
    for r, row in enumerate(rows):
        real = torch.ones(n).bool() if key_mask is None else key_mask[r]
        lead = int((real.cumsum(0) == 0).sum())
        for shown, old, fresh in zip((k, v), row.seen(**rolling), new or (k[:, :, :0], v[:, :, :0])):
            held, end = old.shape[1], shown.shape[2] - n + lead
            assert torch.equal(shown[r, :, end - held : end], old)
            assert torch.equal(shown[r, :, end : end + int(real.sum())], fresh[r, :, real])
            if mask is not None and not rolling:
                wanted = torch.arange(shown.shape[2])
                wanted = (wanted >= end - held) & (wanted < end + real.sum())
                assert torch.equal(mask[r, 0].expand(max(n, 1), -1), wanted.expand(max(n, 1), -1))


def held_bytes(cache):
    "Of the memory under all tensors, which nobody else may hold."
    found = {}
    for row in cache.slots.rows:
        for strip in (strip for strips in row.strips for strip in strips):
            for t in strip.first, *strip.codes, strip.tail:
                found[id(t)] = t.untyped_storage().nbytes()
    return sum(found.values())


def assert_few_are_stored(cache, window=None, keep_first=0):
    "Behind the first ones, what a window needs and less than one block more."
    for strip in [strip for row in cache.slots.rows for strips in row.strips for strip in strips]:
        tokens = strip.codes.codes.shape[1] * strip.layout.step + strip.tail.shape[1]
        assert window is None or tokens < max(window - 1 + (window > 1) * cache.precision.group, 1)


def live(precision, seed, events=20, **rolling):
    "A running batch beside its rows by the definition: everything that a cache can be asked for, in any order."
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high + 1, (1,), generator=generator))  # noqa: E731
    first = max(precision.exact_first, rolling.get("keep_first", 0))
    cache, rows = cache_of(2, precision, **rolling), [Text(precision, first) for _ in range(2)]

    def step(cache, rows):
        width = draw(0, 9)
        counts = [draw(0, width) for _ in rows] if draw(0, 1) else [width] * len(rows)
        leads = [draw(0, width - count) for count in counts]
        new = torch.randn(2, len(rows), s.g, width, s.d, generator=generator) * 3 + 1
        place = torch.arange(width)
        real = torch.stack([(place >= a) & (place < a + n) for a, n in zip(leads, counts)])
        assert_reads(cache, rows, tuple(new), None if real.all() else real, **rolling)
        cache.commit()
        for r, row in enumerate(rows):
            row.add(*(t[r, :, real[r]] for t in new))

    for _ in range(events):
        event = draw(0, 5)
        if event == 0 and len(rows) < 4:
            other, others = cache_of(1, precision, **rolling), [Text(precision, first)]
            step(other, others)
            cache.join(other)
            rows = rows + others
            assert not other.nbytes
        elif event == 1:
            chosen = [draw(0, len(rows) - 1) for _ in range(draw(1, 4))]
            kept = [row.fork() for row in rows]
            other, others = cache.fork(torch.tensor(chosen)), [rows[i].fork() for i in chosen]
            step(other, others)
            assert_reads(cache, kept, **rolling)  # it never sees what its fork writes
            cache, rows = other, others
        elif event == 2:
            lengths = [max(0, row.k.shape[1] - draw(0, 7)) for row in rows]
            try:
                cache.crop(torch.tensor(lengths))
            except ValueError as error:
                assert rolling and "cannot go back" in str(error)
                continue
            for row, length in zip(rows, lengths):
                row.crop(length)
        elif event == 3 and len(rows) > 1:
            gone = draw(0, len(rows) - 1)
            cache.drop(torch.tensor([gone]))
            rows = rows[:gone] + rows[gone + 1 :]
        step(cache, rows)
        assert cache.seen.tolist() == [row.k.shape[1] for row in rows]
        assert cache.nbytes == held_bytes(cache)
        assert_few_are_stored(cache, **rolling)
        for r, row in enumerate(rows):  # rows may share; of one alone it is what is promised
            alone = cache.fork(torch.tensor([r])).nbytes
            assert alone == promised_bytes(precision, row.k.shape[1], s.d, **rolling)
        if max(row.k.shape[1] for row in rows) > 40:
            cache.reset()
            rows = [Text(precision, first) for _ in rows]
        assert_reads(cache, rows, **rolling)


LIVES = [{}, dict(window=3), dict(window=2, keep_first=2), dict(window=1, keep_first=1), dict(window=7, keep_first=1)]


@pytest.mark.parametrize("rolling", LIVES, ids=str)
@given(parts=PARTS, seed=st.integers(0, 10**6))
@settings(max_examples=10)
def test_every_row_reads_as_rounding_the_whole_row_would(rolling, parts, seed):
    live(HeadPrecision(*parts), seed, events=12, **rolling)


def check_all():
    "A short form, for planted faults."
    for seed, rolling in enumerate(LIVES):
        for exact_first in 0, 2:
            live(HeadPrecision(MIXED.keys, MIXED.values, 3, exact_first), seed, **rolling)


def test_the_short_form_passes_without_a_fault():
    check_all()


# --- what is stored ---------------------------------------------------------------------------------------------------


def filled(k, v, precision=MIXED, parts=None, **options):
    "A cache that has taken these tokens, in pieces of so many."
    cache, done = cache_of(len(k), precision, max_len=400, **options), 0
    for n in parts or [k.shape[2]]:
        cache.append(*(t[:, :, done : done + n] for t in (k, v)))
        cache.commit()
        done += n
    return cache


def stored(cache):
    return [
        t
        for row in cache.slots.rows
        for strips in row.strips
        for strip in strips
        for t in (strip.first, *strip.codes, strip.tail)
    ]


def same(a, b):
    "Bit for bit; a NaN is a NaN."
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(0.5), b.nan_to_num(0.5))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6, 7, 13])
@pytest.mark.parametrize("first", [0, 2])
def test_token_by_token_in_blocks_or_at_once_the_same_bytes_are_stored(n, first):
    precision = HeadPrecision(MIXED.keys, MIXED.values, 3, first)
    k, v = torch.randn(2, s.b, s.g, n, s.d)
    caches = [filled(k, v, precision, parts) for parts in ([1] * n, [n], [min(3, n), n - min(3, n)], [n - 1, 1])]
    for other in caches[1:]:
        assert all(map(torch.equal, stored(caches[0]), stored(other)))
    assert caches[0].nbytes == s.b * promised_bytes(precision, n, s.d) == held_bytes(caches[0])


def test_a_rows_numbers_do_not_depend_on_its_neighbours():
    k, v = torch.randn(2, 3, s.g, 11, s.d)
    k[1:], v[1:] = k[1:] * 1e4, float("nan")
    alone, beside = filled(k[:1], v[:1]), filled(k, v)
    assert all(map(torch.equal, stored(alone), stored(beside.fork(torch.tensor([0])))))


@pytest.mark.parametrize("form", sorted(KV_FORMATS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_of_every_format_the_bytes_are_those_promised(form, dtype):
    for group, first in (4, 0), (5, 3):
        precision = HeadPrecision.uniform(s.g, form, group=group, exact_first=first)
        for n in 0, 1, 3, 4, 5, 8, 9, 23:
            k, v = (torch.randn(1, s.g, n, width).to(dtype) for width in (s.d, 16))
            cache = filled(k, v, precision, value_dim=16, dtype=dtype)
            assert cache.nbytes == promised_bytes(precision, n, s.d, 16, dtype) == held_bytes(cache)


@pytest.mark.parametrize("bits", range(2, 9))
def test_no_stored_number_is_off_by_more_than_half_a_scale(bits):
    precision, torch_form = HeadPrecision.uniform(s.g, f"int{bits}", group=5), torch.float64
    k, v = torch.randn(2, s.b, s.g, 15, s.d, dtype=torch_form) * torch.tensor([0.01, 1, 1e3])[None, :, None, None]
    cache = filled(k, v, precision, dtype=torch.float64)
    shown = cache.append(k[:, :, :0], v[:, :, :0])
    for r, row in enumerate(cache.slots.rows):
        for strips, t, axis, got in zip(row.strips, (k, v), (2, 3), shown):
            scale = strips[0].codes.scale.double().expand(s.g, -1, 5 if axis == 2 else 1, s.d).flatten(1, 2)
            assert ((got[r] - t[r]).abs() <= scale / 2 * (1 + 1e-12)).all()
    assert not torch.equal(shown[0], k) and not torch.equal(shown[1], v)


@torch.no_grad()
@given(st.integers(0, 10**6), st.sampled_from([2, 3, 4, 8]), st.sampled_from([0.1, 1.0, 10.0]))
def test_the_outputs_stay_within_the_bound(seed, bits, size):
    "|o' - o| <= tanh(delta / 2) (max v - min v) + scale_v / 2, where delta bounds the error of every logit."
    torch.manual_seed(seed)
    k, v, q = torch.randn(3, 1, s.g, 12, s.d, dtype=torch.float64)
    k = k * size
    cache = filled(k, v, HeadPrecision.uniform(s.g, f"int{bits}", group=4), dtype=torch.float64)
    read = cache.append(k[:, :, :0], v[:, :, :0])
    logits, rounded = (q @ t.mT / math.sqrt(s.d) for t in (k, read[0]))
    keys, values = (strips[0].codes.scale.double() for strips in cache.slots.rows[0].strips)
    half = (q.abs() @ keys.expand(-1, -1, 4, -1).flatten(1, 2)[None].mT) / 2 / math.sqrt(s.d)
    assert ((rounded - logits).abs() <= half + 1e-12).all()
    delta = half.amax(-1, keepdim=True)
    moved = (rounded.softmax(-1) - logits.softmax(-1)).abs().sum(-1, keepdim=True) / 2
    assert (moved <= torch.tanh(delta / 2) + 1e-12).all()
    error = (rounded.softmax(-1) @ read[1] - logits.softmax(-1) @ v).abs()
    spread = v.amax(2, keepdim=True) - v.amin(2, keepdim=True)
    assert (error <= torch.tanh(delta / 2) * spread + values.amax() / 2 + 1e-12).all()


def test_the_bound_on_the_weights_is_reached():
    "Two tokens, logits off by delta in opposite directions: no smaller bound holds for all."
    for delta in 0.1, 1.0, 3.0:
        logits = torch.tensor([-delta, delta], dtype=torch.float64)
        wrong = logits + 2 * torch.tensor([delta, -delta], dtype=torch.float64)
        moved = (wrong.softmax(0) - logits.softmax(0)).abs().sum() / 2
        assert abs(moved - math.tanh(delta)) < 1e-12


def test_where_all_numbers_are_the_same_they_stay():
    k, v = torch.full((2, 1, s.g, 6, s.d), 0.25)
    for form in "int2", "int8":
        shown = filled(k, v, HeadPrecision.uniform(s.g, form, group=3)).append(k[:, :, :0], v[:, :, :0])
        assert torch.equal(shown[0], k) and torch.equal(shown[1], v)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e9])
def test_what_is_not_finite_stays_visible(bad):
    k, v = torch.randn(2, 1, s.g, 8, s.d)
    k[0, 0, 1, 2], v[0, 1, 4, 5] = bad, bad
    shown = filled(k, v, HeadPrecision.uniform(s.g, "int4", group=3)).append(k[:, :, :0], v[:, :, :0])
    assert shown[0][0, 0, :3, 2].isnan().all() and shown[0].isnan().sum() == 3  # the channel of its block
    assert shown[1][0, 1, 4].isnan().all() and shown[1].isnan().sum() == s.d  # the token


def test_floats_beyond_their_range_are_the_largest():
    k = torch.full((1, s.g, 3, s.d), -1e9)
    for form in "float16", "float8_e4m3fn":
        most = torch.finfo(KV_FORMATS[form].dtype).max
        assert filled(k, k, HeadPrecision.uniform(s.g, form)).append(k[:, :, :0], k[:, :, :0])[0].eq(-most).all()


def test_crop_rounds_a_key_twice_and_a_value_never_again():
    torch.manual_seed(4)
    precision = HeadPrecision.uniform(s.g, "int2", group=4)
    k, v = torch.randn(2, 1, s.g, 8, s.d)
    cache = filled(k, v, precision)
    none = k[:, :, :0], v[:, :, :0]
    once = [t.clone() for t in cache.append(*none)[:2]]
    first = cache.slots.rows[0].strips[0][0].codes.scale[:, 1].float()
    cache.crop(6)
    assert all(torch.equal(a, b[:, :, :6]) for a, b in zip(cache.append(*none), once))
    assert cache.nbytes == promised_bytes(precision, 6, s.d)
    cache.append(k[:, :, 6:] * 1.5, v[:, :, 6:])
    cache.commit()
    again = cache.append(*none)
    second = cache.slots.rows[0].strips[0][0].codes.scale[:, 1].float()
    assert torch.equal(again[1], once[1]) and torch.equal(again[0][:, :, :4], once[0][:, :, :4])
    wrong = (again[0] - k)[0, :, 4:6].abs()
    assert (wrong <= (first + second) / 2 + 1e-6).all() and (wrong > torch.maximum(first, second) / 2 + 1e-6).any()


# --- it is a cache ----------------------------------------------------------------------------------------------------


def test_it_is_a_cache_by_the_protocol():
    assert isinstance(cache_of(), Cache) and isinstance(cache_of(), KVCache)
    k, v = torch.randn(2, s.b, s.g, 7, s.d)
    assert repr(filled(k, v)) == f"QuantizedKVCache(2 rows, 3 heads of 8, used 7 of 400, {filled(k, v).nbytes} bytes)"


def test_gradients_reach_the_new_tokens_and_no_older_ones():
    k, v = torch.randn(2, s.b, s.g, 7, s.d)
    past = k.clone().requires_grad_()
    cache = filled(past, v)
    new = torch.randn(s.b, s.g, 2, s.d, requires_grad=True)
    shown = cache.append(new, new * 2)
    (shown[0].sum() + shown[1].sum()).backward()
    assert past.grad is None and torch.equal(new.grad, torch.full_like(new, 3.0))
    cache.commit()
    assert not any(t.requires_grad for t in stored(cache))


def test_calls_that_fail_change_nothing():
    layer, cache, x = build(ROPE()), exact(max_len=20), torch.randn(s.b, 4, s.e, **float64)
    layer(x, is_causal=True, cache=cache)
    before = [t.clone() for t in stored(cache)]
    for name, call in failing(layer, cache).items():
        with pytest.raises((ValueError, TypeError, RuntimeError, IndexError)):
            call()
        assert all(map(torch.equal, stored(cache), before)) and cache.seen.tolist() == [4, 4], name


def test_what_was_appended_is_forgotten():
    k, v = torch.randn(2, s.b, s.g, 7, s.d)
    for change in (
        lambda c: c.crop(7),
        lambda c: c.reorder(torch.tensor([0, 1])),
        lambda c: c.drop(torch.tensor([1])),
        lambda c: c.join(filled(k, v)),
        lambda c: c.reset(),
        lambda c: c.commit(),
        lambda c: setattr(c, "_pending", copy.copy(c)._pending),
    ):
        cache = filled(k, v)
        cache.append(k, v)
        change(cache)
        with refused(RuntimeError, "append comes first"):
            cache.commit()


def test_copies_do_not_see_each_other():
    k, v = torch.randn(2, s.b, s.g, 7, s.d)
    cache = filled(k, v)
    before = [t.clone() for t in stored(cache)]
    for copied in copy.copy(cache), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)):
        copied.append(k, v)
        copied.commit()
        copied.crop(2)
        assert copied.seen.tolist() == [2, 2]
        assert all(map(torch.equal, stored(cache), before)) and cache.seen.tolist() == [7, 7]
    assert cache.fork(torch.tensor([0, 0, 1])).nbytes == cache.nbytes  # what rows share counts once


def test_inference_mode_and_back():
    layer, x = build(ROPE()).requires_grad_(True), torch.randn(s.b, 9, s.e, **float64)
    whole, cache, parts = layer(x, is_causal=True), exact(), []
    with torch.inference_mode():
        parts.append(layer(x[:, :2], is_causal=True, cache=cache).clone())
        cache.crop(1)
    parts[0] = torch.cat([parts[0][:, :1], layer(x[:, 1:4], is_causal=True, cache=cache)], 1)
    parts[0].sum().backward()
    with torch.inference_mode():
        parts.append(layer(x[:, 4:], is_causal=True, cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-12, rtol=0)


def test_two_layers_are_refused_and_one_step_keeps_all_or_none():
    cache, other = exact(), exact(max_len=2)
    x = torch.randn(s.b, 2, s.e, **float64)
    one, two = build(ROPE()), build(ROPE())
    two.in_proj.weight.neg_()
    one(x, cache=cache)
    with refused(ValueError, "another layer"):
        two(x, cache=cache)
    two(x, cache=other)
    with refused(ValueError, "cache full"), commit_once(cache, other):
        one(x, cache=cache)
        two(x, cache=other)
    assert cache.seen.tolist() == other.seen.tolist() == [2, 2]


ROWS = [name for name in REFUSED if "KVCache" not in REFUSED[name][0].__code__.co_names]


@pytest.mark.parametrize("name", ROWS)
def test_what_does_not_fit_is_refused_as_by_the_exact_cache(own_messages, name):
    call, error, words = REFUSED[name]
    with refused(error, *words):
        call(exact(max_len=8))


INT4 = HeadPrecision.uniform(1, "int4")


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: QuantizedKVCache(1, INT4, 8, 12), ValueError, ("head_dim 12", "multiple of 8", "int4")),
        (lambda: QuantizedKVCache(1, INT4, 8, 8, value_dim=4), ValueError, ("value_dim 4", "multiple of 8")),
        (lambda: promised_bytes(INT4, 3, 12), ValueError, ("head_dim 12", "multiple of 8")),
        (lambda: promised_bytes(INT4, -3, 8), ValueError, ("tokens -3",)),
        (lambda: promised_bytes(INT4, 3, 8, 0), ValueError, ("value_dim", "0")),
        (lambda: promised_bytes(INT4, 3, 8.0), TypeError, ("head_dim", "8.0")),
        (lambda: promised_bytes(INT4, 3, 8, dtype=torch.int8), TypeError, ("dtype", "int8")),
        (lambda: promised_bytes(INT4, 3, 8, window=0), ValueError, ("window", "0")),
        (lambda: promised_bytes(INT4, 3, 8, keep_first=2), ValueError, ("keep_first 2 without a window",)),
        (lambda: QuantizedKVCache(1, "int4", 8, 8), TypeError, ("precision", "HeadPrecision", "str")),
        (lambda: QuantizedKVCache(0, INT4, 8, 8), ValueError, ("batch_size",)),
        (lambda: QuantizedKVCache(1, INT4, 3, 8, window=3, keep_first=1), ValueError, ("max_len 3", "4")),
        (lambda: QuantizedKVCache(1, INT4, 3, 8, keep_first=1), ValueError, ("keep_first", "window")),
        (lambda: cache_of().join(cache_of(precision=EXACT)), ValueError, ("precision differs",)),
        (lambda: cache_of().join(KVCache(2, s.g, 60, s.d)), ValueError, ("precision differs",)),
        (lambda: KVCache(2, s.g, 60, s.d).join(cache_of()), ValueError, ("precision differs",)),
    ],
)
def test_what_is_no_such_cache_is_refused(own_messages, call, error, words):
    with refused(error, *words):
        call()


def test_floats_may_have_any_width():
    cache = QuantizedKVCache(1, HeadPrecision.uniform(1, "float16", exact_first=1), 8, 5, value_dim=3)
    k, v = torch.randn(1, 1, 4, 5), torch.randn(1, 1, 4, 3)
    cache.append(k, v)
    cache.commit()
    assert cache.nbytes == promised_bytes(cache.precision, 4, 5, 3) == (4 + 3 * 2) * 8


# --- planted faults ---------------------------------------------------------------------------------------------------


def other_axis(right):
    return lambda self: tuple([lay._replace(axis=-3 - lay.axis) for lay in part] for part in right.fget(self))


def keeps_codes(right):
    "A block that is cut stays whole, and the tail begins behind it."

    def wrong(self, count):
        made, over = right(self, count), count - self.first.shape[1]
        whole = min(-(-over // self.layout.step), self.codes.scale.shape[1]) if over > 0 else 0
        return made._replace(codes=module.Codes(*(t[:, :whole].clone() for t in self.codes)))

    return wrong


def drops_the_tail(right):
    def wrong(self, new):
        made = right(self, new)
        return made._replace(tail=made.tail[:, :0]) if self.layout.form.dtype is None else made

    return wrong


def window(change):
    return lambda right: lambda self, seen: change(right(self, seen), self, seen)


FAULTS = {
    "a scale over the other axis": Mutant(Plan, "layouts", lambda right: property(other_axis(right))),
    "the tail is dropped": Mutant(Strip, "grown", drops_the_tail),
    "a block too early": Mutant(
        Strip,
        "grown",
        lambda right: (
            lambda self, new: right(
                self._replace(layout=self.layout._replace(step=max(1, self.layout.step - 1))), new
            )._replace(layout=self.layout)
        ),
    ),
    "a block too late": Mutant(Layout, "blocks", lambda right: lambda self, n: right(self, max(0, n - 1))),
    "crop keeps codes": Mutant(Strip, "cut", keeps_codes),
    "crop gives back the rest of the block": Mutant(
        Strip, "cut", lambda right: lambda self, n: right(self, -(-n // self.layout.step) * self.layout.step)
    ),
    "the first ones are rounded": Mutant(Plan, "first", lambda right: property(lambda self: 0)),
    "gone one block too early": Mutant(
        Plan, "gone", window(lambda n, plan, seen: n + plan.precision.group * (0 < n < seen - plan.first))
    ),
    "nothing is ever gone": Mutant(Plan, "gone", window(lambda n, plan, seen: 0)),
    "rows aligned at the left": Mutant(
        QuantizedSlots,
        "filled",
        lambda right: (
            lambda self: [
                torch.stack([torch.nn.functional.pad(t, (0, 0, 0, self.length - t.shape[1])) for t in both])
                for both in zip(*map(self._visible, self.rows))
            ]
        ),
    ),
    "padding is stored": Mutant(
        QuantizedSlots,
        "extend",
        lambda right: lambda self, call, new: right(self, module.Call(call.n, call.n, 0, 0), new),
    ),
    "values are those of keys": Mutant(
        Row, "each", lambda right: lambda self, change: right(self, lambda strip, which: change(strip, 0))
    ),
    "views hold what they came from": Mutant(
        Strip,
        "grown",
        lambda right: (
            lambda self, new: (
                made._replace(tail=torch.cat([made.tail, made.tail], 1)[:, : made.tail.shape[1]])
                if (made := right(self, new)).tail.numel()
                else made
            )
        ),
    ),
    "counts what is shared twice": Mutant(
        QuantizedSlots, "nbytes", lambda right: property(lambda self: right.fget(self) + (len(self.rows) > 1))
    ),
    "rounds towards zero": Mutant(
        module,
        "quantize",
        lambda right: (
            lambda x, bits, dim: (c := right(x, bits, dim))._replace(
                codes=((x - c.zero.to(x.dtype)) / c.scale.to(x.dtype))
                .nan_to_num(0)
                .clamp(0, 2**bits - 1)
                .to(torch.uint8)
            )
        ),
    ),
    "rounds what is new before it is seen": Mutant(
        QuantizedKVCache,
        "append",
        lambda right: lambda self, k, v, *mask: right(self, k, round_values(v, "int8"), *mask),
    ),
    "forgets that rows differ": Mutant(
        QuantizedKVCache,
        "commit",
        lambda right: lambda self: (right(self), setattr(self, "ragged", False)),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_cache_with_a_fault_is_noticed(own_messages, monkeypatch, name):
    FAULTS[name].plant(monkeypatch)
    with pytest.raises(BaseException) as noticed:
        check_all()
    assert not isinstance(noticed.value, (NameError, SyntaxError)), noticed.value
