"""A simulated GPU, for finding on a CPU what would stop a program on a real one.

    with simulated_gpu():                        # or, until the program ends: for_good()
        x = torch.randn(3, device="cuda")        # x.device is cuda:0, torch.cuda.is_available() is True
        x + torch.ones(3)                        # RuntimeError: Expected all tensors to be on the same device ...

A tensor "on the GPU" is a CPU tensor whose memory bears a mark. Views, parameters and whatever else shares the memory
share the mark, and autograd, kernels and dtypes are torch's own. A `TorchFunctionMode` sees every call of torch that
Python makes, and each attribute that it reads. It answers for the device, moves tensors by copying them, marks new
results, and refuses what CUDA refuses: tensors of two devices in one call (CPU scalars excepted), `.numpy()`,
generators of the other device, products of integers, functions that exist on the CPU only. The GPU draws random numbers
of its own, so that the luck of a seed does not carry over.

What it does not do. It looks at a call from outside: which devices a function of torch, or a compiled one, uses inside
is not seen, and neither is code of yours that autograd calls back during the backward pass, or that runs in another
thread. Kernels are the CPU's, and so is their speed, their rounding, and what `torch.nn.attention` says about them. A
product of more than LARGE FLOPs without gradients is not computed: it is 0, after a pause. What is compiled for the
backend "inductor" gets "eager" instead. Events tell wall time. `torch.cuda.memory_allocated` counts tensors that Python
has seen, not what a kernel or autograd holds beside them. There is one stream, and nothing is asynchronous.
"""

import contextlib
import importlib.machinery
import importlib.util
import re
import sys
import time
import types
import weakref
from unittest import mock

import torch
from torch._C import _len_torch_function_stack
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils import _device as default

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
MEMORY = 2**30  # bytes that the GPU says it has
LARGE = 2**33  # FLOPs of a product that a page measures a GPU with, and that a CPU would take long for
RATE = 5e12  # FLOP/s at which the GPU pretends to do these
Tensor = torch.Tensor

# Two devices may meet here: these copy, or read nothing but shapes.
MAY_MIX = {
    "copy_",
    "data",
    "to",
    "type_as",
    "expand_as",
    "view_as",
    "reshape_as",
    "broadcast_tensors",
    "result_type",
    "is_same_size",
    "set_",
    "_has_compatible_shallow_copy_type",
}
# Not even a CPU scalar may join these.
STRICT = {"cat", "concat", "concatenate", "stack", "hstack", "vstack", "equal", "embedding", "index_select", "gather"}
PRODUCTS = {
    "matmul",
    "__matmul__",
    "__rmatmul__",
    "mm",
    "bmm",
    "mv",
    "addmm",
    "baddbmm",
    "linear",
    "dot",
    "_scaled_mm",
    "_scaled_mm_v2",
}
CPU_ONLY = {"histogram", "histogramdd"}
IN_PLACE = re.compile(r"[a-z].*_|__i(add|sub|mul|truediv|pow|and|or|xor)__")
DRAWS = ("rand", "normal", "uniform", "bernoulli", "multinomial", "dropout", "exponential_", "scaled_dot_product")


def memory(tensor):
    "What bears the mark of a tensor: its storage; the tensor itself where it has none of its own."
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return tensor


def on_gpu(tensor) -> bool:
    "Whether a tensor bears the mark."
    return getattr(memory(tensor), "on_gpu", False)


def tensors_in(tree) -> list:
    "All tensors in nested tuples, lists and dicts."
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (tuple, list)):
        return []
    return [t for branch in tree for t in tensors_in(branch)]


class SimulatedGPU(TorchFunctionMode):
    "Answers every call of torch as a machine with one GPU would."

    def __init__(self):
        super().__init__()
        self.allocated = self.peak = 0
        self.random = torch.Generator().manual_seed(1).get_state()
        self.answers = {
            Tensor.device.__get__: lambda t: GPU if on_gpu(t) else t.device,
            Tensor.is_cuda.__get__: on_gpu,
            Tensor.is_cpu.__get__: lambda t: t.is_cpu and not on_gpu(t),
            Tensor.grad.__get__: lambda t: None if t.grad is None else self.mark(t.grad, on_gpu(t)),
            Tensor.get_device: lambda t: 0 if on_gpu(t) else t.get_device(),
            Tensor.cpu: lambda t, *args, **options: self.to(t, CPU, **options),
            Tensor.cuda: lambda t, device=None, *args, **options: self.to(t, GPU, **options),
            Tensor.to: self.to,
            Tensor.pin_memory: lambda t, *args: t.clone(),
            Tensor.is_pinned: lambda t, *args: False,
            Tensor.__getitem__: self.getitem,
            Tensor.__setitem__: self.setitem,
            torch.autograd.grad: self.grad,
        }

    def __torch_function__(self, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():  # inside, everything is a plain CPU tensor
            answer = self.answers.get(func)
            return answer(*args, **(kwargs or {})) if answer else self.call(func, args, dict(kwargs or {}))

    def call(self, func, args, kwargs):
        "Any function without an answer of its own: check, compute, mark."
        name, inputs = getattr(func, "__name__", ""), tensors_in((args, kwargs))
        name = func.__self__.__name__ if name in ("__get__", "__set__") else name
        self.check(name, inputs)
        constructor, device = func in default._device_constructors(), GPU if any(map(on_gpu, inputs)) else CPU
        chosen = kwargs.pop("device", None)
        if chosen is None and constructor:
            chosen = default.CURRENT_DEVICE
        if chosen is not None or constructor:
            device = self.device(device if chosen is None else chosen)
            kwargs = {key: kwargs[key] for key in kwargs if key != "pin_memory"} | {
                "device": CPU if device.type == "cuda" else device
            }
        gpu = device.type == "cuda"
        self.check_generator(kwargs.get("generator"), device)
        with self.own_random() if gpu and any(map(name.__contains__, DRAWS)) else contextlib.nullcontext():
            result = self.zeros_for_large(name, func, args, kwargs, inputs)
            result = func(*args, **kwargs) if result is None else result
        if constructor and on_gpu(result) != gpu and any(memory(result) is memory(t) for t in inputs):
            return self.mark(result.clone(), gpu)  # as_tensor may give back what it got
        return self.place(result, inputs) if gpu else result

    def zeros_for_large(self, name, func, args, kwargs, inputs):
        "What stands for a large product, for which no gradient is asked; None for everything else."
        if name not in PRODUCTS or not on_gpu(inputs[0]) or any(t.requires_grad or t.dim() < 2 for t in inputs[:2]):
            return None
        flops = 2 * inputs[0].numel() * inputs[1].shape[-2 if name == "linear" else -1]
        if flops < LARGE:
            return None
        time.sleep(flops / RATE)
        args = [t.to("meta") if isinstance(t, Tensor) else t for t in args]
        result = func(*args, **{key: t.to("meta") if isinstance(t, Tensor) else t for key, t in kwargs.items()})
        return torch.zeros(result.shape, dtype=result.dtype)

    def device(self, asked):
        "The device of that name, if it is there."
        device = torch.device("cuda", asked) if isinstance(asked, int) else torch.device(asked)
        if device.type == "cuda" and device.index not in (None, 0):
            raise RuntimeError("CUDA error: invalid device ordinal")
        return device

    def check(self, name, inputs):
        "Raise as CUDA does."
        if name in ("numpy", "__array__", "__dlpack__") and on_gpu(inputs[0]):
            raise TypeError(
                f"can't convert {GPU} device type tensor to numpy. "
                f"Use Tensor.cpu() to copy the tensor to host memory first."
            )
        there = [t for t in inputs if on_gpu(t)]
        here = [t for t in inputs if not on_gpu(t) and (t.dim() or name in STRICT)]
        if not there or name in MAY_MIX:
            return
        if here:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {GPU} "
                f"and {here[0].device}! (in {name})"
            )
        if not on_gpu(inputs[0]) and IN_PLACE.fullmatch(name):
            raise RuntimeError(f"Attempting to write to CPU scalar from non-CPU kernel (in {name})")
        if name in PRODUCTS and not there[0].is_floating_point() and not there[0].is_complex():
            raise RuntimeError(f'"addmm_cuda" not implemented for {there[0].dtype} (in {name})')
        if name in CPU_ONLY:
            raise NotImplementedError(f"Could not run 'aten::{name}' with arguments from the 'CUDA' backend.")

    def check_generator(self, generator, device):
        "A generator draws on its own device only."
        found = device if generator is None else generator.device
        if found.type != device.type:
            raise RuntimeError(f"Expected a '{device.type}' device type for generator but found '{found.type}'")

    @contextlib.contextmanager
    def own_random(self):
        "The GPU's random numbers instead of the CPU's."
        kept = torch.get_rng_state()
        torch.set_rng_state(self.random)
        try:
            yield
        finally:
            self.random = torch.get_rng_state()
            torch.set_rng_state(kept)

    def to(self, tensor, *args, copy=False, **options):
        "`Tensor.to`: to the other device it copies."
        device, dtype, _, form = torch._C._nn._parse_to(*args, **options)
        device = self.device(device or (GPU if on_gpu(tensor) else tensor.device))
        gpu = device.type == "cuda"
        result = tensor.to(
            CPU if gpu else device,
            dtype or tensor.dtype,
            copy=copy or on_gpu(tensor) != gpu,
            memory_format=form or torch.preserve_format,
        )
        return result if result is tensor else self.mark(result, gpu)

    def whole(self, compiled, flex):
        """A compiled function, as one call: what Python does inside is not watched.
        FlexAttention does not learn that this is a CPU, on which it would refuse to go backward.
        """

        def run(*args, **kwargs):
            inputs = tensors_in((args, kwargs)) + list(getattr(compiled, "parameters", list)())
            with torch._C.DisableTorchFunction():
                self.check("a compiled function", inputs)
            blind = contextlib.nullcontext()
            if flex:
                blind = mock.patch.object(flex, "_validate_device", lambda *args: None)
            with modes_as_they_were(), blind:
                for _ in range(_len_torch_function_stack()):
                    _pop_mode()
                default.CURRENT_DEVICE = None
                result = compiled(*args, **kwargs)
            with torch._C.DisableTorchFunction():
                gpu = any(map(on_gpu, inputs)) if inputs else str(default.CURRENT_DEVICE).startswith("cuda")
                return self.place(result, inputs) if gpu else result

        return run

    def place(self, result, inputs):
        "Mark what is new in a result."
        known = [memory(t) for t in inputs]
        for t in tensors_in(result):
            if not any(memory(t) is own for own in known):
                self.mark(t, True)
        return result

    def check_index(self, tensor, index):
        "CPU indices may stand in a GPU's tensor, and not the other way round."
        far = [i for i in tensors_in([index]) if i.dim() and on_gpu(i) and not on_gpu(tensor)]
        if far:
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")

    def getitem(self, tensor, index):
        "`tensor[index]`."
        self.check_index(tensor, index)
        result = tensor[index]
        return result if memory(result) is memory(tensor) else self.mark(result, on_gpu(tensor))

    def setitem(self, tensor, index, value):
        "`tensor[index] = value`; without tensors in `index` this is `copy_`."
        self.check_index(tensor, index)
        if isinstance(value, Tensor) and value.dim() and tensors_in([index]):
            self.check("index_put", [tensor, value])
        tensor[index] = value

    def grad(self, outputs, inputs, *args, **options):
        "Each gradient is where its input is."
        found = torch.autograd.grad(outputs, inputs, *args, **options)
        pairs = list(zip(found, tensors_in([inputs])))
        return tuple(g if g is None or on_gpu(g) == on_gpu(t) else self.mark(g.clone(), on_gpu(t)) for g, t in pairs)

    def mark(self, tensor, gpu):
        "Say where a tensor's memory is, and count it."
        own = memory(tensor)
        if gpu != getattr(own, "on_gpu", False):
            own.on_gpu = gpu
            if gpu and isinstance(own, torch.UntypedStorage):
                self.count(own.nbytes())
                weakref.finalize(own, self.count, -own.nbytes()).atexit = False
        return tensor

    def count(self, size):
        "More memory, or less."
        self.allocated += size
        self.peak = max(self.peak, self.allocated)


class Event:
    "Stands in for `torch.cuda.Event`: the wall clock."

    def __init__(self, enable_timing=False, **options):
        self.seconds = None

    def record(self, stream=None):
        self.seconds = time.perf_counter()

    def elapsed_time(self, end):
        return 1000 * (end.seconds - self.seconds)

    def query(self):
        return True

    def synchronize(self):
        pass

    wait = synchronize


class Generator(torch.Generator):
    "Stands in for `torch.Generator`, and knows which device it was made for."

    def __new__(cls, device="cpu"):
        self = super().__new__(cls)
        self.made_for = GPU if torch.device(device).type == "cuda" else CPU
        return self

    device = property(lambda self: self.made_for)


def stand_ins(mode: SimulatedGPU) -> list:
    "Patches for what is not a call on tensors: torch.cuda, generators, the compiler."

    def gives(value=None):  # each a function of its own, as dynamo wants it
        return lambda *args, **options: value

    def reset_peak(device=None):
        mode.peak = mode.allocated

    def seed(number):
        mode.random = torch.Generator().manual_seed(number ^ 0x5EED).get_state()

    def set_state(state, device=None):
        mode.random = state.clone()

    compiler, autocast, parse = torch.compile, torch.autocast, torch._C._nn._parse_to
    find_spec = importlib.util.find_spec

    def compile(model=None, **options):
        if model is None:
            return lambda model: compile(model, **options)
        if options.get("backend", "inductor") == "inductor":
            options = {key: options[key] for key in options if key not in ("mode", "options")} | {"backend": "eager"}
        return mode.whole(compiler(model, **options), sys.modules.get("torch.nn.attention.flex_attention"))

    def parse_to(*args, **options):
        args = [(GPU if on_gpu(a) else a.device, a.dtype) if isinstance(a, Tensor) else (a,) for a in args]
        return parse(*[part for pair in args for part in pair], **options)

    def cpu_autocast(device_type, dtype=None, **options):
        dtype = dtype or torch.get_autocast_dtype(device_type)
        return autocast("cpu", dtype, **options)

    def find_triton(name, package=None):
        return importlib.machinery.ModuleSpec(name, None) if name == "triton" else find_spec(name, package)

    properties = types.SimpleNamespace(
        uuid="0", name="simulated GPU", major=9, minor=0, total_memory=MEMORY, multi_processor_count=1
    )
    cuda = dict(
        _initialized=True,
        is_available=gives(True),
        device_count=gives(1),
        current_device=gives(0),
        get_device_name=gives(properties.name),
        get_device_capability=gives((9, 0)),
        is_bf16_supported=gives(True),
        get_device_properties=gives(properties),
        mem_get_info=lambda *args: (MEMORY - mode.allocated, MEMORY),
        memory_allocated=lambda *args: mode.allocated,
        max_memory_allocated=lambda *args: mode.peak,
        reset_peak_memory_stats=reset_peak,
        empty_cache=gives(),
        synchronize=gives(),
        set_device=gives(),
        Event=Event,
        device=gives(contextlib.nullcontext()),
        stream=gives(contextlib.nullcontext()),
        manual_seed=seed,
        manual_seed_all=lambda number: seed(number),
        get_rng_state=lambda *args: mode.random.clone(),
        set_rng_state=set_state,
    )
    return [
        mock.patch.multiple(torch.cuda, **cuda),
        mock.patch.object(torch.accelerator, "synchronize", gives()),
        mock.patch.object(torch, "Generator", Generator),
        mock.patch.object(torch, "compile", compile),
        mock.patch.object(torch, "autocast", cpu_autocast),
        mock.patch.object(torch._C._nn, "_parse_to", parse_to),
        mock.patch.object(importlib.util, "find_spec", find_triton),
    ]  # a torch for CUDA brings Triton


@contextlib.contextmanager
def modes_as_they_were():
    "Afterwards the modes and the default device are what they were, whoever changed them."
    modes, device = _get_current_function_mode_stack(), default.CURRENT_DEVICE
    context = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    try:
        yield
    finally:
        for _ in range(_len_torch_function_stack()):
            _pop_mode()
        for mode in modes:
            _push_mode(mode)
        default.CURRENT_DEVICE, torch._GLOBAL_DEVICE_CONTEXT.device_context = device, context


@contextlib.contextmanager
def simulated_gpu():
    "A GPU, until the end of the block."
    with contextlib.ExitStack() as stack:
        stack.enter_context(modes_as_they_were())
        mode = SimulatedGPU()
        for patch in stand_ins(mode):
            stack.enter_context(patch)
        _push_mode(mode)
        yield mode


def for_good():
    "A GPU until the program ends."
    for_good.context = simulated_gpu()
    for_good.context.__enter__()
