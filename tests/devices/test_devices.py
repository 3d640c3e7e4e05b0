"""Nothing lives on a device that nobody asked for: the package on the meta device, and package and pages on a simulated
GPU. `make test-devices` runs the pages as well."""

import copy
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import nbformat
import on_simulated_gpu
import pytest
import simulated_gpu
import torch
from simulated_gpu import tensors_in
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mha_book
import mha_book.kernels.flex  # noqa: F401  enters its backend
from mha_book.heads import single_head
from mha_book.heads.dialects import DIALECTS
from mha_book.heads.layer import MultiHeadAttention
from mha_book.heads.masks import convert_mask
from mha_book.heads.weight_split import HeadLayout
from mha_book.instruments import dispatch
from mha_book.instruments.testing import SIZES
from mha_book.kernels import backends
from mha_book.lab.nine_ways import NINE_WAYS
from mha_book.models.encoder import Encoder, EncoderConfig, convert_bert, encode, expected_tensors, mean_pool
from mha_book.plugs import quantize
from mha_book.plugs.quantize import HeadPrecision
from mha_book.plugs.quantized_cache import QuantizedKVCache, promised_bytes
from support.mutants import DEVICES

ROOT = Path(__file__).resolve().parents[2]
s = SIZES
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU, which nothing needs to simulate")


# --- the simulated GPU notices --------------------------------------------------------------------------------------


@pytest.fixture
def gpu():
    with simulated_gpu.simulated_gpu() as mode:
        yield mode


table_plug, causal_here = DEVICES["position table"].apply, DEVICES["mask in a plug"].apply


def layer_of(device, **options):
    options = dict(num_kv_heads=s.g, head_dim=s.d, device=device, dtype=torch.float64) | options
    return MultiHeadAttention(s.e, s.h, **options)


def tokens(device, n=s.n, width=s.e):
    return torch.randn(s.b, n, width, device=device, dtype=torch.float64)


MIXES = {
    "product": (lambda x, c: x @ c, "same device"),
    "sum": (lambda x, c: x + c, "same device"),
    "written into": (lambda x, c: c.add_(x), "same device"),
    "one of a list": (lambda x, c: torch.cat([x, x, c]), "same device"),
    "scalars side by side": (lambda x, c: torch.stack([x[0, 0], c[0, 0]]), "same device"),
    "total on the CPU": (lambda x, c: torch.tensor(0.0).add_(x[0, 0]), "write to CPU scalar"),
    "comparison": (lambda x, c: torch.allclose(x, c), "same device"),
    "mask": (lambda x, c: x.masked_fill(c > 0, 0.0), "same device"),
    "index": (lambda x, c: c[x > 0], "indices"),
    "indexed write": (lambda x, c: x.__setitem__(x > 0, c.flatten()), "same device"),
    "arange in a function": (lambda x, c: x * torch.arange(3), "same device"),
    "module": (lambda x, c: nn.Linear(3, 3)(x), "same device"),
    "embedding": (lambda x, c: nn.Embedding(3, 2)(torch.zeros(3, dtype=torch.long, device="cuda")), "same device"),
    "where": (lambda x, c: torch.where(x > 0, c, x), "same device"),
    "loss": (lambda x, c: nn.functional.cross_entropy(x, torch.zeros(3, dtype=torch.long)), "same device"),
    "gradient": (lambda x, c: (x.requires_grad_() * 2).backward(c), "same device"),
    "compiled": (lambda x, c: torch.compile(torch.add)(x, c), "same device"),
    "numpy": (lambda x, c: x.numpy(), "to numpy"),
    "numpy, unasked": (lambda x, c: __import__("numpy").asarray(x), "to numpy"),
    "generator": (lambda x, c: torch.randn(3, device="cuda", generator=torch.Generator()), "generator"),
    "a second GPU": (lambda x, c: x.to("cuda:1"), "ordinal"),
    "integers": (lambda x, c: x.long() @ x.long(), "not implemented"),
    "position table": (lambda x, c: layer_of("cuda", position=table_plug)(tokens("cuda")), "same device"),
    "mask in a plug": (lambda x, c: layer_of("cuda", attend=causal_here)(tokens("cuda")), "same device"),
    "vmap": (lambda x, c: torch.func.vmap(lambda row: row + torch.ones(3))(x), "same device"),
}


@no_gpu
@pytest.mark.parametrize("name", MIXES)
def test_two_devices_in_one_call_are_refused(gpu, name):
    mix, message = MIXES[name]
    with pytest.raises((RuntimeError, TypeError), match=message):
        mix(torch.randn(3, 3, device="cuda"), torch.randn(3, 3))


FINE = {
    "CPU scalar": lambda x, c: x * torch.tensor(2.0),
    "CPU index": lambda x, c: x[torch.tensor([2, 0])],
    "CPU mask as index": lambda x, c: x[c > 0],
    "copy_": lambda x, c: x.copy_(c),
    "row written": lambda x, c: (x.__setitem__(1, c[1]), x)[1],
    "moved by name": lambda x, c: c.to("cuda") + x,
    "moved to another's": lambda x, c: c.to(x) + x,
    "moved by cuda()": lambda x, c: c.cuda() @ x,
    "like": lambda x, c: x + torch.zeros_like(x) + x.new_ones(3),
    "as_tensor": lambda x, c: torch.as_tensor(c, device="cuda") + x,
    "view": lambda x, c: x.T[1:].unflatten(1, (3, 1)),
    "parameter": lambda x, c: nn.Parameter(x) @ x,
    "module": lambda x, c: nn.Linear(3, 3).to("cuda")(x),
    "copy of a module": lambda x, c: copy.deepcopy(nn.Linear(3, 3, device="cuda"))(x),
    "generator": lambda x, c: torch.randn(3, device="cuda", generator=torch.Generator("cuda")) + x,
    "default device": lambda x, c: (torch.set_default_device("cuda"), torch.arange(3) + x)[1],
    "default in a block": lambda x, c: torch.device("cuda").__enter__() and torch.arange(3) + x,
    "gradient": lambda x, c: torch.autograd.grad((x.requires_grad_() ** 2).sum(), x)[0],
    "gradient through the CPU": lambda x, c: torch.autograd.grad((x.requires_grad_().cpu() ** 2).sum(), x)[0],
    "accumulated": lambda x, c: ((x.requires_grad_() ** 2).sum().backward(), x.grad)[1],
    "vmap": lambda x, c: torch.func.vmap(lambda row: row + torch.ones(3, device="cuda"))(x),
    "compiled": lambda x, c: torch.compile(torch.add)(x, x),
    "dropout": lambda x, c: nn.functional.dropout(x),
    "reduced": lambda x, c: x.sum() + x.amax(0),
}


@no_gpu
@pytest.mark.parametrize("name", FINE)
def test_what_cuda_allows_works_and_stays_on_the_gpu(gpu, name):
    x, c = torch.randn(3, 3, device="cuda"), torch.randn(3, 3)
    result = FINE[name](x, c)
    assert result.device == torch.device("cuda:0") and result.is_cuda and not c.is_cuda
    assert not result.detach().cpu().is_cuda and result.detach().cpu().numpy().shape == result.shape


@no_gpu
def test_numbers_are_those_of_the_cpu(gpu):
    layer, x = layer_of("cpu"), tokens("cpu").requires_grad_()
    here = layer(x, is_causal=True)
    here.square().sum().backward()
    grads = [p.grad.clone() for p in layer.parameters()]
    moved, y = copy.deepcopy(layer).cuda(), x.detach().cuda().requires_grad_()
    moved.zero_grad()
    there = moved(y, is_causal=True)
    there.square().sum().backward()
    assert there.is_cuda and y.grad.is_cuda and not x.grad.is_cuda and torch.equal(there.cpu(), here)
    assert torch.equal(y.grad.cpu(), x.grad)
    assert all(p.grad.is_cuda and torch.equal(p.grad.cpu(), g) for p, g in zip(moved.parameters(), grads))


@no_gpu
def test_the_gpu_draws_its_own_numbers_and_repeats_them(gpu):
    torch.manual_seed(3)
    first, here = torch.randn(5, device="cuda"), torch.randn(5)
    assert not torch.equal(first.cpu(), here) and not torch.equal(torch.randn(5, device="cuda"), first)
    torch.manual_seed(3)
    assert torch.equal(torch.randn(5), here) and torch.equal(torch.randn(5, device="cuda"), first)


@no_gpu
def test_memory_is_counted(gpu):
    before = torch.cuda.memory_allocated()
    x = torch.ones(1000, device="cuda")
    assert torch.cuda.memory_allocated() - before == x.nbytes == x[1:].untyped_storage().nbytes()
    y = x + x
    del x, y
    assert torch.cuda.memory_allocated() == before and torch.cuda.max_memory_allocated() >= before + 8000


@no_gpu
def test_afterwards_all_is_as_before():
    with simulated_gpu.simulated_gpu():
        torch.set_default_device("cuda")
        assert torch.cuda.is_available() and torch.ones(1).is_cuda
    assert not torch.cuda.is_available() and torch.get_default_device().type == torch.ones(1).device.type == "cpu"


# --- the package, on the meta device and on the simulated GPU -------------------------------------------------------


class OnlyOn(TorchDispatchMode):
    "Fails at the first operation that reads or makes a tensor on another device."

    def __init__(self, device_type):
        super().__init__()
        self.device_type = device_type

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        found = {t.device.type for t in tensors_in([args, kwargs or {}, result])}
        assert found <= {self.device_type}, f"{func} met {', '.join(found)}; only {self.device_type} was asked for"
        return result


def heads(device, groups=s.g, dv=s.dv):
    shapes = (s.b, s.h, s.n, s.d), (s.b, groups, s.m, s.d), (s.b, groups, s.m, dv)
    return [torch.randn(shape, device=device, dtype=torch.float64).requires_grad_() for shape in shapes]


def bits(*shape, device):
    return torch.rand(*shape, device=device) < 0.7


def turn(q, k, *, offset):
    "A position plug as RoPE is: a table of angles, made where the queries are."
    place = torch.arange(q.shape[2], device=q.device)[:, None] + offset
    angles = torch.cat([place * 0.1 ** torch.arange(s.d // 2, device=q.device)] * 2, dim=-1)
    half = lambda t: torch.cat([-t[..., s.d // 2 :], t[..., : s.d // 2]], dim=-1)  # noqa: E731
    return tuple(t * angles.cos() + half(t) * angles.sin() for t in (q, k))


class GrowingCache:
    "Keeps everything."

    kept, seen = None, 0

    def append(self, k, v, key_mask=None):
        old = self.kept or (k[:, :, :0], v[:, :, :0])
        self.pending = torch.cat([old[0], k], dim=2), torch.cat([old[1], v], dim=2)
        return *self.pending, None

    def commit(self):
        self.kept, self.seen = self.pending, self.pending[0].shape[2]

    def crop(self, length):
        self.kept, self.seen = tuple(t[:, :, :length] for t in self.kept), length


SHARED = {  # options of every attention
    "plain": lambda d: {},
    "causal": lambda d: dict(is_causal=True),
    "mask m": lambda d: dict(mask=bits(s.m, device=d)),
    "mask h n m, causal": lambda d: dict(mask=bits(s.h, s.n, s.m, device=d), is_causal=True),
    "bias": lambda d: dict(bias=torch.randn(s.h, s.n, s.m, device=d)),
    "bias, mask, causal, scale": lambda d: dict(
        bias=torch.randn(s.m, device=d), mask=bits(s.b, 1, s.n, s.m, device=d), is_causal=True, scale=-0.3
    ),
}
NEWER = {  # options that chapter 7 adds
    "window": lambda d: dict(window=3),
    "window, sinks": lambda d: dict(window=(2, 1), sinks=torch.randn(s.h, device=d)),
    "sinks, causal": lambda d: dict(sinks=torch.randn(s.h, device=d), is_causal=True),
    "sinks, mask, bias": lambda d: dict(
        sinks=torch.randn(s.h, device=d), mask=bits(s.n, s.m, device=d), bias=torch.randn(s.m, device=d)
    ),
}
SOFTCAP = {"softcap, window": lambda d: dict(softcap=1.5, window=(None, 2), is_causal=True)}
DROPOUT = {"dropout": lambda d: dict(dropout_p=0.5)}
ALL = SHARED | NEWER | SOFTCAP | DROPOUT
CASES = {}  # "public name: what is special" -> a function of the device that gives tensors, or layers, or dicts


def enter(name, act, variants):
    "A case for each variant of the options."
    CASES.update({f"{name}: {title}": partial(act, options=options) for title, options in variants.items()})


def mixed(device, options, attend):
    q, k, v = heads(device)
    y = attend(q, k, v, **options(device))
    return y, torch.autograd.grad(y.sum(), (q, k, v))


def weighed(device, options, weights):
    q, k, _ = heads(device)
    return weights(q, k, **options(device))


enter("attention, the definition", partial(mixed, attend=single_head.plain_attention), SHARED | DROPOUT)
enter("fused_attend", partial(mixed, attend=single_head.fused_attend), SHARED | DROPOUT)
enter("attention_weights, the definition", partial(weighed, weights=single_head.plain_attention_weights), SHARED)
enter("attention_weights", partial(weighed, weights=backends.attention_weights), SHARED | NEWER | SOFTCAP)
enter("attention_logits", partial(weighed, weights=backends.attention_logits), SHARED | SOFTCAP)
enter("attention", partial(mixed, attend=backends.attention), ALL)
enter("attention, math", partial(mixed, attend=partial(backends.attention, impl="math")), ALL)
enter("attention, sdpa", partial(mixed, attend=partial(backends.attention, impl="sdpa")), SHARED | NEWER | DROPOUT)


def explained(device, options):
    q, k, v = heads(device)
    assert str(dispatch.explain_dispatch(q, k, v, **options(device))).startswith("runs ")
    return q


enter("explain_dispatch", explained, ALL)

LAYERS = {  # options of the layer, and of its call
    "plain": lambda d: ({}, {}),
    "causal": lambda d: ({}, dict(is_causal=True)),
    "no biases, out_dim": lambda d: (dict(bias=False, out_dim=13), {}),
    "mask, bias, padding": lambda d: (
        {},
        dict(
            mask=bits(s.n, s.n, device=d), bias=torch.randn(s.h, s.n, s.n, device=d), key_mask=bits(s.b, s.n, device=d)
        ),
    ),
    "context": lambda d: ({}, dict(context=tokens(d, s.m), is_causal=True)),
    "context_dim": lambda d: (
        dict(context_dim=11),
        dict(context=tokens(d, s.m, 11), key_mask=bits(s.b, s.m, device=d)),
    ),
    "value": lambda d: ({}, dict(context=tokens(d, s.m), value=tokens(d, s.m))),
    "value_dim": lambda d: (dict(value_dim=5), {}),
    "qk_norm": lambda d: (dict(qk_norm=partial(nn.RMSNorm, device=d)), {}),
    "position": lambda d: (dict(position=turn), {}),
    "position, cache": lambda d: (dict(position=turn), dict(cache=GrowingCache(), is_causal=True)),
    "definition plugged in": lambda d: (dict(attend=single_head.plain_attention), dict(is_causal=True)),
    "window plugged in": lambda d: (dict(attend=partial(backends.attention, window=3, softcap=2.0)), {}),
    "dropout": lambda d: (dict(dropout=0.4), {}),
}


def ran(device, options, method="forward"):
    made, called = options(device)
    layer, x = layer_of(device, **made), tokens(device)
    y = getattr(layer, method)(x, **called)
    y.sum().backward()
    return layer, y, [p.grad for p in layer.parameters()]


enter("MultiHeadAttention", ran, LAYERS)
enter(
    "MultiHeadAttention, its map",
    partial(ran, method="attention_map"),
    {name: LAYERS[name] for name in LAYERS if "window" not in name},
)
enter(
    "pad_heads",
    lambda device, options: mha_book.pad_heads(layer_of(device, **options(device)[0]), s.h + 4),
    {name: LAYERS[name] for name in ("plain", "no biases, out_dim", "context_dim")},
)
enter(
    "separate_projections",
    lambda device, options: mha_book.separate_projections(layer_of(device, **options(device)[0])),
    {name: LAYERS[name] for name in ("plain", "no biases, out_dim", "context_dim")},
)
CASES |= {
    "stack_projections": lambda device: mha_book.stack_projections(mha_book.separate_projections(layer_of(device))),
    "causal_mask": lambda device: mha_book.causal_mask(s.n, s.m, device),
    "window_mask": lambda device: backends.window_mask(s.n, s.m, (2, 1), device),
    "split_heads": lambda device: mha_book.split_heads(tokens(device, width=s.h * s.d), s.h),
    "merge_heads": lambda device: mha_book.merge_heads(heads(device)[0]),
    "AttentionHead": lambda device: mha_book.AttentionHead(s.e, s.d).to(device).double()(tokens(device)),
    "HeadList": lambda device: (
        mha_book.HeadList(s.e, s.h, s.d).to(device).double()(tokens(device), mask=bits(s.n, s.n, device=device))
    ),
    "MultiHeadAttention, saved and loaded": lambda device: (
        layer := layer_of(device),
        layer.load_state_dict(layer_of(device).state_dict()),
    ),
    "to_torch": lambda device: mha_book.to_torch(MultiHeadAttention(48, s.h, device=device)),
    "to_torch: context_dim": lambda device: mha_book.to_torch(
        MultiHeadAttention(48, s.h, context_dim=11, device=device)
    ),
    "from_torch": lambda device: mha_book.from_torch(nn.MultiheadAttention(48, s.h, batch_first=True, device=device)),
    "from_torch: kdim": lambda device: mha_book.from_torch(
        nn.MultiheadAttention(48, s.h, batch_first=True, kdim=11, vdim=11, device=device)
    ),
    "from_state_dict": lambda device: mha_book.from_state_dict(
        dict(layer_of(device).named_parameters()), HeadLayout(s.h, s.g, s.d)
    ),
}


def converted(device, options):
    heads = HeadLayout(s.h, 1 if options == "multi_query" else s.h, s.d)
    state = {name: p.detach() for name, p in layer_of(device, num_kv_heads=heads.num_kv_heads).named_parameters()}
    there = mha_book.convert_weights(state, "stacked", options, heads)
    assert options in mha_book.fitting_dialects(there, heads)
    return there, mha_book.convert_weights(there, options, "stacked", heads)


enter("convert_weights, fitting_dialects", converted, {name: name for name in DIALECTS})


def in_two_parts(device, options):
    q, k, v = heads(device)
    parts = zip(*(mha_book.attention_with_lse(q, a, b) for a, b in zip(k.split(4, dim=2), v.split(4, dim=2))))
    return mha_book.merge_attention(*parts), mha_book.attention_with_lse(q, k, v, **options(device))


enter("attention_with_lse, merge_attention", in_two_parts, SHARED | NEWER | SOFTCAP)
enter(
    "head_statistics",
    partial(weighed, weights=mha_book.head_statistics),
    {name: SHARED[name] for name in ("plain", "causal", "mask h n m, causal", "bias")},
)


def held(device, options):
    layer = layer_of(device, attend=options(s.h, device=device, dtype=torch.float64))
    y = layer(tokens(device), is_causal=True)
    y.sum().backward()
    return layer, y


ROPES = {
    name: mha_book.RoPE(s.d, **options)
    for name, options in {
        "half-split": {},
        "interleaved": dict(pairing="interleaved"),
        "partial": dict(rotary_dim=4),
        "RoPELinearScaling": dict(frequencies=mha_book.RoPELinearScaling(8)),
        "RoPENTKScaling": dict(frequencies=mha_book.RoPENTKScaling(8)),
        "RoPELlama3Scaling": dict(frequencies=mha_book.RoPELlama3Scaling(8, 32)),
        "RoPEYaRNScaling": dict(frequencies=mha_book.RoPEYaRNScaling(8, 32)),
    }.items()
}


def turned(device, options):
    layer = layer_of(device, position=options)
    k = heads(device)[1]
    y = layer(tokens(device), is_causal=True, cache=GrowingCache())
    y.sum().backward()
    return y, options(k, k, offset=torch.arange(s.b, device=device)), [p.grad for p in layer.parameters()]


enter("RoPE", turned, ROPES)


def turned_by_tables(device, options):
    angles = torch.randn(2 * s.m, s.d // 2, device=device, dtype=torch.float64)
    tables = dict(cos=angles.cos(), sin=angles.sin())
    tables |= dict(position_ids=torch.arange(s.n, device=device)[None]) if options else {}
    layer = layer_of(device, position=partial(mha_book.rotate_by_tables, **tables))
    y = layer(tokens(device), is_causal=True)
    y.sum().backward()
    return y, [p.grad for p in layer.parameters()]


enter("rotate_by_tables", turned_by_tables, {"by place": False, "by ids": True})
enter(
    "RelativeBias, ALiBi",
    held,
    dict(learned=mha_book.RelativeBias, fixed=lambda h, *, device, dtype: mha_book.ALiBi(h)),
)


def placed(device, options):
    "Tokens that stand somewhere, row by row; for `LearnedPositions` and the waves."
    table = mha_book.LearnedPositions(s.m, s.e, device=device, dtype=torch.float64)
    offset = torch.zeros(s.b, dtype=torch.int64, device=device) if options else 2
    y = table(tokens(device), offset=offset)
    y.sum().backward()
    return table, y, table.weight.grad, mha_book.sinusoidal_positions(torch.arange(s.n, device=device), s.e)


enter(
    "ExtraKeys",
    held,
    {
        "learned": lambda h, **like: mha_book.ExtraKeys(s.g, s.d, zero=True, **like),
        "zero": lambda h, **like: mha_book.ExtraKeys(s.g, s.d, learned=False, zero=True, **like),
    },
)
enter("LearnedPositions, sinusoidal_positions", placed, {"one place": False, "a place a row": True})


def through_kernel(q, k, v, **options):
    mixing = torch.randn(s.h, s.h, device=q.device)
    out = mha_book.talk_through_kernel(q, k, v, mixing, mixing, **options)
    return mha_book.mix_heads(out, mixing)


enter("HeadTemperature, SinkAttention", held, dict(temperature=mha_book.HeadTemperature, sinks=mha_book.SinkAttention))
enter("MultiTokenAttention", held, dict(multi_token=mha_book.MultiTokenAttention))


def composed(device):
    options = dict(num_kv_heads=s.g, head_dim=s.d, device=device, dtype=torch.float64)
    layer, x = mha_book.ComposedHeads(s.e, s.h, **options), tokens(device)
    y = layer(x, is_causal=True, key_mask=bits(s.b, s.n, device=device))
    return layer, y, layer.attention_map(x), torch.autograd.grad(y.sum(), [*layer.parameters()])


enter("mix_heads, talk_through_kernel", partial(mixed, attend=through_kernel), SHARED | DROPOUT)
enter(
    "TalkingHeads",
    held,
    {
        "by the definition": lambda h, **like: mha_book.TalkingHeads(h, window=3, softcap=2.0, **like),
        "by a kernel": lambda h, **like: mha_book.TalkingHeads(h, weights=False, attend=mha_book.attention, **like),
    },
)


def gated(device):
    gate = mha_book.OutputGate(s.e, s.h, head_dim=s.d, device=device, dtype=torch.float64)
    layer = layer_of(device, finish=gate)
    return layer, layer(tokens(device), is_causal=True)


def mixture_of(device, **options):
    plug = mha_book.MixtureOfHeads(s.e, s.h, 4, num_shared=1, device=device, dtype=torch.float64)
    return layer_of(device, finish=plug, **options)


def interleaved(device, options):
    plug = mha_book.InterleavedHeads(s.h, 4, num_kv_heads=s.g, window=3, device=device, dtype=torch.float64)
    return mixed(device, options, plug), [p.grad for p in plug.parameters()]


enter("InterleavedHeads", interleaved, SHARED | DROPOUT)


def collaborating(device, options):
    layer = mha_book.CollaborativeHeads(s.e, s.h, 12, value_dim=s.dv, device=device, dtype=torch.float64)
    x = tokens(device)
    y = layer(x, **options)
    cache = layer.new_cache(s.b, s.n)
    with torch.no_grad():
        rows = [layer(part, is_causal=True, cache=cache) for part in x.split(2, 1)]
    return layer, y, torch.autograd.grad(y.sum(), [*layer.parameters()]), layer.attention_map(x), rows, cache.k


enter("CollaborativeHeads", collaborating, {"plain": {}, "causal": dict(is_causal=True)})


def made_to_collaborate(device):
    layer, seen = layer_of(device), tokens(device).flatten(0, 1)
    ways = dict(tokens=seen, steps=2), dict(steps=2, start="random")
    new = [mha_book.collaborate(layer, 9, **way) for way in ways]
    return *(list(one.parameters()) for one in new), new[0](tokens(device))


def routed(device):
    layer, x, real = mixture_of(device), tokens(device), bits(s.b, s.n, device=device)
    with mha_book.recorded_routes(layer) as found:
        y = layer(x, key_mask=real)
    loss = mha_book.balance_loss(found["finish"][0], real)
    return layer, found["finish"], torch.autograd.grad(y.sum() + loss, [*layer.parameters()])


def skipped(device):
    layer = mixture_of(device)
    y = mha_book.skip_heads(layer, tokens(device), key_mask=bits(s.b, s.n, device=device), is_causal=True)
    turned = mixture_of(device, position=mha_book.RoPE(s.d))
    return layer, y, mha_book.skip_heads(turned, tokens(device)), torch.autograd.grad(y.sum(), [*layer.parameters()])


def regrouped(device, options):
    layer = layer_of(device, **options(device)[0])
    few, many = mha_book.mean_kv_heads(layer, 1), mha_book.repeat_kv_heads(layer, s.h)
    context = tokens(device, s.m, 11) if layer.context_proj is not None else None
    return layer, few, many, [one(tokens(device), context) for one in (few, many)]


def aligned(device, options):
    layer = layer_of(device, **options(device)[0])
    width = 11 if layer.context_proj is not None else s.e
    by_rows, by_tokens = (mha_book.align_kv_heads(layer, 1, x) for x in (None, tokens(device, 20, width)))
    eye = torch.eye(s.d, device=device, dtype=torch.float64).expand(s.g, -1, -1)
    return layer, by_rows, by_tokens, mha_book.rotate_kv_heads(layer, eye, eye)


some_layers = {name: LAYERS[name] for name in ("plain", "no biases, out_dim", "context_dim")}
enter("mean_kv_heads, repeat_kv_heads", regrouped, some_layers)
enter("align_kv_heads, rotate_kv_heads", aligned, some_layers)
enter("folded_attend", partial(mixed, attend=mha_book.folded_attend), SHARED | DROPOUT)


def by_heads(device, options):
    "Heads in three formats, in another order and basis; and the layer under the policy for a while."
    turn = mha_book.hadamard(s.d, device=device, dtype=torch.float64)
    layer = mha_book.rotate_heads(layer_of(device, **options(device)[0]), turn, turn)
    precision = HeadPrecision(("int4", "bfloat16", "int4"), ("int4", "bfloat16", "float8_e5m2"), group=2, exact_first=0)
    new, precision = mha_book.sort_heads(mha_book.permute_heads(layer, [2, 0, 1]), precision)
    precisions = mha_book.precisions_from_json(mha_book.precisions_to_json({"": precision}), new)
    x, context = tokens(device), tokens(device, s.m, 11) if layer.context_proj is not None else None
    with mha_book.use_precision(new, precisions):
        y = new(x, context, key_mask=bits(s.b, s.n if context is None else s.m, device=device))
    return layer, new, y, torch.autograd.grad(y.sum(), [*new.parameters()][0])


def of_fewer_heads(device, options):
    "Heads that leave, in a layer and in a model."
    layer = layer_of(device, **options(device)[0])
    h, g, _ = layer.layout
    means = torch.randn(h, layer.layout.value_dim, device=device, dtype=torch.float64)
    gone, means = range(h // g), None if layer.out_proj.bias is None else means
    new = mha_book.prune_heads(layer, gone, means=means)
    model = mha_book.prune_model(nn.Sequential(layer), {"0": gone}, means=means if means is None else {"0": means})
    x, context = tokens(device), tokens(device, s.m, 11) if layer.context_proj is not None else None
    y = model[0](x, context)
    return layer, new, y, torch.autograd.grad(y.sum(), [*model.parameters()][0])


def behind_gates(device, options):
    "Gates in training and in eval mode, their price, and what stays of the layer without them."
    layer = layer_of(device, **options(device)[0])
    gates = mha_book.add_gates(layer, start=0.5)[""]
    with torch.no_grad():
        gates.log_alpha[: len(gates.log_alpha) // layer.layout.num_kv_heads] = -9.0
    x, context = tokens(device), tokens(device, s.m, 11) if layer.context_proj is not None else None
    y = layer.train()(x, context)
    grads = torch.autograd.grad(y.sum() + mha_book.open_price(layer), [gates.log_alpha, layer.out_proj.weight])
    pruned = layer if gates.log_alpha.is_meta else mha_book.prune_gated(layer)  # which reads numbers
    return layer, gates.draw(s.b), y, grads, pruned.eval()(x, context)


def with_mixed_rows(device, options):
    "Heads that knock and are mixed, folded; and mixed outputs."
    layer = mha_book.mix_kv_heads_(mha_book.knock_heads_(layer_of(device, **options(device)[0])))
    for matrix in (matrices := mha_book.mixing_matrices(layer)).values():
        nn.init.normal_(matrix)
    x, context = tokens(device), tokens(device, s.m, 11) if layer.context_proj is not None else None
    y, folded, h = layer(x, context), mha_book.fold_mixing(layer), layer.layout.num_heads
    out = mha_book.mix_output_heads(folded, torch.randn(h, h, device=device, dtype=torch.float64))
    return layer, folded, out, y, out(x, context), torch.autograd.grad(y.sum(), [*matrices.values()])


def of_saved_heads(device):
    "A layer of fewer heads into one of more."
    layer, less = layer_of(device), mha_book.prune_heads(layer_of(device), [0, 2, 4])
    new = mha_book.match_heads(layer, less.state_dict())
    new.load_state_dict(less.state_dict())
    return layer, new, new(tokens(device))


rope_beneath = mha_book.RoPE(s.d)  # whose frequencies are Python's numbers


def turned_places(device):
    position = mha_book.RotatedPosition(rope_beneath, mha_book.hadamard(s.d, device=device))
    layer = layer_of(device, position=position)
    return layer, layer(tokens(device), is_causal=True)


in_three_runs = HeadPrecision(("int3", "float16", "int3"), ("int4", "float16", "int4"), group=2)
enter(
    "MixedPrecision",
    partial(mixed, attend=mha_book.MixedPrecision(in_three_runs)),
    {name: options for name, options in (SHARED | DROPOUT).items() if "scale" not in name},
)
enter(
    "use_precision, precisions_from_json, precisions_to_json, permute_heads, sort_heads, rotate_heads, hadamard",
    by_heads,
    some_layers,
)
enter("prune_heads, prune_model", of_fewer_heads, some_layers)
enter(
    "MixedHeads, knock_heads_, mix_kv_heads_, mixing_matrices, fold_mixing, mix_output_heads",
    with_mixed_rows,
    some_layers,
)
enter("HeadGates, add_gates, open_price, prune_gated", behind_gates, some_layers)
CASES |= {
    "match_heads": of_saved_heads,
    "RotatedPosition": turned_places,
    "OutputGate": gated,
    "ComposedHeads": composed,
    "MixtureOfHeads, Routes, balance_loss, recorded_routes": routed,
    "largest_logits": lambda device: mha_book.largest_logits(layer_of(device), tokens(device), window=3),
    "z_loss": lambda device: mha_book.z_loss(torch.randn(s.b, s.h, s.n, device=device)),
    "HeadBudget, budget_loss": lambda device: (
        controller := mha_book.HeadBudget(s.e, 3, device=device, dtype=torch.float64),
        mha_book.budget_loss(controller(tokens(device)[:, 0]), *torch.rand(2, s.b, 3, device=device), 0.1),
    ),
}


def in_pairs(device, options):
    made, called = options(device)
    made = dict(num_kv_heads=2, head_dim=s.d) | made
    plug = mha_book.DifferentialAttention(s.h, s.d, 1, device=device, dtype=torch.float64)
    in_halves = layer_of(device, attend=plug, **made)
    made |= dict(num_kv_heads=s.g)
    in_groups = mha_book.DifferentialHeads(s.e, s.h, **made, device=device, dtype=torch.float64)
    twice = mha_book.pair_heads(layer_of(device, **made))
    called.pop("bias", None)
    layers = in_halves, in_groups, twice, layer_of(device, attend=mha_book.SigmoidAttention(), **made)
    ys = [layer(tokens(device), **called) for layer in layers]
    sum(y.sum() for y in ys).backward()
    return layers, ys, [p.grad for layer in layers for p in layer.parameters()]


enter(
    "DifferentialAttention, DifferentialHeads, SubtractHeads, pair_heads, SigmoidAttention",
    in_pairs,
    {name: LAYERS[name] for name in ("plain", "causal", "mask, bias, padding", "value_dim", "position", "dropout")},
)


def in_fewer_bits(device, form):
    "Keys of whole blocks with padding, values, and their gradients."
    k, v = (torch.randn(s.b, s.g, s.m, width, device=device, requires_grad=True) for width in (s.d, s.dv))
    near = mha_book.round_keys(k, form, 3, bits(s.b, s.m, device=device)), mha_book.round_values(v, form)
    return *near, *torch.autograd.grad(sum(x.sum() for x in near), (k, v))


def stored(device):
    "Codes, packed and unpacked, and what comes back."
    codes = mha_book.quantize(heads(device)[1], 5, -2)
    packed = quantize.pack(codes.codes, 5)
    unpacked = codes._replace(codes=quantize.unpack(packed, 5))
    return *codes, packed, mha_book.dequantize(unpacked, torch.float32)


CASES |= {f"round_keys, round_values: {form}": partial(in_fewer_bits, form=form) for form in quantize.KV_FORMATS}
CASES["quantize, dequantize"] = stored


def decoded(device, options, cached, real=None):
    "A prompt and single tokens, with gradients and without; all that the cache holds."
    layer = layer_of(device, position=turn_by_row)
    cache = cached(device, **options)
    rows = [
        layer(
            tokens(device, 3),
            is_causal=True,
            cache=cache,
            key_mask=None if real is None else torch.tensor(real, device=device),
        )
    ]
    with torch.no_grad():
        rows += [layer(tokens(device, n), is_causal=True, cache=cache) for n in (1, 2, 1, 1)]
    return rows, cache.k, cache.v, cache.seen, layer.attention_map(tokens(device, 2), cache=cache)


def turn_by_row(q, k, *, offset):
    "The plug above, for places that differ by row."
    assert offset.device == q.device and offset.shape == (s.b,)
    return turn(q, k, offset=offset[:, None, None, None])


def slab(device, **options):
    return mha_book.KVCache(s.b, s.g, 12, s.d, device=device, dtype=torch.float64, **options)


def blocks(device):
    pool = mha_book.BlockPool(12, 4, s.g, s.d, device=device, dtype=torch.float64)
    return mha_book.PagedCache(pool, s.b)


def reordered(device, cached):
    cache = cached(device)
    for rows in ([1, 1, 0], [0, 2]):
        k, v = torch.randn(2, len(cache.seen), s.g, 3, s.d, device=device, dtype=torch.float64)
        cache.append(k, v)
        cache.commit()
        cache.reorder(torch.tensor(rows, device=device))
    cache.append(k[:2], v[:2])
    return cache.k, cache.v, cache.seen


def come_and_go(cache, other, device):
    "Rows of a slab, or of blocks, are forked, joined and dropped."
    k, v = torch.randn(2, s.b, s.g, 3, s.d, device=device, dtype=torch.float64)
    for kept in cache, other:
        kept.append(k, v)
        kept.commit()
    cache.join(cache.fork(torch.tensor([1, 0], device=device), torch.tensor([1, 2], device=device)))
    cache.drop(torch.tensor([0, 2], device=device))
    cache.join(other)
    return cache


def rows_come_and_go(device):
    cache = come_and_go(slab(device), slab(device), device)
    return cache.k[:, :, cache.start : cache.end], cache.seen


def rounded_rows(device):
    "Of a cache of integers, what it reads after rows have come and gone, and its bytes."
    formats = HeadPrecision(("int4", "int8", "float16"), ("int3", "float8_e5m2", "int4"), group=2, exact_first=1)
    made = [QuantizedKVCache(s.b, formats, 12, s.d, device=device, dtype=torch.float64) for _ in range(2)]
    cache = come_and_go(*made, device)
    nothing = torch.zeros(2, len(cache.seen), s.g, 0, s.d, device=device, dtype=torch.float64)
    assert cache.fork(torch.tensor([0], device=device)).nbytes == promised_bytes(
        formats, int(cache.seen[0]), s.d, dtype=torch.float64
    )
    return cache.append(*nothing), cache.seen


def blocks_come_and_go(device):
    cache = blocks(device)
    come_and_go(cache, mha_book.PagedCache(cache.pool, s.b), device)
    return cache.append(*torch.randn(2, len(cache.seen), s.g, 2, s.d, device=device, dtype=torch.float64)), cache.seen


def asked(device):
    "A context in the first call, and none later."
    layer, kept = layer_of(device, context_dim=11), mha_book.ContextCache()
    real = torch.tensor([[True] * s.m, [False] + [True] * (s.m - 1)], device=device)
    rows = [layer(tokens(device, 2), tokens(device, s.m, 11), key_mask=real, cache=kept)]
    return rows, layer(tokens(device, 3), cache=kept), kept.k, kept.seen


CASES["ContextCache"] = asked
enter(
    "KVCache",
    partial(decoded, cached=slab),
    {"": {}, "window": dict(window=3), "window, first": dict(window=2, keep_first=2)},
)


def way(device, options):
    layer = NINE_WAYS[options](MultiHeadAttention(48, s.h, device=device))
    return layer, layer(torch.randn(s.b, s.n, 48, device=device))


enter("NINE_WAYS", way, {name: name for name in NINE_WAYS if name != "FlexAttention"})
TINY = EncoderConfig(
    vocab_size=11, embed_dim=24, num_heads=s.h, num_layers=2, hidden_dim=10, max_len=s.n, num_segments=3, eps=1e-12
)


class Tokenizer:
    "Every sentence is three tokens and one of padding."

    def encode_batch(self, sentences):
        row = type("Row", (), dict(ids=[1, 2, 3, 0], attention_mask=[1, 1, 1, 0]))
        return [row for _ in sentences]


def encoded(device):
    with torch.device(device):
        model = Encoder(TINY)
    state = {name: torch.zeros(shape, device=device) for name, (_, shape) in expected_tensors(TINY).items()}
    ids, real = encode(Tokenizer(), ["a b c", "c b a"], device)
    states = model(ids, real)
    return model, ids, real, states, mean_pool(states[-1], real), convert_bert(state, TINY.num_layers)


CASES["pretrained"] = encoded


def reported(device, seen):
    layer, mask = layer_of(device), torch.ones(s.h, s.n, s.n, dtype=torch.bool, device=device)
    mask[0] = seen
    report = mha_book.gradient_report(layer, lambda: layer(tokens(device), mask=mask).square().sum())
    assert len(report.silent) == (0 if seen else 2)
    return layer


def clipped(device):
    layer, x = layer_of(device), tokens(device)
    return layer, mha_book.qk_clip_(layer, mha_book.largest_logits(layer, x), 1e-3)


def judged(device):
    report = mha_book.error_report(mha_book.fused_attend, *heads(device))
    assert report.passes
    layer = layer_of(device)
    assert mha_book.error_report(layer, tokens(device), definition=layer, dtypes=torch.float32).passes
    return layer


def sensitive(device):
    "What is measured on a device is kept on the CPU; the layer stays where it is."
    layer, x = layer_of(device), tokens(device)
    found = mha_book.head_sensitivity(layer, [(x,)], ["int4", "bfloat16"], group=4)
    assert found.effects[""].device.type == "cpu"
    precisions = mha_book.allocate_precision(found, 14.0)
    assert mha_book.allocation_bound(found, 14.0) <= found.predict(precisions) * (1 + 1e-9)
    assert mha_book.joint_effect(layer, [(x,)], precisions) > 0
    return layer, layer(x)


def ranked(device):
    "What heads are worth is kept on the CPU; means stay where the layer is."
    layer, x = layer_of(device), tokens(device)
    means = mha_book.head_means(layer, [(x,)])
    worth = mha_book.head_importance(layer, [(x,)], means=means) | mha_book.ablation_effects(layer, [(x,)])
    assert worth[""].device.type == "cpu"
    with mha_book.without_heads(layer, mha_book.least_heads(worth, 1), means):
        y = layer(x)
    with mha_book.scaled_heads(layer, {"": torch.ones(layer.layout.num_heads, device=device)}, means):
        plug = layer.finish
        return layer, y, layer(x), means, plug.scale


def budgeted(device):
    "Two levels for two inputs, chosen and told."
    layer, x = layer_of(device), tokens(device)
    controller = mha_book.HeadBudget(3, 2, device=device, dtype=torch.float64).fit(x[:, 0, :3])
    ways = mha_book.AdaptiveHeads(nn.Sequential(layer), [{}, {"0": [0, 1]}], controller, lambda model, x: x[:, 0, :3])
    return ways, ways(x), ways(x, levels=torch.arange(2, device=device))


READ_VALUES = {  # whose result depends on numbers, which the meta device has not
    "qk_clip_": clipped,
    "skip_heads": skipped,
    "collaborate": made_to_collaborate,
    "error_report": judged,
    "KVCache: padding": partial(decoded, options={}, cached=slab, real=[[False, True, True], [True, True, False]]),
    "KVCache: padding, window, first": partial(
        decoded, options=dict(window=2, keep_first=2), cached=slab, real=[[False, False, True], [True, True, False]]
    ),
    "KVCache: reorder": partial(reordered, cached=slab),
    "KVCache: drop, fork, join": rows_come_and_go,
    "QuantizedKVCache, promised_bytes": rounded_rows,
    "PagedCache, BlockPool": partial(decoded, options={}, cached=blocks),
    "PagedCache, BlockPool: padding": partial(
        decoded, options={}, cached=blocks, real=[[False, True, True], [True, True, False]]
    ),
    "PagedCache, BlockPool: reorder": partial(reordered, cached=blocks),
    "PagedCache, BlockPool: drop, fork, join": blocks_come_and_go,
    "convert_mask": lambda device: [
        convert_mask(bits(s.b, 1, s.n, s.n, device=device), "mha_book", target, (s.b, s.h, s.n, s.n))
        for target in ("sdpa_added", "torch", "keras", "onnx")
    ],
    "gradient_report": partial(reported, seen=True),
    "gradient_report: of a head that sees nothing": partial(reported, seen=False),
    "guess_dialect": lambda device: (
        layer := layer_of(device),
        x := tokens(device),
        mha_book.guess_dialect(layer.state_dict(), layer.layout, x, layer(x)),
    )[:2],
    "NINE_WAYS: FlexAttention": partial(way, options="FlexAttention"),
    "ScaledHeads, scaled_heads, without_heads, head_means, ablation_effects, head_importance, least_heads": ranked,
    "Sensitivity, head_sensitivity, allocate_precision, allocation_bound, joint_effect": sensitive,
    "AdaptiveHeads, Budgeted": budgeted,
}
WITHOUT_TENSORS = {
    "Attend",
    "Cache",
    "DIALECTS",
    "Dialect",
    "Finish",
    "HeadLayout",
    "HeadPrecision",
    "benchmark",
    "Position",
    "cache_bytes",
    "commit_once",  # around every case with a cache
    "implementations",
    "nearest_head_counts",
    "peak_bytes",
    "pick_device",
}
ALSO_ON_THE_CPU = {
    "AttentionHead",
    "HeadList",  # take no device: made on the default device, then moved
    "match_heads",  # reads and writes what is saved, as the next does
    "MultiHeadAttention, saved and loaded",  # whose head counts are three integers on the CPU, wherever the layer is
}


def everything_in(result):
    "All tensors of a result, the parameters and buffers of its modules included; not the head counts in a state dict."
    modules = [part for part in result if isinstance(part, nn.Module)] if isinstance(result, tuple) else []
    modules += [result] if isinstance(result, nn.Module) else []
    found = tensors_in(result) + [t for m in modules for t in (*m.parameters(), *m.buffers())]
    assert found
    return found


@pytest.fixture(params=["cpu", "there"])
def default(request):
    "The default device: where the case runs, or the CPU."
    yield lambda device: torch.set_default_device(device if request.param == "there" else "cpu")
    torch.set_default_device(None)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_the_package_on_the_meta_device_touches_no_other(default, name):
    default("meta")
    if name in ALSO_ON_THE_CPU:
        result = CASES[name]("meta")
    else:
        with OnlyOn("meta"):
            result = CASES[name]("meta")
    assert {t.device.type for t in everything_in(result)} == {"meta"}


@no_gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES | READ_VALUES)
def test_the_package_on_the_simulated_gpu_mixes_no_devices(gpu, default, name):
    default("cuda")
    result = (CASES | READ_VALUES)[name]("cuda")
    assert {t.device for t in everything_in(result)} == {torch.device("cuda:0")}


@no_gpu
@pytest.mark.filterwarnings("ignore")
def test_flex_on_the_simulated_gpu(gpu):
    q, k, v = (torch.randn(2, h, 20, 16, device="cuda", requires_grad=True) for h in (4, 2, 2))
    options = dict(
        window=3,
        softcap=2.0,
        sinks=torch.randn(4, device="cuda"),
        mask=bits(20, 20, device="cuda"),
        bias=torch.randn(4, 20, 20, device="cuda"),
    )
    flex, plain = (backends.attention(q, k, v, **options, impl=impl) for impl in ("flex", "math"))
    torch.testing.assert_close(flex, plain)
    found, expected = (torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (flex, plain))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert flex.is_cuda and all(g.is_cuda for g in found)


def test_every_public_name_has_a_case():
    named = {word for name in CASES | READ_VALUES for word in re.findall(r"\w+", name)}
    assert set(mha_book.__all__) - WITHOUT_TENSORS <= named


def test_a_tensor_elsewhere_is_noticed():
    with pytest.raises(AssertionError, match="met cpu"), OnlyOn("meta"):
        torch.ones(3)
    with pytest.raises((AssertionError, RuntimeError)), OnlyOn("meta"):
        layer_of("meta", position=table_plug)(tokens("meta"))
    with pytest.raises((AssertionError, RuntimeError)), OnlyOn("meta"):
        layer_of("meta", attend=causal_here)(tokens("meta"))


# --- the pages ------------------------------------------------------------------------------------------------------

PAGES = sorted(path.name for path in (ROOT / "nbs").glob("*.ipynb"))


# What would choose a device, or ask for the GPU, in another place than `use_device()`.
ELSEWHERE = re.compile(
    r"""set_default_device\(|pick_device\(\)|cuda\.is_available\(|"""
    r"""\.cuda\(\)|\.to\(["']cuda|device=["']cuda"""
)


def choices(cells):
    "What chooses a device in the cells of a page that are not exported; every choice after the first is one, too."
    page = "\n".join(cell for cell in cells if not cell.startswith("#| export"))
    return ELSEWHERE.findall(page) + re.findall(r"\w+ = use_device\(\)", page)[1:]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_chooses_its_device_in_one_place(name):
    cells = [cell.source for cell in nbformat.read(ROOT / "nbs" / name, 4).cells if cell.cell_type == "code"]
    assert choices(cells) == []


@pytest.mark.parametrize(
    "cell",
    [
        "torch.set_default_device('cpu')",
        "there = use_device()",
        "x = x.to('cuda')",
        "x.cuda()",
        'torch.ones(3, device="cuda:0")',
        "d = 'cuda' if torch.cuda.is_available() else 'cpu'",
    ],
)
def test_a_second_choice_is_noticed(cell):
    assert not choices(["device = use_device()", f"#| export\n{cell}"])
    assert choices(["device = use_device()", cell])


def run_page(name):
    "Everything that a page says when it runs on the simulated GPU, and its exit status."
    command = [sys.executable, str(Path(__file__).with_name("on_simulated_gpu.py")), name]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def runs():
    "Two at a time."
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(run_page, name) for name in PAGES}


@no_gpu
@pytest.mark.skipif(not os.environ.get("MHA_DEVICES_REQUIRED"), reason="takes minutes; run `make test-devices`")
@pytest.mark.parametrize("name", PAGES)
def test_a_page_runs_on_the_simulated_gpu(runs, name):
    status, said = runs[name].result()
    print(said)
    assert status == 0, said


@no_gpu
@pytest.mark.parametrize(
    "cell, said",
    [
        ("torch.ones(3, device='cuda') + torch.ones(3)", "same device"),
        ("assert not torch.cuda.is_available()", "AssertionError"),
    ],
)
def test_a_page_that_mixes_devices_is_noticed(cell, said):
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(f"import torch\n{cell}")])
    assert said in on_simulated_gpu.run(page, ROOT / "nbs")
