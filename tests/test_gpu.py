"""What needs a GPU: `make test-gpu`. Without one these tests are skipped, and say so."""
import pytest
import torch

from mha_book import (MultiHeadAttention, attention, convert_mask, from_torch, fused_attend, gradient_report,
                      to_torch)
from mha_book.testing import SIZES, assert_as_exact, reference_attention

REASON = "needs a CUDA device; run `make test-gpu` where there is one"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason=REASON)
s = SIZES


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attend", [attention, fused_attend])
@pytest.mark.parametrize("is_causal", [False, True])
def test_parity_on_the_gpu(attend, dtype, is_causal):
    shapes = (s.b, s.h, s.n, s.d), (s.b, s.g, s.m, s.d), (s.b, s.g, s.m, s.d)
    q, k, v = (torch.randn(shape).to("cuda", dtype) for shape in shapes)
    mask = torch.rand(s.b, 1, s.n, s.m) < 0.6
    mask[0, :, 2] = False
    options = dict(mask=mask.cuda(), is_causal=is_causal)
    exact = reference_attention(q, k, v, **options)
    plain = attention(q.cpu(), k.cpu(), v.cpu(), mask=mask, is_causal=is_causal)
    assert_as_exact(attend(q, k, v, **options), exact, plain, v.abs().max().item())


def test_the_layer_moves_to_the_gpu_and_back():
    layer, x = MultiHeadAttention(48, 6, dtype=torch.float64), torch.randn(2, 5, 48, dtype=torch.float64)
    here = layer(x, is_causal=True)
    there = layer.cuda()(x.cuda(), is_causal=True)
    assert there.is_cuda
    torch.testing.assert_close(there.cpu(), here, atol=1e-12, rtol=0)


def test_conversion_keeps_weights_and_masks_on_the_gpu():
    theirs = torch.nn.MultiheadAttention(48, 6, batch_first=True, device="cuda", dtype=torch.float64)
    x = torch.randn(s.b, s.n, 48, device="cuda", dtype=torch.float64)
    hidden = torch.ones(s.n, s.n, dtype=torch.bool, device="cuda").triu(1)
    mask = convert_mask(hidden, "torch", "mha_book", (s.b, s.h, s.n, s.n))
    layer = from_torch(theirs)
    expected = theirs(x, x, x, attn_mask=hidden)[0]
    torch.testing.assert_close(layer(x, mask=mask), expected, atol=1e-12, rtol=0)
    assert {p.device.type for module in (layer, to_torch(layer)) for p in module.parameters()} == {"cuda"}


def test_the_report_measures_on_the_gpu_what_it_measures_here():
    layer, x = MultiHeadAttention(48, 6, dtype=torch.float64), torch.randn(2, 5, 48, dtype=torch.float64)
    here = gradient_report(layer, lambda: layer(x).square().sum())
    layer, x = layer.cuda(), x.cuda()
    there = gradient_report(layer, lambda: layer(x).square().sum())
    assert [row.norm for row in there.heads] == pytest.approx([row.norm for row in here.heads], rel=1e-9)
