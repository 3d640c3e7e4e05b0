"""FlexAttention, compiled, beside torch's function: a window, and a window with a softcap.

The kernel is torch's own, written by torch's compiler for the machine at hand; no code of the book stands between.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from ..kernels.backends import attention, window_mask
from .suites import Contest, Setting, compile_now
from .suites_language import SUITES  # with the model's

SOFTCAP = 30.0
KERNEL = "FlexAttention, compiled"


@torch.no_grad()
def flex(at: Setting) -> Iterator[Contest]:
    "FlexAttention, compiled, beside torch's function and the definition: a window, a softcap."
    torch.compiler.reset()
    q, k, v = inputs = at.heads_apart(False)
    window = max(1, at.tokens // 16)
    near = window_mask(at.tokens, at.tokens, window, at.device)
    flops = round(at.work(False, "attention") * near.sum().item() / (at.tokens * (at.tokens + 1) / 2))
    sdpa, rule = partial(F.scaled_dot_product_attention, q, k, v), dict(window=window, is_causal=True)
    full = "SDPA, causal flag, no window", f"{KERNEL}, no window"
    calls = {"SDPA, the window as a mask": partial(sdpa, attn_mask=near), full[0]: partial(sdpa, is_causal=True)}
    contest = Contest(f"forward, window {window}", calls, inputs, flops, others=full)
    _add_kernel(contest, KERNEL, at, window)
    _add_kernel(contest, full[1], at, at.tokens)
    yield _with_errors(contest, rule)
    calls = {"definition": partial(attention, q, k, v, softcap=SOFTCAP, impl="math", **rule)}
    contest = Contest(f"forward, window {window}, softcap {SOFTCAP:g}", calls, inputs, flops)
    _add_kernel(contest, KERNEL, at, window, _capped)
    yield _with_errors(contest, rule | dict(softcap=SOFTCAP))


def _capped(logit: Tensor, *place: Tensor) -> Tensor:
    return SOFTCAP * torch.tanh(logit / SOFTCAP)


def _add_kernel(contest: Contest, name: str, at: Setting, window: int, bend: Callable | None = None) -> None:
    "Add a kernel for so many keys, the query's own included; its list of blocks is made once, as a model would."
    blocks = create_block_mask(
        lambda b, h, i, j: (j <= i) & (j > i - window), None, None, at.tokens, at.tokens, device=at.device
    )
    options = dict(score_mod=bend, block_mask=blocks)
    kernel = partial(flex_attention, **options)
    fast, contest.compile_seconds[name] = compile_now(kernel, contest.inputs, {}, dynamic=False)
    contest.calls[name] = partial(fast, *contest.inputs)


def _with_errors(contest: Contest, rule: dict) -> Contest:
    "Note for every call how far it is from the definition in float64, which is computed head by head."
    heads = zip(*(t.double().split(1, dim=1) for t in contest.inputs))
    exact = torch.cat([attention(*head, impl="math", **rule) for head in heads], dim=1)
    for name, call in contest.calls.items():
        if name not in contest.others:
            contest.notes[name] = f"largest error {(call() - exact).abs().max().item():.1e}"
    return contest


SUITES["flex"] = flex
