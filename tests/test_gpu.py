"""What needs a GPU: `make test-gpu`. Without one these tests are skipped, and say so."""
import pytest
import torch

from mha_book import MultiHeadAttention, attention, fused_attend
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
