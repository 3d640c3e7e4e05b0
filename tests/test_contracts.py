"""What the package promises of its inputs: annotations hold, bad input is refused with the values and a way out."""

import copy
import math
from functools import partial

import jaxtyping
import pytest
import torch
from torch import nn

import mha_book
from mha_book import (
    AttentionHead,
    HeadLayout,
    HeadList,
    MultiHeadAttention,
    causal_mask,
    fused_attend,
    nearest_head_counts,
    pad_heads,
    split_heads,
)
from mha_book.heads.single_head import plain_attention, plain_attention_weights
from mha_book.instruments.testing import SIZES, refuse_nonfinite
from support.padded_cache import PaddedCache
from support.refusals import refused

s = SIZES
KERNELS = pytest.mark.parametrize("attend", [plain_attention, fused_attend])


def heads(b=s.b, h=s.h, n=s.n, g=s.h, m=s.m, d=s.d, dv=s.d):
    return torch.randn(b, h, n, d), torch.randn(b, g, m, d), torch.randn(b, g, m, dv)


# Shape checking is on: the annotations themselves refuse


def test_annotations_are_checked_here():
    q, k, v = heads()
    with pytest.raises(jaxtyping.TypeCheckError):
        plain_attention(q, k[..., :-1], v)
    with pytest.raises(jaxtyping.TypeCheckError):
        split_heads(torch.zeros(3, dtype=torch.long), 3)


def test_every_public_name_is_documented():
    for name in mha_book.__all__:
        assert getattr(mha_book, name).__doc__, name


# Bad input, row by row


@pytest.mark.usefixtures("own_messages")
class TestBadHeads:
    @KERNELS
    def test_batches_that_differ(self, attend):
        q, k, v = heads(b=2)
        with refused(ValueError, "batch differs: query 2, key 3"):
            attend(q, torch.randn(3, s.h, s.m, s.d), torch.randn(3, s.h, s.m, s.d))

    @KERNELS
    def test_more_keys_than_values(self, attend):
        q, k, v = heads()
        with refused(ValueError, "length differs: key 7, value 5"):
            attend(q, k, v[:, :, :5])

    @KERNELS
    def test_groups_that_do_not_divide(self, attend):
        q, k, v = heads(h=8, g=3)
        with refused(ValueError, "8 query heads", "3 key-value heads", "num_kv_heads"):
            attend(q, k, v)

    @KERNELS
    def test_keys_and_values_of_different_heads(self, attend):
        q, k, v = heads(g=6)
        with refused(ValueError, "heads differ: key 6, value 3"):
            attend(q, k, v[:, :3])

    @KERNELS
    def test_three_axes(self, attend):
        with refused(ValueError, "4 axes", "x[:, None]"):
            attend(*(torch.randn(2, 5, 8) for _ in range(3)))

    @KERNELS
    def test_mixed_dtypes(self, attend):
        q, k, v = heads()
        with refused(TypeError, "float32", "float16", ".to("):
            attend(q, k.half(), v)

    @KERNELS
    def test_mixed_devices(self, attend):
        q, k, v = heads()
        with refused(ValueError, "device differs", "meta", "cpu"):
            attend(q, k, v.to("meta"))

    @KERNELS
    @pytest.mark.parametrize("mask", [torch.ones(s.n, s.m), torch.ones(s.m, dtype=torch.int64)])
    def test_masks_of_numbers(self, attend, mask):
        with refused(TypeError, "torch.bool", "True = may look", "bias="):
            attend(*heads(), mask=mask)

    @KERNELS
    def test_bias_of_truths(self, attend):
        with refused(TypeError, "floating point", "mask="):
            attend(*heads(), bias=torch.ones(s.n, s.m, dtype=torch.bool))

    @KERNELS
    @pytest.mark.parametrize("shape", [(s.n,), (s.b, s.n, s.m), (3, 1, s.n, s.m), (1, s.b, s.h, s.n, s.m), (s.m, s.n)])
    def test_masks_of_other_shapes(self, attend, shape):
        fitting = f"({s.m},)", f"({s.n}, {s.m})", f"({s.h}, {s.n}, {s.m})", f"({s.b}, 1, 1, {s.m})"
        with refused(ValueError, str(shape), *fitting):
            attend(*heads(), mask=torch.ones(shape, dtype=torch.bool))

    @KERNELS
    @pytest.mark.parametrize("p", [-0.1, 1.0, math.nan])
    def test_dropout_out_of_range(self, attend, p):
        with refused(ValueError, str(p), "[0, 1)"):
            attend(*heads(), dropout_p=p)

    def test_weights_check_too(self):
        with refused(TypeError, "torch.bool"):
            plain_attention_weights(*heads()[:2], mask=torch.ones(s.m))


@pytest.mark.usefixtures("own_messages")
class TestBadLayers:
    def test_heads_that_do_not_divide(self):
        ways_out = "head_dim=5", "num_heads=2 or num_heads=4", "embed_dim=18", "pad_heads"
        with refused(ValueError, "embed_dim 16", "num_heads 3", *ways_out):
            MultiHeadAttention(16, 3)

    def test_more_heads_than_width(self):
        with refused(ValueError, "embed_dim 4", "num_heads 7", "num_heads=4"):
            MultiHeadAttention(4, 7)

    @pytest.mark.parametrize("bad", [4.0, "4", True, None])
    def test_counts_that_are_no_int(self, bad):
        with refused(TypeError, "num_heads must be an int", repr(bad)):
            MultiHeadAttention(16, bad)

    @pytest.mark.parametrize("name", ["embed_dim", "num_heads", "num_kv_heads", "head_dim", "out_dim", "context_dim"])
    def test_counts_that_are_not_positive(self, name):
        with refused(ValueError, f"{name} must be at least 1, got 0"):
            MultiHeadAttention(**{"embed_dim": 16, "num_heads": 4, name: 0})

    def test_groups_that_do_not_divide(self):
        with refused(ValueError, "num_heads 8", "num_kv_heads 3"):
            MultiHeadAttention(48, 8, num_kv_heads=3)

    @pytest.mark.parametrize("p", [-0.1, 1.5])
    def test_dropout_out_of_range(self, p):
        with refused(ValueError, str(p), "[0, 1)"):
            MultiHeadAttention(48, 6, dropout=p)

    @pytest.mark.parametrize("socket", ["attend", "position", "qk_norm"])
    def test_plugs_that_cannot_be_called(self, socket):
        with refused(TypeError, socket, "callable"):
            MultiHeadAttention(48, 6, **{socket: "sdpa"})

    def test_widths_that_do_not_fit(self):
        with refused(ValueError, "(2, 5, 47)", "(batch, length, 48)"):
            MultiHeadAttention(48, 6)(torch.randn(2, 5, 47))

    def test_half_into_float(self):
        with refused(TypeError, "x torch.float16", "weights torch.float32", ".to(", "autocast"):
            MultiHeadAttention(48, 6)(torch.randn(2, 5, 48).half())

    def test_another_device(self):
        with refused(ValueError, "x meta", "weights cpu"):
            MultiHeadAttention(48, 6)(torch.randn(2, 5, 48, device="meta"))

    def test_contexts_of_another_batch(self):
        with refused(ValueError, "batch differs: query 2, key 3"):
            MultiHeadAttention(48, 6)(torch.randn(2, 5, 48), torch.randn(3, 7, 48))

    def test_a_context_that_is_missing(self):
        with refused(ValueError, "context of width 11", "context="):
            MultiHeadAttention(48, 6, context_dim=11)(torch.randn(2, 5, 48))

    def test_a_cache_with_a_context(self):
        with refused(ValueError, "cache", "context"):
            MultiHeadAttention(48, 6)(torch.randn(2, 5, 48), torch.randn(2, 7, 48), cache=object())

    @pytest.mark.parametrize(
        "padding, error, word",
        [
            (torch.ones(2, 5), TypeError, "True = a real token"),
            (torch.ones(2, 7, dtype=torch.bool), ValueError, "(2, 5)"),
            (torch.ones(2, 5, dtype=torch.bool, device="meta"), ValueError, "meta"),
        ],
    )
    def test_padding_masks(self, padding, error, word):
        with refused(error, "key_mask", word):
            MultiHeadAttention(48, 6)(torch.randn(2, 5, 48), key_mask=padding)

    def test_other_head_counts_in_a_checkpoint(self):
        saved, layer = MultiHeadAttention(48, 4).state_dict(), MultiHeadAttention(48, 8)
        before = copy.deepcopy(layer.state_dict())
        with refused(RuntimeError, "[4, 4, 12]", "[8, 8, 6]"):
            layer.load_state_dict(saved)
        assert all(torch.equal(value, layer.state_dict()[name]) for name, value in before.items())

    def test_head_counts_inside_a_larger_model(self):
        saved, model = nn.Sequential(MultiHeadAttention(48, 4)).state_dict(), nn.Sequential(MultiHeadAttention(48, 8))
        with refused(RuntimeError, "[4, 4, 12]"):
            model.load_state_dict(saved)

    def test_maps_of_plugs_that_do_not_mix(self):
        layer = MultiHeadAttention(48, 6, attend=lambda q, k, v, **options: plain_attention(q, k, v.tanh(), **options))
        with refused(ValueError, "not linear in its values"):
            layer.attention_map(torch.randn(2, 5, 48))

    def test_padding_away_heads(self):
        layer = MultiHeadAttention(48, 6, num_kv_heads=3)
        for count in (4, 7):
            with refused(ValueError, f"num_heads {count}", "at least 6", "group size 2"):
                pad_heads(layer, count)

    @pytest.mark.parametrize(
        "mask, error, word",
        [
            (torch.ones(5, 5), TypeError, "torch.bool"),
            (torch.ones(5, 6, dtype=torch.bool), ValueError, "(5, 6)"),
            (torch.ones(3, 5, 5, dtype=torch.bool), ValueError, "(3, 5, 5)"),
            (torch.ones(5, 5, dtype=torch.bool, device="meta"), ValueError, "meta"),
        ],
    )
    def test_masks_beside_a_padding_mask(self, mask, error, word):
        real = torch.ones(2, 5, dtype=torch.bool)
        with refused(error, "mask", word):
            MultiHeadAttention(48, 6)(torch.randn(2, 5, 48), mask=mask, key_mask=real)

    def test_tokens_that_are_no_embeddings(self):
        with refused(TypeError, "x has dtype torch.int64", "embeddings"):
            MultiHeadAttention(48, 6)(torch.zeros(2, 5, 48, dtype=torch.int64))

    def test_dropout_that_is_no_number(self):
        with refused(TypeError, "dropout", "'0.1'"):
            MultiHeadAttention(48, 6, dropout="0.1")

    def test_a_norm_instead_of_what_makes_one(self):
        with refused(TypeError, "qk_norm", "nn.RMSNorm"):
            MultiHeadAttention(48, 6, qk_norm=nn.RMSNorm(8))

    def test_a_module_hidden_in_a_partial(self):
        with refused(TypeError, "attend is a partial of a module", "nn.Module of its own"):
            MultiHeadAttention(48, 6, attend=partial(nn.Linear(2, 2), bias=None))

    def test_lists_of_heads_that_do_not_divide(self):
        with refused(ValueError, "embed_dim 16", "num_heads 3", "head_dim"):
            HeadList(16, 3)
        with refused(TypeError, "num_heads must be an int"):
            HeadList(16, 4.0)

    @pytest.mark.parametrize("part, head, error", [("k", 3, IndexError), ("q", -1, IndexError), ("x", 0, KeyError)])
    def test_rows_of_heads_that_are_not_there(self, part, head, error):
        with pytest.raises(error):
            HeadLayout(6, 3, 8).rows(part, head)

    def test_unknown_arguments(self):
        with pytest.raises(TypeError):
            MultiHeadAttention(48, 6)(torch.randn(2, 5, 48), attn_mask=None)
        with pytest.raises(TypeError):
            MultiHeadAttention(48, 6, batch_first=True)

    def test_nan_is_found_on_request(self):
        layer, x = MultiHeadAttention(48, 6), torch.randn(2, 5, 48)
        x[1, 2, 3] = math.nan
        assert layer(x).isnan().any()  # silent by default
        layer.register_forward_pre_hook(refuse_nonfinite, with_kwargs=True)
        with refused(ValueError, "nan", "(1, 2, 3)", "1 of 480"):
            layer(x)


# What a layer is, beside what it computes


def test_a_forward_pass_leaves_nothing_on_the_layer():
    layer = MultiHeadAttention(48, 6, dropout=0.2)
    before = set(vars(layer)), {name: value.clone() for name, value in layer.state_dict().items()}
    layer(torch.randn(2, 5, 48), is_causal=True)
    assert set(vars(layer)) == before[0]
    assert all(torch.equal(value, before[1][name]) for name, value in layer.state_dict().items())


def test_dropout_only_in_training():
    layer, x = MultiHeadAttention(48, 6, dropout=0.5), torch.randn(2, 5, 48)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_the_state_dict_holds_the_head_counts():
    state = MultiHeadAttention(20, 6, num_kv_heads=3, head_dim=8).state_dict()
    counts = state["_extra_state"]
    assert counts.dtype == torch.int64 and counts.tolist() == [6, 3, 8]
    assert all(isinstance(value, torch.Tensor) for value in state.values())  # so safetensors can store it


def test_a_layer_survives_copying_saving_and_moving(tmp_path):
    layer, x = MultiHeadAttention(48, 6, qk_norm=nn.RMSNorm), torch.randn(2, 5, 48)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    again = MultiHeadAttention(48, 6, qk_norm=nn.RMSNorm)
    again.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    assert torch.equal(again(x), layer(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert layer.to(torch.float64)(x.double()).dtype == torch.float64
    with torch.device("meta"):
        assert MultiHeadAttention(48, 6)(torch.randn(2, 5, 48)).shape == (2, 5, 48)


def test_the_plug_gets_exactly_the_agreed_arguments():
    seen = {}

    def attend(q, k, v, *, mask, bias, is_causal, dropout_p):
        shapes = [tuple(t.shape) for t in (q, k, v)]
        seen.update(shapes=shapes, mask=mask, bias=bias, is_causal=is_causal, dropout_p=dropout_p)
        return fused_attend(q, k, v, mask=mask, bias=bias, is_causal=is_causal, dropout_p=dropout_p)

    layer = MultiHeadAttention(20, 6, num_kv_heads=3, head_dim=8, dropout=0.25, attend=attend)
    layer(torch.randn(2, 5, 20), is_causal=True)
    assert seen["shapes"] == [(2, 6, 5, 8), (2, 3, 5, 8), (2, 3, 5, 8)]
    assert seen["is_causal"] and seen["dropout_p"] == 0.25
    layer.eval()
    layer(torch.randn(2, 5, 20))
    assert seen["dropout_p"] == 0.0 and seen["mask"] is None and seen["bias"] is None


def test_a_plug_with_parameters_is_trained_with_the_layer():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_scale = nn.Parameter(torch.zeros(6, 1, 1))

        def forward(self, q, k, v, **options):
            return fused_attend(q * self.log_scale.exp(), k, v, **options)

    layer = MultiHeadAttention(48, 6, attend=Scaled())
    layer(torch.randn(2, 5, 48)).square().sum().backward()
    assert "attend.log_scale" in dict(layer.named_parameters()) and layer.attend.log_scale.grad.abs().min() > 0


def test_the_position_plug_is_told_where_it_stands():
    offsets = []

    class Seen:
        seen = torch.tensor([3, 4])

        def append(self, k, v, key_mask=None):
            return k, v, key_mask[:, None, None]

        def commit(self):
            offsets.append("committed")

        def crop(self, length):
            raise NotImplementedError

    def position(q, k, *, offset):
        offsets.append(offset)
        return q, k

    layer = MultiHeadAttention(48, 6, position=position)
    layer(torch.randn(2, 5, 48))
    layer(torch.randn(2, 5, 48), cache=Seen(), key_mask=torch.ones(2, 5, dtype=torch.bool))
    assert offsets[0] == 0 and offsets[1].tolist() == [3, 4] and offsets[2] == "committed"


def rotate(q, k, *, offset):
    "Rotary positions on the first two numbers of each head."
    start = torch.as_tensor(offset).reshape(-1, 1, 1)
    angle = (start + torch.arange(q.shape[2])).to(q.dtype)
    cos, sin = angle.cos(), angle.sin()

    def turned(t):
        a, b, *rest = t.unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos, *rest], -1)

    return turned(q), turned(k)


def test_a_padded_batch_decodes_as_each_sentence_alone():
    layer = MultiHeadAttention(20, 6, num_kv_heads=3, head_dim=8, position=rotate, dtype=torch.float64)
    x, cache = torch.randn(2, 7, 20, dtype=torch.float64), PaddedCache(2)
    real = torch.arange(4) >= torch.tensor([[0], [2]])
    pieces = [layer(x[:, :4], key_mask=real, is_causal=True, cache=cache)]
    pieces += [layer(x[:, i : i + 1], is_causal=True, cache=cache) for i in range(4, 7)]
    together = torch.cat(pieces, dim=1)
    for row, first in ((0, 0), (1, 2)):
        alone = layer(x[row : row + 1, first:], is_causal=True)
        torch.testing.assert_close(together[row : row + 1, first:], alone, atol=1e-12, rtol=0)


def test_a_call_that_fails_late_leaves_the_cache_as_it_was():
    cache = PaddedCache(2)
    layer = MultiHeadAttention(48, 6, attend=lambda q, k, v, **options: v[..., :2])
    with pytest.raises(RuntimeError):
        layer(torch.randn(2, 5, 48), cache=cache)
    assert cache.kept is None and cache.seen.tolist() == [0, 0]


def test_a_norm_or_a_position_may_answer_in_float32():
    layer = MultiHeadAttention(48, 6, position=lambda q, k, *, offset: (q.float(), k.float()), dtype=torch.bfloat16)
    assert layer(torch.randn(2, 5, 48, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_narrow_bias_is_taken_as_it_is():
    "A wide one is tests/kernels/test_wide_bias.py."
    q, k, v = heads()
    extra = torch.randn(s.n, s.m, dtype=torch.bfloat16)
    for attend in plain_attention, fused_attend:
        assert torch.equal(attend(q, k, v, bias=extra), attend(q, k, v, bias=extra.float()))


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_scales_that_are_not_positive(scale):
    q, k, v = heads(n=6, m=6)
    torch.testing.assert_close(
        fused_attend(q, k, v, is_causal=True, scale=scale), plain_attention(q, k, v, is_causal=True, scale=scale)
    )  # torch's own causal kernel gives NaN


@pytest.mark.parametrize("b, n", [(0, 5), (2, 0)])
def test_maps_of_nothing(b, n):
    assert MultiHeadAttention(48, 6).attention_map(torch.randn(b, n, 48)).shape == (b, 6, n, n)


def test_padding_heads_keeps_what_is_frozen():
    layer = MultiHeadAttention(48, 6, context_dim=11).requires_grad_(False).eval()
    wide = pad_heads(layer, 8)
    assert not any(p.requires_grad for p in wide.parameters()) and not any(m.training for m in wide.modules())


# Small things that are public


def test_head_counts_are_the_nearest_divisors():
    assert nearest_head_counts(16, 3) == (2, 4) and nearest_head_counts(768, 10) == (8, 12)
    assert (
        nearest_head_counts(7, 3) == (1, 7)
        and nearest_head_counts(4, 9) == (4, None)
        and nearest_head_counts(6, 1) == (None, 2)
    )


def test_layouts_tell_whose_rows_are_whose():
    layout = HeadLayout(6, 3, 8)
    assert [*layout] == [6, 3, 8] and layout.sizes == (48, 24, 24)
    slices = [layout.rows(part, head) for part, count in (("q", 6), ("k", 3), ("v", 3)) for head in range(count)]
    owned = [i for rows in slices for i in range(200)[rows]]
    assert owned == list(range(96))  # every row once, in order


def test_causal_masks_are_aligned_at_the_end():
    assert causal_mask(2, 4).tolist() == [[True, True, True, False], [True] * 4]
    assert causal_mask(3, 1).tolist() == [[False], [False], [True]]


def test_heads_without_bias():
    assert set(AttentionHead(8, 4, bias=False).state_dict()) == {"q_proj.weight", "k_proj.weight", "v_proj.weight"}
    assert all("bias" not in name for name, _ in HeadList(8, 2, bias=False).named_parameters())
    layer = MultiHeadAttention(48, 6, bias=False, context_dim=11)
    assert layer(torch.randn(2, 5, 48), torch.randn(2, 7, 11)).shape == (2, 5, 48)
    assert all("bias" not in name for name in layer.state_dict())
