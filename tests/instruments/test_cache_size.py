"""The calculator counts what a cache takes, and refuses what is no count."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mha_book.heads.weight_split import HeadLayout
from mha_book.instruments.cache_size import PUBLISHED, Model, cache_bytes
from mha_book.plugs.cache import KVCache
from support.refusals import refused

settings.register_profile("book", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("book")
small = st.integers(1, 9)


@given(
    small,
    small,
    small,
    small,
    small,
    st.one_of(st.none(), small),
    st.one_of(st.none(), small),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_bytes_are_those_of_the_memory(layers, g, d, tokens, rows, dv, window, dtype):
    slots = tokens if window is None else min(tokens, window)
    caches = [KVCache(rows, g, slots, d, value_dim=dv, dtype=dtype) for _ in range(layers)]
    counted = cache_bytes(layers, g, d, tokens, rows, value_dim=dv, window=window, dtype=dtype)
    assert counted == sum(cache.nbytes for cache in caches)


def test_values_that_are_read_from_keys_cost_nothing():
    assert 2 * cache_bytes(3, 1, 10, 7, value_dim=0) == cache_bytes(3, 1, 10, 7)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_is_its_layers(name):
    model, total = PUBLISHED[name], 0
    for layer in range(model.num_layers):
        window = model.window if layer < model.rolling else None
        total += cache_bytes(
            1,
            model.layout.num_kv_heads,
            model.layout.head_dim,
            9999,
            3,
            value_dim=model.value_dim,
            window=window,
            dtype=torch.float32,
        )
    assert model.cache_bytes(9999, 3, torch.float32) == total


def test_layers_that_roll_stop_growing_and_others_do_not():
    model = Model(5, HeadLayout(6, 3, 8), window=10, rolling=2)
    one = cache_bytes(1, 3, 8, 1)
    assert [model.cache_bytes(m) for m in (1, 10, 11, 20)] == [5 * one, 50 * one, 53 * one, 80 * one]


@pytest.mark.parametrize(
    "options, error, words",
    [
        (dict(num_layers=0), ValueError, ("num_layers",)),
        (dict(num_kv_heads=2.0), TypeError, ("num_kv_heads",)),
        (dict(head_dim=-1), ValueError, ("head_dim",)),
        (dict(seq_len=0), ValueError, ("seq_len",)),
        (dict(batch_size="2"), TypeError, ("batch_size",)),
        (dict(value_dim=-1), ValueError, ("value_dim",)),
        (dict(window=0), ValueError, ("window",)),
    ],
)
def test_what_is_no_count_is_refused(own_messages, options, error, words):
    with refused(error, *words):
        cache_bytes(**dict(num_layers=2, num_kv_heads=3, head_dim=8, seq_len=5) | options)


def test_a_models_values_are_as_wide_as_its_layout_says():
    layout = HeadLayout(6, 3, 8, 5)
    assert Model(4, layout).cache_bytes(7, 2) == cache_bytes(4, 3, 8, 7, 2, value_dim=5)
    assert Model(4, layout, value_dim=0).cache_bytes(7) == cache_bytes(4, 3, 8, 7, value_dim=0)


@pytest.mark.parametrize("wrong", [dict(dtype="float16"), dict(dtype=None), dict(value_dim=False), dict(value_dim=0.0)])
def test_bytes_need_a_dtype_and_counts(wrong):
    with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
        cache_bytes(1, 1, 8, 4, **wrong)
