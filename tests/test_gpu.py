"""What needs a GPU: `make test-gpu`. Without one these tests are skipped, and say so."""

import pytest
import torch
import torch.nn.functional as F

from mha_book import MultiHeadAttention, convert_mask, from_torch, fused_attend, gradient_report, to_torch
from mha_book.bench.cli import main
from mha_book.bench.measured import read_measurement
from mha_book.heads.single_head import plain_attention
from mha_book.instruments.dispatch import explain_dispatch
from mha_book.instruments.testing import SIZES, assert_as_exact, reference_attention
from mha_book.kernels.backends import BACKENDS
from mha_book.kernels.backends import attention as attention_by
from mha_book.lab.nine_ways import NINE_WAYS

REASON = "needs a CUDA device; run `make test-gpu` where there is one"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason=REASON)
s = SIZES


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attend", [plain_attention, fused_attend])
@pytest.mark.parametrize("is_causal", [False, True])
def test_parity_on_the_gpu(attend, dtype, is_causal):
    shapes = (s.b, s.h, s.n, s.d), (s.b, s.g, s.m, s.d), (s.b, s.g, s.m, s.d)
    q, k, v = (torch.randn(shape).to("cuda", dtype) for shape in shapes)
    mask = torch.rand(s.b, 1, s.n, s.m) < 0.6
    mask[0, :, 2] = False
    options = dict(mask=mask.cuda(), is_causal=is_causal)
    exact = reference_attention(q, k, v, **options)
    plain = plain_attention(q.cpu(), k.cpu(), v.cpu(), mask=mask, is_causal=is_causal)
    assert_as_exact(attend(q, k, v, **options), exact, plain)


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


@pytest.mark.parametrize("name", NINE_WAYS)
def test_each_of_the_nine_ways_is_the_layer_on_the_gpu(name):
    layer = MultiHeadAttention(48, 6, dtype=torch.float64, device="cuda")
    x = torch.randn(s.b, s.n, 48, dtype=torch.float64, device="cuda", requires_grad=True)
    results = []
    for call in (lambda: layer(x, is_causal=True), lambda: NINE_WAYS[name](layer)(x)):
        layer.zero_grad()
        x.grad = None
        y = call()
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in layer.parameters())])
    for wanted, got in zip(*results):
        torch.testing.assert_close(got, wanted, atol=1e-11, rtol=0)


def test_the_benchmark_runs_on_the_gpu(tmp_path):
    file = tmp_path / "gpu.json"
    assert main(["bench", "--quick", "--device", "cuda", "--json", str(file)]) == 0
    found = read_measurement(file)
    assert found.device["kind"] == "cuda" and found.dtype == "bfloat16"
    assert {table.suite for table in found.tables} >= {"layers", "ways", "backends"}


OPTIONS = [
    {},
    {"is_causal": True},
    {"window": 40, "is_causal": True},
    {"window": (9, 3)},
    {"softcap": 2.0},
    {"sinks": True},
    {"sinks": True, "is_causal": True},
    {"sinks": True, "window": 17, "softcap": 2.0},
    {"mask": True, "bias": True, "window": 30},
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", ["auto", *BACKENDS])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_backends_on_the_gpu(impl, options, dtype):
    shapes = (s.b, s.h, 150, 32), (s.b, s.g, 170, 32), (s.b, s.g, 170, 32)
    leaves = [torch.randn(shape).to(dtype).double() for shape in shapes]
    made = {
        "sinks": torch.randn(s.h).to(dtype).double(),
        "bias": torch.randn(s.h, 150, 170).to(dtype).double(),
        "mask": torch.rand(s.b, 1, 150, 170) < 0.8,
    }
    options = {name: made[name] if value is True and name in made else value for name, value in options.items()}
    names = [name for name in ("sinks", "bias") if name in options]
    leaves += [options[name] for name in names]
    upstream = torch.randn(s.b, s.h, 150, 32).to(dtype).double()

    def outcome(impl, dtype, device):
        here = [t.to(device, dtype).requires_grad_() for t in leaves]
        rest = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
        out = attention_by(*here[:3], impl=impl, **rest | dict(zip(names, here[3:])))
        return [out, *torch.autograd.grad(out, here, upstream.to(out))]

    try:
        got = outcome(impl, dtype, "cuda")
    except NotImplementedError as refusal:
        assert impl in ("sdpa", "flex") and "lacks" in str(refusal)
        return
    exact, plain = outcome("math", torch.float64, "cpu"), outcome("math", dtype, "cpu")
    sizes = [exact[0].detach().abs().max(), *[max(g.abs().max() for g in exact[1:])] * len(leaves)]
    for mine, true, simple, size in zip(got, exact, plain, sizes):
        assert_as_exact(mine, true.detach(), simple.detach(), size.item())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": 9}, {"dropout_p": 0.1}], ids=str)
def test_the_explained_kernel_runs_on_the_gpu(options, dtype):
    q, k, v = torch.randn(3, 1, 8, 256, 64, device="cuda", dtype=dtype)
    told = explain_dispatch(q, k, v, impl="sdpa", **options)
    with torch.profiler.profile() as profile:
        attention_by(q, k, v, impl="sdpa", **options)
    names = " ".join(event.name for event in profile.events())
    seen = "attention_math" if told.kernel == "math" else f"{told.kernel}_attention"
    assert f"_scaled_dot_product_{seen}" in names
    assert set(told.kernels) == {"flash", "efficient", "cudnn", "math"} - {told.kernel}


def test_a_plain_call_is_torchs_kernel_on_the_gpu():
    q, k, v = torch.randn(3, 1, 8, 256, 64, device="cuda", dtype=torch.bfloat16)

    def events(call):
        call()
        with torch.profiler.profile() as profile:
            call()
        return [event.name for event in profile.events() if event.name.startswith(("aten::", "cuda", "Memcpy"))]

    ours = events(lambda: attention_by(q, k, v, is_causal=True))
    assert ours == events(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))


@pytest.mark.parametrize("options", [{"window": 256, "is_causal": True}, {"softcap": 30.0}, {"sinks": True}], ids=str)
def test_auto_never_holds_more_than_math_on_the_gpu(options):
    from mha_book.instruments.device import peak_bytes

    q, k, v = torch.randn(3, 1, 8, 2048, 64, device="cuda", dtype=torch.bfloat16)
    options = {
        name: torch.randn(8, device="cuda") if value is True and name == "sinks" else value
        for name, value in options.items()
    }
    held = {}
    for impl in "auto", "math":
        attention_by(q, k, v, impl=impl, **options)  # whatever is made once
        held[impl] = peak_bytes(lambda: attention_by(q, k, v, impl=impl, **options), "cuda")
    assert held["auto"] <= held["math"]
