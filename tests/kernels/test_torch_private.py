"""What the book uses of torch that torch does not promise: each name is there, and says what it is asked."""

import ast
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mha_book.kernels import torch_private

PACKAGE = Path(torch_private.__file__).parents[1]


def test_torch_fused_sdp_choice_names_the_kernel():
    "If torch._fused_sdp_choice moves: attention(impl='auto') and explain_dispatch."
    q = torch.randn(1, 2, 40, 16)
    learned = torch.zeros(1, 1, 40, 40, requires_grad=True)
    assert torch_private.fused_sdp_choice(q, q, q) == SDPBackend.FLASH_ATTENTION
    assert torch_private.fused_sdp_choice(q, q, q, learned) == SDPBackend.MATH
    assert torch_private.fused_sdp_choice(q, q, q, None, 0.1) == SDPBackend.MATH
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), pytest.raises(RuntimeError):
        torch_private.fused_sdp_choice(q, q, q, None, 0.1)


def test_torch_guards_detect_fake_mode_knows_tensors_without_numbers():
    "If torch._guards.detect_fake_mode moves: impl='flex' keeps block masks that belong to a compiler's trial."
    t = torch.ones(3)
    assert not torch_private.is_fake(t)
    with torch._subclasses.FakeTensorMode() as mode:
        assert torch_private.is_fake(mode.from_tensor(t))


def test_torch_autograd_profiler_enabled_sees_a_profiler():
    "If torch.autograd._profiler_enabled moves: peak_bytes inside a profiler."
    assert not torch_private.profiler_is_running()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert torch_private.profiler_is_running()


def test_the_profilers_event_tree_tells_allocations():
    "If torch._C._profiler._EventType or kineto_results.experimental_event_tree moves: peak_bytes on a CPU."
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = torch.ones(1000).neg()

    def flat(events):
        for event in events:
            yield event
            yield from flat(event.children)

    events = list(flat(torch_private.event_tree(profile)))
    sizes = [e.extra_fields.alloc_size for e in events if torch_private.is_allocation(e)]
    assert kept.nbytes in sizes and len(sizes) < len(events)


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def test_torch_backward_c_function_is_the_node_of_somebodys_function():
    "If torch.autograd.function.BackwardCFunction moves: gradient_report behind a custom function."
    x = torch.ones(3, requires_grad=True)
    assert torch_private.is_custom_backward(Twice.apply(x).grad_fn)
    assert not torch_private.is_custom_backward((x * 2).grad_fn) and not torch_private.is_custom_backward(None)


def test_tensor_is_view_tells_views():
    "If Tensor._is_view moves: gradient_report on views made without gradient."
    x = torch.ones(3, 4)
    assert torch_private.is_view(x[0]) and torch_private.is_view(x.T)
    assert not torch_private.is_view(x) and not torch_private.is_view(x + 1)


def test_torch_current_graph_task_id_tells_a_backward_pass():
    "If torch._C._current_graph_task_id moves: caches notice no call that activation checkpointing runs again."
    x, found = torch.ones(3, requires_grad=True), []
    y = x * 2
    y.register_hook(lambda grad: found.append(torch_private.in_backward()))
    y.sum().backward()
    assert found == [True] and not torch_private.in_backward()


def test_module_buffers_are_written_through():
    "If Module._buffers moves: gradient_report leaves a module other buffers than it found."
    module = nn.Sequential(nn.BatchNorm1d(3))
    own = torch_private.own_buffers(module[0])
    assert own.keys() == dict(module[0].named_buffers()).keys() and torch_private.own_buffers(module) == {}
    own["extra"] = torch.zeros(2)
    assert "extra" in dict(module[0].named_buffers())


@pytest.mark.parametrize("there", [True, False])
def test_torch_inductor_tells_whether_there_is_a_compiler(there, monkeypatch):
    "If torch._inductor.cpp_builder.get_cpp_compiler or exc.InvalidCxxCompiler moves: mha-book bench compile."
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def found():
        if not there:
            raise InvalidCxxCompiler()
        return "g++"

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", found)
    assert torch_private.has_cpp_compiler() == there


def test_torch_inductor_config_switches_caches_off():
    "If torch._inductor.config.force_disable_caches moves: the seconds of mha-book bench compile."
    from torch._inductor import config

    before = config.force_disable_caches
    with torch_private.without_compile_caches():
        assert config.force_disable_caches
    assert config.force_disable_caches == before


def test_torch_triton_is_asked():
    "If torch.utils._triton.has_triton moves: mha-book bench compile on CUDA."
    assert torch_private.has_triton() in (True, False)
    assert torch.cuda.is_available() or not torch_private.has_triton()


def test_torch_dynamo_runs_marked_functions_as_they_are():
    "If the mark of torch.compiler.assume_constant_result moves: a RoPE made within a compiled function."
    ran = []

    @torch_private.constant_when_compiled
    def three():
        return len(ran) or ran.append(torch.tensor(3).tolist()) or ran[0]

    compiled = torch.compile(lambda x: x + three(), fullgraph=True, backend="eager")
    assert compiled(torch.zeros(2)).tolist() == [3.0, 3.0] and ran == [3]
    public = torch.compiler.assume_constant_result(lambda: 3)
    assert vars(public) == vars(three)


# Nothing of it is used elsewhere


def private_uses(source: str) -> list[str]:
    "What of torch a module uses by a private name: `torch._x`, `torch.a._b`, or an import of either."
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        else:
            continue
        found += [name for name in names if re.match(r"torch(\.\w+)*\._[a-zA-Z]", name)]
    return found


MODULES = [path for path in PACKAGE.rglob("*.py") if path.name not in ("torch_private.py", "_modidx.py")]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_no_other_module_uses_what_torch_keeps_private(path):
    assert private_uses(path.read_text(encoding="utf8")) == []


@pytest.mark.parametrize(
    "source",
    ["import torch._dynamo", "from torch._C import f", "from torch.utils import _triton", "x = torch.autograd._f()"],
)
def test_a_private_name_of_torch_is_seen(source):
    assert private_uses(source)
    assert not private_uses("import torch\nx = torch.__version__, torch.nn.functional.relu, own._x")
