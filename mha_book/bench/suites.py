"""What `mha-book bench` compares: contests of layers, of ways to write one, of implementations, of decoding steps.

Only what computes the same is raced: every call of a contest has the same weights and the same inputs, and
tests/bench/test_suites.py compares their outputs and gradients. What a contest names in `others` computes something
else, and says so by its name.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ..heads.layer import MultiHeadAttention
from ..heads.single_head import causal_mask
from ..heads.weight_split import HeadLayout
from ..instruments.device import synchronize
from ..instruments.roofline import layer_work
from ..kernels.backends import BACKENDS, attention
from ..kernels.torch_private import has_cpp_compiler, has_triton, without_compile_caches
from ..lab.nine_ways import NINE_WAYS, FusedFlag, TorchLayer
from ..plugs.cache import KVCache

# Contests


@dataclass
class Contest:
    "Calls to be timed in turns, and names that cannot take part, with the reason."

    mode: str  # what is timed, such as "forward"
    calls: dict[str, Callable[[], object]]  # by name; the first is the base
    inputs: tuple[Tensor, ...]  # what every one of them reads
    flops: int  # that a call needs, backward included
    absent: dict[str, str] = field(default_factory=dict)
    compile_seconds: dict[str, float] = field(default_factory=dict)
    train: bool = False  # whether autograd records the calls
    others: tuple[str, ...] = ()  # calls that compute something else, for scale
    notes: dict[str, str] = field(default_factory=dict)  # what else is to be said of a call


@dataclass(frozen=True)
class Setting:
    "Where and at which size a contest is held."

    batch: int
    tokens: int
    width: int
    heads: int
    device: torch.device
    dtype: torch.dtype

    @property
    def size(self) -> list[int]:
        "batch, tokens, width, heads"
        return [self.batch, self.tokens, self.width, self.heads]

    def work(self, train: bool, *steps: str, is_causal: bool = True) -> int:
        """FLOPs of these steps, all of them unless told, where causal attention skips what
        is hidden; a backward pass needs twice as many as its forward pass.
        """
        layout = HeadLayout(self.heads, self.heads, self.width // self.heads)
        work = layer_work(
            layout, self.width, batch=self.batch, n=self.tokens, itemsize=self.dtype.itemsize, is_causal=is_causal
        )
        return (3 if train else 1) * sum(work[step].flops for step in steps or work)

    def layer_and_tokens(self, train: bool) -> tuple[MultiHeadAttention, Tensor]:
        "A layer with random weights, and its input."
        options = dict(device=self.device, dtype=self.dtype)
        layer = MultiHeadAttention(self.width, self.heads, **options)
        shape = self.batch, self.tokens, self.width
        return layer, torch.randn(shape, **options, requires_grad=train)

    def heads_apart(self, train: bool) -> tuple[Tensor, ...]:
        "Random queries, keys and values, one matrix per head: b h n d each."
        shape = self.batch, self.heads, self.tokens, self.width // self.heads
        options = dict(device=self.device, dtype=self.dtype, requires_grad=train)
        return tuple(torch.randn(shape, **options) for _ in range(3))


MODES = {False: "forward", True: "forward and backward"}


def _calls(forwards: dict[str, Callable[[], Tensor]], train: bool) -> dict[str, Callable]:
    "The forward passes, or each with its backward pass, from one and the same gradient."
    if not train:
        return forwards
    first = next(iter(forwards.values()))()
    gradient = torch.randn_like(first)
    return {name: lambda forward=forward: forward().backward(gradient) for name, forward in forwards.items()}


# Layers


SMALL = 2**14  # numbers of input up to which calling a layer costs more than computing it


def layers(at: Setting) -> Iterator[Contest]:
    "The layer beside a plain fused one, torch's own and that of Transformers' GPT-2."
    yield from (_layers(at, train) for train in MODES)
    if at.batch * at.tokens * at.width <= SMALL:
        yield from (_no_mask(at, train) for train in MODES)


def _layers(at: Setting, train: bool) -> Contest:
    "Causal layers."
    layer, x = at.layer_and_tokens(train)
    forwards, absent = _forwards(layer, x, at), {}
    if train:
        del forwards["nn.MultiheadAttention, fast path"]
        absent["nn.MultiheadAttention, fast path"] = "inference only"
    if gpt := _gpt2(layer, at):
        forwards["GPT-2 of Transformers"] = lambda: gpt(x)[0]
    else:
        absent["GPT-2 of Transformers"] = "not installed"
    return Contest(MODES[train], _calls(forwards, train), (x,), at.work(train), absent, train=train)


def _no_mask(at: Setting, train: bool) -> Contest:
    "Forward passes without causality, where what a layer does around its kernel counts."
    layer, x = at.layer_and_tokens(train)
    torchs = TorchLayer(layer).theirs
    calls = {
        "nn.MultiheadAttention, no weights": lambda: torchs(x, x, x, need_weights=False)[0],
        "MultiHeadAttention": lambda: layer(x),
    }
    mode = "forward, no mask" + ", gradients on" * train
    return Contest(mode, calls, (x,), at.work(False, is_causal=False), train=train)


def _forwards(layer: MultiHeadAttention, x: Tensor, at: Setting) -> dict[str, Callable]:
    "The layer, and what torch has, with its weights; torch's layer is told what helps it."
    plain, torchs = FusedFlag(layer), TorchLayer(layer).theirs
    fast = TorchLayer(layer).theirs.eval()
    rule = dict(attn_mask=~causal_mask(at.tokens, at.tokens, at.device), is_causal=True)
    bare = rule | dict(need_weights=False)
    return {
        "plain fused layer": lambda: plain(x),
        "MultiHeadAttention": lambda: layer(x, is_causal=True),
        "nn.MultiheadAttention, no weights": lambda: torchs(x, x, x, **bare)[0],
        "nn.MultiheadAttention": lambda: torchs(x, x, x, **rule)[0],
        "nn.MultiheadAttention, fast path": lambda: fast(x, x, x, **bare)[0],
    }


@torch.no_grad()
def _gpt2(layer: MultiHeadAttention, at: Setting) -> nn.Module | None:
    "GPT-2's attention of Transformers, with the same weights; None where it is absent."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of packages that it would like to have
            from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, GPT2Config
    except (ImportError, RuntimeError):  # absent, or broken
        return None
    config = GPT2Config(
        n_embd=at.width,
        n_head=at.heads,
        n_positions=at.tokens,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        attn_implementation="sdpa",
    )
    theirs = GPT2Attention(config, layer_idx=0).to(at.device, at.dtype)
    for own, ours in ((theirs.c_attn, layer.in_proj), (theirs.c_proj, layer.out_proj)):
        own.weight.copy_(ours.weight.T)  # its weights lie columns first
        own.bias.copy_(ours.bias)
    return theirs


# Nine ways to write one layer


def ways(at: Setting) -> Iterator[Contest]:
    "The nine ways of the page Nine ways to write one layer."
    yield from (_ways(at, train) for train in MODES)


def _ways(at: Setting, train: bool) -> Contest:
    base = "SDPA, causal flag"
    layer, x = at.layer_and_tokens(train)
    absent = {}
    if train and at.device.type == "cpu":
        absent = {"FlexAttention": "no backward on a CPU"}
    forwards = {
        name: partial(way(layer), x) for name, way in {base: NINE_WAYS[base], **NINE_WAYS}.items() if name not in absent
    }
    return Contest(MODES[train], _calls(forwards, train), (x,), at.work(train), absent, train=train)


# What torch.compile makes of them


def no_compiler(device: torch.device) -> str:
    "Why nothing can be compiled here; empty where it can."
    try:
        if device.type == "cuda" and not has_triton():
            return "torch.compile needs Triton, and there is none"
        if device.type == "cpu" and not has_cpp_compiler():
            return "torch.compile needs a C++ compiler, and none was found (install g++)"
        compile_now(nn.GELU(), (torch.zeros(4, device=device),), {})
    except Exception as error:  # a compiler can fail in many ways
        return f"torch.compile fails here: {' '.join(str(error).split())[:200]}"
    return ""


def _compiled(
    mode: str,
    at: Setting,
    calls: dict[str, Callable],
    modules: dict[str, nn.Module],
    x: Tensor,
    frozen: tuple[str, ...] = (),
) -> Contest:
    "Add `modules` to `calls`, compiled afresh; those in `frozen` with frozen weights."
    torch.compiler.reset()
    contest = Contest(mode, dict(calls), (x,), at.work(False))
    with torch.no_grad():
        for name, module in modules.items():
            module(x)  # nor is what a module prepares once the compiler's work
            options = {"freezing": True} if name in frozen else {}
            fast, contest.compile_seconds[name] = compile_now(module, (x,), options)
            contest.calls[name] = partial(fast, x)
    return contest


def compile_now(
    function: Callable,
    inputs: tuple[Tensor, ...],  # that it is compiled for
    options: dict,  # of torch.compile
    dynamic: bool | None = None,  # whether sizes and numbers may change; None = torch decides
) -> tuple[Callable, float]:
    "`function`, compiled without any cache on disk, and how many seconds that took."
    with without_compile_caches(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "dynamo_pgo force disabled")
        warnings.simplefilter("ignore", DeprecationWarning)  # of what torch's compiler itself still uses
        fast, start = torch.compile(function, options=options, dynamic=dynamic), time.perf_counter()
        fast(*inputs)
        synchronize(inputs[0].device)
    return fast, time.perf_counter() - start


class _Causal(nn.Module):
    "A layer that is always causal, as one argument."

    def __init__(self, layer: MultiHeadAttention):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, is_causal=True)


def compile_suite(at: Setting) -> Iterator[Contest]:
    "The layer as it is, compiled, and compiled with frozen weights; the nine, compiled."
    layer, x = at.layer_and_tokens(False)
    causal = _Causal(layer.eval())
    modules = {"compiled": causal, "compiled and frozen": _Causal(layer).eval()}
    yield _compiled(
        "the layer, forward", at, {"not compiled": partial(causal, x)}, modules, x, ("compiled and frozen",)
    )
    layer, x = at.layer_and_tokens(False)
    plain = {"SDPA, causal flag, not compiled": partial(FusedFlag(layer), x)}
    modules = {name: way(layer) for name, way in NINE_WAYS.items()}
    yield _compiled("the nine ways, forward", at, plain, modules, x)


# Implementations of attention


def backends(at: Setting) -> Iterator[Contest]:
    "Every implementation of `attention`, one option after the other."
    for case, (extra, share) in _cases(at).items():
        for train in MODES:
            yield _backends(at, train, case, extra, share)


def _cases(at: Setting) -> dict[str, tuple[dict, float]]:
    "Options of `attention`, and the share of all causal pairs that they leave."
    n, window, options = at.tokens, max(1, at.tokens // 4), dict(device=at.device)
    near = window * n - window * (window - 1) // 2
    return {
        "causal": ({}, 1),
        "causal, mask": (dict(mask=torch.rand(at.batch, 1, n, n, **options) < 0.9), 1),
        f"causal, window {window}": (dict(window=window), near / (n * (n + 1) // 2)),
        "causal, softcap 30": (dict(softcap=30.0), 1),
        "causal, sinks": (dict(sinks=torch.zeros(at.heads, **options, dtype=at.dtype)), 1),
    }


def _backends(at: Setting, train: bool, case: str, extra: dict, share: float) -> Contest:
    "Those implementations that take `extra`, beside the definition."
    names = ["math", *(name for name in (*BACKENDS, "auto") if name != "math")]
    q, k, v = at.heads_apart(train)
    calls = {impl: partial(attention, q, k, v, is_causal=True, impl=impl, **extra) for impl in names}
    with torch.set_grad_enabled(train):
        absent = {impl: why for impl, call in calls.items() if (why := _lacks(call))}
    able = {impl: call for impl, call in calls.items() if impl not in absent}
    flops = round(share * at.work(train, "attention"))
    return Contest(f"{MODES[train]}, {case}", _calls(able, train), (q, k, v), flops, absent, train=train)


def _lacks(call: Callable[[], Tensor]) -> str:
    "Why an implementation refuses this call, in a few words; empty where it does not."
    try:
        call()
    except NotImplementedError as error:
        return str(error).split(":")[0].split(";")[0]
    return ""


# One token after others


def decode(at: Setting) -> Iterator[Contest]:
    "One token after so many others: with caches, and all computed again."
    with torch.no_grad():
        layer, text = at.layer_and_tokens(False)
        _, k, v = layer.qkv(text)
        token = torch.randn_like(text[:, :1])
        calls = {
            "MultiHeadAttention, KVCache": _with_own_cache(layer, token, k, v),
            "MultiHeadAttention, concatenated": partial(layer, token, cache=_Grown(k, v)),
        }
    absent, gpt = {}, _gpt2(layer, at)
    if gpt:
        calls["GPT-2 of Transformers, dynamic cache"] = _with_dynamic_cache(gpt, token, k, v)
    else:
        absent["GPT-2 of Transformers, dynamic cache"] = "not installed"
    whole = torch.cat([text, token], dim=1)
    calls["computed again"] = lambda: layer(whole, is_causal=True)[:, -1:]
    layout = layer.layout
    work = layer_work(layout, at.width, batch=at.batch, n=1, m=at.tokens + 1, itemsize=1)
    flops = sum(step.flops for step in work.values())
    yield Contest("one token", calls, (token,), flops, absent)


def _with_own_cache(layer: MultiHeadAttention, token: Tensor, k: Tensor, v: Tensor) -> Callable:
    "A step of the layer with a cache that begins with k and v; the token is taken back, so that it can come again."
    b, g, m, d = k.shape
    cache = KVCache(b, g, m + 1, d, device=k.device, dtype=k.dtype)
    cache.append(k, v)
    cache.commit()

    def step() -> Tensor:
        y = layer(token, cache=cache)
        cache.crop(m)
        return y

    return step


class _Grown:
    "A cache that is one tensor, made anew for each token; it too is where it was."

    def __init__(self, k: Tensor, v: Tensor):
        self.kept, self.seen = (k.contiguous(), v.contiguous()), k.shape[2]

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, None]:
        return *(torch.cat(pair, dim=2) for pair in zip(self.kept, (k, v))), None

    def commit(self) -> None:
        pass

    def crop(self, length: int) -> None:
        pass


def _with_dynamic_cache(gpt: nn.Module, token: Tensor, k: Tensor, v: Tensor) -> Callable:
    "A step of GPT-2's attention with Transformers' own cache, which begins with k and v."
    from transformers import DynamicCache

    cache = DynamicCache()
    cache.update(k.contiguous(), v.contiguous(), 0)
    first, kept = cache.layers[0], (cache.layers[0].keys, cache.layers[0].values)

    def step() -> Tensor:
        first.keys, first.values = kept  # as it was before
        return gpt(token, past_key_values=cache)[0]

    return step


SUITES = {"layers": layers, "ways": ways, "backends": backends, "compile": compile_suite, "decode": decode}
