"""Each row of a quantised cache reads as rounding the whole row would, however it came; its bytes are as promised."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mha_book.plugs.cache import KVCache
from mha_book.plugs.quantize import KV_FORMATS, HeadPrecision, round_keys, round_values
from mha_book.plugs.quantized_cache import QuantizedKVCache, promised_bytes
from support.caches import (
    ATTENDS,
    CUTS,
    POSITIONS,
    ROLLING,
    ROPE,
    assert_cropped,
    assert_same,
    build,
    pieces,
    s,
    serve,
    texts,
)

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
        assert_same(build(POSITIONS[position], ATTENDS[attend]()), cut, exact())


@pytest.mark.parametrize("rolling", ROLLING)
@given(data=st.data())
def test_any_cut_with_a_window(rolling, data):
    cut = data.draw(texts(pieces(padded=data.draw(st.booleans()))))
    with torch.set_grad_enabled(data.draw(st.booleans())):
        assert_same(build(ROPE()), cut, exact(**ROLLING[rolling]), **ROLLING[rolling])


@pytest.mark.parametrize("rolling", ROLLING)
@pytest.mark.parametrize("seed", range(4))
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
    k, v, mask = cache.append(*(torch.zeros(2, len(rows), s.g, 0, s.d) if new is None else new), key_mask)
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
