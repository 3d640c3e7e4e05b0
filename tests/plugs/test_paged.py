"""Blocks give the numbers of the slab; no block is lost, written twice, or seen by a row that has no part in it."""

import copy
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mha_book.heads.layer import Cache, commit_once
from mha_book.plugs.cache import KVCache
from mha_book.plugs.paged import BlockPool, PagedCache, Rows
from support.caches import (
    ATTENDS,
    CUTS,
    POSITIONS,
    REFUSED,
    ROPE,
    assert_cropped,
    assert_same,
    build,
    failing,
    float64,
    new,
    pieces,
    s,
    texts,
)
from support.mutants_caches import BLOCKS
from support.pools import assert_no_block_is_lost, pool_of
from support.refusals import refused

settings.register_profile("book", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("book")


@pytest.mark.parametrize("attend", ATTENDS)
@pytest.mark.parametrize("position", POSITIONS)
@given(data=st.data())
def test_any_cut_gives_what_each_row_gives_alone(position, attend, data):
    cut = data.draw(texts(pieces(padded=data.draw(st.booleans()))))
    pool = pool_of(block_size=data.draw(st.integers(1, 5)))
    cache = PagedCache(pool, s.b)
    with torch.set_grad_enabled(data.draw(st.booleans())):
        assert_same(build(POSITIONS[position], ATTENDS[attend]()), cut, cache)
    assert_no_block_is_lost(pool, cache)


@torch.no_grad()
def check_beside_the_slab(cached=PagedCache, pools=BlockPool):
    for cut in CUTS.values():
        pool, layer = pool_of(pools=pools), build(ROPE())
        cache = cached(pool, s.b)
        assert_same(layer, cut, cache)
        assert_no_block_is_lost(pool, cache)
        cache.reset()
        assert_no_block_is_lost(pool)
        assert cache.seen.tolist() == [0] * s.b


@torch.no_grad()
def check_forks(cached=PagedCache, pools=BlockPool, seed=0):
    "Rows that share, split, die and go on, beside a slab that copies."
    generator = torch.Generator().manual_seed(seed)
    for block_size in 1, 3, 4:
        pool, layer = pool_of(200, block_size, pools), build(ROPE())
        cache, slab = cached(pool, s.b), KVCache(s.b, s.g, 60, s.d, **float64)
        for step in range(14):
            rows, width = len(cache.tables), int(torch.randint(1, 5, (), generator=generator))
            real = torch.arange(width) < torch.randint(1, width + 1, (rows, 1), generator=generator)
            x = torch.randn(rows, width, s.e, **float64, generator=generator)
            got, wanted = (layer(x, key_mask=real, is_causal=True, cache=c) for c in (cache, slab))
            torch.testing.assert_close(got[real], wanted[real], atol=1e-12, rtol=0)
            assert_no_block_is_lost(pool, cache)
            if step % 2:
                chosen = torch.randint(rows, (int(torch.randint(1, 5, (), generator=generator)),), generator=generator)
                cache.reorder(chosen)
                slab.reorder(chosen)
                assert_no_block_is_lost(pool, cache)
                assert cache.seen.tolist() == slab.seen.tolist()


def check_one_pool_for_many(cached=PagedCache, pools=BlockPool):
    "Caches of one pool do not see each other, and what one gives back another may have."
    layer, pool, x = build(ROPE()), pool_of(8, 3, pools), torch.randn(1, 7, s.e, **float64)
    with torch.no_grad():
        whole = layer(x, is_causal=True)
        caches = [cached(pool, 1) for _ in range(2)]
        for i in range(7):
            for cache in caches:
                torch.testing.assert_close(
                    layer(x[:, i : i + 1], is_causal=True, cache=cache), whole[:, i : i + 1], atol=1e-12, rtol=0
                )
        assert_no_block_is_lost(pool, *caches)
        third = cached(pool, 1)
        with pytest.raises(ValueError, match="2 of 8 blocks free, and 3 needed"):
            layer(x, is_causal=True, cache=third)
        caches[0].reset()
        torch.testing.assert_close(layer(x, is_causal=True, cache=third), whole, atol=1e-12, rtol=0)
        assert_no_block_is_lost(pool, caches[1], third)


def check_only_what_is_needed(cached=PagedCache, pools=BlockPool):
    "The count before a call is exact: it fits with so many free blocks, and not with one less."
    for rows, taken in ((rows, taken) for rows in (1, 2, 3) for taken in (5, 6, 7, 8)):
        needed = rows * (-(-(taken + 2) // 4) - -(-taken // 4)) + (rows - 1) * (taken % 4 > 0)
        pool = pool_of(20, 4, pools)
        cache = cached(pool, 1)
        cache.append(new(b=1, n=taken), new(b=1, n=taken))
        cache.commit()
        cache.reorder(torch.zeros(rows, dtype=torch.int64))
        pool.left = max(0, needed - 1)
        before = pool.counts, pool.free, cache.tables, cache.lengths
        if needed:
            with pytest.raises(ValueError, match="pool full"):
                cache.append(new(b=rows, n=2), new(b=rows, n=2))
            assert before == (pool.counts, pool.free, cache.tables, cache.lengths)
        pool.left = needed
        cache.append(new(b=rows, n=2), new(b=rows, n=2))
        cache.commit()
        assert not pool.free


@torch.no_grad()
def check_failures(cached=PagedCache, pools=BlockPool):
    pool = pool_of(14, 3, pools)
    cache, layer, x = cached(pool, s.b), build(ROPE()), torch.randn(s.b, 4, s.e, **float64)
    layer(x, is_causal=True, cache=cache)
    twin = copy.deepcopy(cache)
    fails = failing(layer, cache)
    fails["full"] = lambda: layer(torch.randn(s.b, 40, s.e, **float64), cache=cache)
    for name, call in fails.items():
        with pytest.raises((ValueError, TypeError, RuntimeError, IndexError)):
            call()
        assert (cache.tables, cache.lengths, pool.counts, pool.free) == (
            twin.tables,
            twin.lengths,
            twin.pool.counts,
            twin.pool.free,
        ), name
    token = torch.randn(s.b, 1, s.e, **float64)
    layer.attention_map(token, cache=cache)
    cache.reorder(torch.arange(s.b))
    with pytest.raises(RuntimeError, match="append comes first"):
        cache.commit()
    assert torch.equal(*(layer(token, is_causal=True, cache=c) for c in (cache, twin)))


def check_two_that_want_the_last_block(cached=PagedCache, pools=BlockPool):
    "Both were told that there is room; the second is refused before it changes anything."
    pool = pool_of(1, 4, pools)
    one, other = cached(pool, 1), cached(pool, 1)
    for cache in one, other:
        cache.append(new(b=1), new(b=1))
    one.commit()
    with pytest.raises(ValueError, match="0 of 1 blocks free"):
        other.commit()
    assert other.tables == [[]] and other.seen.tolist() == [0]
    assert_no_block_is_lost(pool, one, other)


@torch.no_grad()
def check_crops(cached=PagedCache, pools=BlockPool):
    "Shared blocks stay with those who still read them, and rows that wrote behind them go on alone."
    for first in CUTS["left padding"], CUTS["padding in the middle"], CUTS["at once"]:
        for length in 0, 1, 3, 20, [4, 2], [2, 4], [0, 5]:
            pool, other = pool_of(pools=pools), pool_of(pools=pools)
            caches = cached(pool, s.b), cached(other, s.b)
            assert_cropped(build(ROPE()), first, CUTS["uneven"], length, *caches)
            assert_no_block_is_lost(pool, caches[0])
    layer, pool, x = build(ROPE()), pool_of(pools=pools), torch.randn(1, 12, s.e, **float64)
    whole, cache = layer(x, is_causal=True), cached(pool, 1)
    layer(x[:, :8], is_causal=True, cache=cache)
    cache.reorder(torch.tensor([0, 0, 0]))
    layer(torch.randn(3, 3, s.e, **float64), is_causal=True, cache=cache)
    cache.crop(torch.tensor([8, 5, 0]))
    assert_no_block_is_lost(pool, cache)
    real = torch.arange(12) < torch.tensor([[4], [7], [12]])
    text = torch.stack([x[0].roll(-n, 0) for n in (8, 5, 0)])
    got = layer(text, key_mask=real, is_causal=True, cache=cache)
    for row, n in enumerate((8, 5, 0)):
        torch.testing.assert_close(got[row, real[row]], whole[0, n:], atol=1e-12, rtol=0)
    assert_no_block_is_lost(pool, cache)


class Gathering(Rows):
    "Tables that are gathered wherever they lie."

    def lay_out(self, held):
        super().lay_out(held)
        self.line = None


def in_line(cache):
    "Whether what it shows is the pool's own memory."
    nothing = new(b=len(cache.seen), n=0)
    shown = cache.append(nothing, nothing)[0]
    return shown.untyped_storage().data_ptr() == cache.pool.k.untyped_storage().data_ptr()


@torch.no_grad()
def check_views(cached=PagedCache, pools=BlockPool, seeds=3):
    "What is read where it lies is what is gathered, to the last bit, whoever comes, goes, shares and takes back."
    seen = Counter()
    for rows, seed in ((rows, seed) for rows in (1, 2, 3) for seed in range(seeds)):
        generator = torch.Generator().manual_seed(seed)
        draw = lambda low, high: int(torch.randint(low, high + 1, (), generator=generator))  # noqa: B023, E731
        sides = [[cached(pool_of(800, 4, pools), rows)], [cached(pool_of(800, 4, pools), rows)]]
        for cache in sides[1]:
            cache.blocks = Gathering(cache.pool, [[]] * rows, [0] * rows)
        for _ in range(20):
            which, what = draw(0, len(sides[0]) - 1), draw(0, 9)
            lengths = [draw(0, 30) for _ in sides[0][which].lengths]
            for side in sides:
                cache = side[which]
                if what == 0:
                    cache.crop(lengths[0] if lengths[0] % 2 else torch.tensor(lengths))
                elif what == 1 and len(side) < 4:
                    side.append(cache.fork(torch.arange(len(lengths)), torch.tensor(lengths)))
                elif what == 2 and len(side) > 1:
                    del side[which]
                elif what == 3 and len(side) < 4:
                    side.append(cached(cache.pool, len(lengths)))
                    side[-1].blocks = type(cache.blocks)(cache.pool, [[] for _ in lengths], [0] * len(lengths))
                del cache
            calls = [(sides[0][-1], sides[1][-1], draw(1, 9))] + [(*pair, 1) for pair in zip(*sides)] * draw(1, 3)
            for view, gathered, count in calls:
                k = torch.randn(len(view.lengths), s.g, count, s.d, **float64, generator=generator)
                shown, wanted = view.append(k, -k), gathered.append(k, -k)
                assert torch.equal(shown[0], wanted[0]) and torch.equal(shown[1], wanted[1])
                assert view.tables == gathered.tables
                view.commit()
                gathered.commit()
                assert not in_line(gathered)
                seen[rows, in_line(view)] += 1
            for side in sides:
                assert_no_block_is_lost(side[0].pool, *side)
    assert all(seen[rows, lies] > 8 for rows in (1, 2, 3) for lies in (True, False)), seen


def test_rows_that_nobody_is_between_stay_in_line_and_two_caches_leave_each_other_room():
    for rows in 1, 3:
        pool = pool_of(120, 4)
        with torch.no_grad():
            caches = [PagedCache(pool, rows) for _ in range(2)]
            for count in 9, *[1] * 30:
                for cache in caches:
                    cache.append(new(b=rows, n=count), new(b=rows, n=count))
                    cache.commit()
                    assert in_line(cache)


CHECKS = [
    check_crops,
    check_beside_the_slab,
    check_forks,
    check_one_pool_for_many,
    check_only_what_is_needed,
    check_failures,
    check_two_that_want_the_last_block,
    check_views,
]


@pytest.mark.parametrize("check", CHECKS)
def test_blocks(check):
    check()


@pytest.mark.parametrize("seed", range(1, 6))
def test_forks_of_other_seeds(seed):
    check_forks(seed=seed)


def test_gradients_are_those_of_the_slab():
    layer, x = build(ROPE()).requires_grad_(True), torch.randn(s.b, 6, s.e, **float64)
    found = []
    for cache in PagedCache(pool_of(), s.b), KVCache(s.b, s.g, 9, s.d, **float64):
        layer.zero_grad()
        layer(x[:, :4], is_causal=True, cache=cache)
        layer(x[:, 4:], is_causal=True, cache=cache).square().sum().backward()
        found.append([p.grad.clone() for p in layer.parameters()])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_values_may_have_a_width_of_their_own():
    pool = BlockPool(9, 4, s.g, s.d, value_dim=s.dv)
    cache = PagedCache(pool, s.b)
    k, v = torch.randn(s.b, s.g, 6, s.d), torch.randn(s.b, s.g, 6, s.dv)
    for i in range(6):
        shown = cache.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
        cache.commit()
    assert torch.equal(shown[0], k) and torch.equal(shown[1], v) and shown[2] is None
    assert repr(cache) == "PagedCache(2 rows, 12 tokens in blocks of 4; 5 of 9 blocks free)"


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in REFUSED
        if not any(word in name for word in ("full", "too long", "max_len", "float", "window", "first", "roll"))
    ],
)
def test_what_does_not_fit_is_refused_as_by_the_slab(own_messages, name):
    call, error, words = REFUSED[name]
    with refused(error, *words):
        call(PagedCache(pool_of(), s.b))


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: BlockPool(0, 4, 1, 1), ValueError, ("num_blocks",)),
        (lambda: BlockPool(4, 4.0, 1, 1), TypeError, ("block_size",)),
        (lambda: PagedCache(pool_of(), 0), ValueError, ("batch_size",)),
    ],
)
def test_sizes_are_counts(own_messages, make, error, words):
    with refused(error, *words):
        make()


@pytest.mark.parametrize("name", BLOCKS)
def test_a_cache_with_a_fault_is_noticed(own_messages, monkeypatch, name):
    BLOCKS[name].plant(monkeypatch)
    with pytest.raises(BaseException) as noticed:
        for check in CHECKS:
            check()
    assert not isinstance(noticed.value, (NameError, SyntaxError)), noticed.value


def test_it_is_a_cache_by_the_protocol():
    assert isinstance(PagedCache(pool_of(), 1), Cache)


@given(data=st.data())
def test_after_a_crop_the_cache_never_saw_the_rest(data):
    first, then = (data.draw(texts(pieces(padded=data.draw(st.booleans())))) for _ in range(2))
    lengths = st.integers(0, 20)
    length = data.draw(lengths | st.lists(lengths, min_size=s.b, max_size=s.b))
    pool, other = (pool_of(block_size=data.draw(st.integers(1, 5))) for _ in range(2))
    cache = PagedCache(pool, s.b)
    assert_cropped(build(ROPE()), first, then, length, cache, PagedCache(other, s.b))
    assert_no_block_is_lost(pool, cache)


def numbers(n):
    "Keys or values of one row, all different."
    return torch.arange(1.0, 1 + s.g * n * s.d, **float64).view(1, s.g, n, s.d)


def two_that_share_a_full_pool():
    "Two caches of one pool: each finds room for what comes next, and there is none for both."
    pool = pool_of(num_blocks=3, block_size=2)
    caches = [PagedCache(pool, 1) for _ in range(2)]
    for cache in caches:
        cache.append(numbers(2), numbers(2))
        cache.commit()
    return pool, caches


def test_where_the_pool_is_too_small_for_all_caches_none_keeps_anything():
    pool, caches = two_that_share_a_full_pool()
    before = [[t.clone() for t in cache.append(numbers(0), numbers(0))[:2]] for cache in caches]
    with refused(ValueError, "pool full"), commit_once(*caches):
        for cache in caches:
            cache.append(numbers(1), numbers(1))
    assert [cache.seen.tolist() for cache in caches] == [[2], [2]] and len(pool.free) == 1
    assert_no_block_is_lost(pool, *caches)
    after = [cache.append(numbers(0), numbers(0))[:2] for cache in caches]
    assert all(map(torch.equal, sum(before, []), [t for pair in after for t in pair]))


def test_commits_one_after_the_other_would_keep_half():
    _, caches = two_that_share_a_full_pool()
    for cache in caches:
        cache.append(numbers(1), numbers(1))
    caches[0].commit()
    with refused(ValueError, "pool full"):
        caches[1].commit()
    assert [cache.seen.tolist() for cache in caches] == [[3], [2]]
