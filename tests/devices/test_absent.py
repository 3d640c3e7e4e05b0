"""Whatever takes a device refuses one that is not there, in one way, and before it makes anything."""

import importlib
import inspect
import pkgutil
import typing

import pytest
import simulated_gpu
import torch
from torch.overrides import TorchFunctionMode

import mha_book
from mha_book.bench.measured import provenance
from mha_book.heads.masks import ExtraKeys
from mha_book.heads.single_head import causal_mask, check_device, check_lengths, parse_device, query_places
from mha_book.heads.weight_split import HeadLayout, StackedProjections
from mha_book.instruments.device import benchmark, peak_bytes, pick_device, synchronize, timed_on, use_device
from mha_book.instruments.roofline import measure_machine
from mha_book.kernels.backends import window_mask
from mha_book.lab.stress import Training, sequences, train
from mha_book.models.encoder import encode, load_minilm
from mha_book.models.language_model import load_smollm2
from mha_book.plugs.cache import KVCache, Slots
from mha_book.plugs.logits import HeadTemperature, OutputGate, SinkAttention
from mha_book.plugs.paged import BlockPool
from mha_book.plugs.positions import ALiBi, LearnedPositions, RelativeBias, distances
from mha_book.plugs.quantize import HeadPrecision
from mha_book.plugs.quantized_cache import Plan, QuantizedKVCache, QuantizedSlots
from mha_book.plugs.rope import rope_frequencies
from mha_book.variants.composed_heads import ComposedHeads, MultiTokenAttention
from mha_book.variants.differential import DifferentialAttention, DifferentialHeads, SubtractHeads
from mha_book.variants.head_gates import HeadGates
from mha_book.variants.interleaved_heads import InterleavedHeads
from mha_book.variants.mixed_precision import hadamard
from mha_book.variants.mixed_projections import MixedHeads
from mha_book.variants.mixture_of_heads import MixtureOfHeads
from mha_book.variants.talking_heads import TalkingHeads
from support.refusals import refused

INT4 = HeadPrecision.uniform(3, "int4")
MAKES = {  # what makes tensors, or hands a device on to where they are made
    "MultiHeadAttention": lambda device: mha_book.MultiHeadAttention(48, 6, num_kv_heads=3, device=device),
    "StackedProjections": lambda device: StackedProjections(48, HeadLayout(6, 3, 8), 40, True, None, device),
    "ExtraKeys": lambda device: ExtraKeys(3, 8, device=device),
    "HeadTemperature": lambda device: HeadTemperature(6, device=device),
    "InterleavedHeads": lambda device: InterleavedHeads(6, 2, device=device),
    "SinkAttention": lambda device: SinkAttention(6, device=device),
    "HeadGates": lambda device: HeadGates(6, device=device),
    "OutputGate": lambda device: OutputGate(48, 6, device=device),
    "MixtureOfHeads": lambda device: MixtureOfHeads(48, 6, 3, device=device),
    "ComposedHeads": lambda device: ComposedHeads(48, 6, device=device),
    "MultiTokenAttention": lambda device: MultiTokenAttention(6, device=device),
    "TalkingHeads": lambda device: TalkingHeads(6, device=device),
    "MixedHeads": lambda device: MixedHeads(HeadLayout(6, 3, 8), "kv", "heads", device=device),
    "DifferentialAttention": lambda device: DifferentialAttention(6, 8, 0, device=device),
    "DifferentialHeads": lambda device: DifferentialHeads(48, 6, device=device),
    "SubtractHeads": lambda device: SubtractHeads(48, 6, device=device),
    "LearnedPositions": lambda device: LearnedPositions(7, 48, device=device),
    "RelativeBias": lambda device: RelativeBias(6, device=device),
    "ALiBi.bias": lambda device: ALiBi(6).bias(5, 7, device),
    "KVCache": lambda device: KVCache(2, 3, 7, 8, device=device),
    "QuantizedKVCache": lambda device: QuantizedKVCache(2, INT4, 7, 8, device=device),
    "QuantizedSlots": lambda device: QuantizedSlots(2, Plan(INT4, 8, 8), 7, 7, device, None),
    "Slots": lambda device: Slots(torch.Size((2, 3, 7, 8)), torch.Size((2, 3, 7, 8)), device=device, dtype=None),
    "BlockPool": lambda device: BlockPool(5, 4, 3, 8, device=device),
    "causal_mask": lambda device: causal_mask(5, 7, device),
    "window_mask": lambda device: window_mask(5, 7, 2, device),
    "query_places": lambda device: query_places(5, 7, device),
    "distances": lambda device: distances(5, 7, device),
    "hadamard": lambda device: hadamard(8, device=device),
    "CollaborativeHeads": lambda device: mha_book.CollaborativeHeads(48, 6, 24, device=device),
    "HeadBudget": lambda device: mha_book.HeadBudget(3, 2, device=device),
    "rope_frequencies": lambda device: rope_frequencies(8, device=device),
}
ASKS = MAKES | {  # and what loads, trains, measures, or only asks
    "check_device": check_device,
    "check_lengths": lambda device: check_lengths(5, 7, device),
    "parse_device": lambda device: check_device(parse_device(device)),
    "pick_device": pick_device,
    "use_device": use_device,
    "synchronize": synchronize,
    "timed_on": timed_on,
    "benchmark": lambda device: benchmark({"a": never}, device=device),
    "peak_bytes": lambda device: peak_bytes(never, device),
    "measure_machine": measure_machine,
    "sequences": lambda device: next(sequences(Training(), 0, device)),
    "train": lambda device: train("plain", 0.1, 0, device=device),
    "encode": lambda device: encode(None, ["a"], device),
    "load_minilm": load_minilm,
    "load_smollm2": load_smollm2,
    "provenance": provenance,
}
ABSENT = ["nonsense", "", "CPU", "cuda:99", "cuda:-1", "cpu:1", "cpu:256", "mps", 99, -1, 2**70]
ABSENT += [torch.device("xpu"), torch.device("cpu:1"), torch.device("cuda:99"), b"nonsense"]
ABSENT += ["cuda", "cuda:0", torch.device("cuda"), 0] * (not torch.cuda.is_available())
NO_DEVICE = [1.5, True, torch.float32, ["cpu"], ("cpu", 0), torch.ones(2), object]
pytestmark = pytest.mark.usefixtures("own_messages")


def never():
    raise AssertionError("it was called")


class Calls(TorchFunctionMode):
    "Every call of torch, but for the question whether a device is there."

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if not (func is torch.empty and args == (0,) or func in (torch.device, torch.Tensor.__repr__)):
            self.seen.append(func)
        return func(*args, **kwargs or {})


def takes_device(function) -> bool:
    "Whether a parameter may be a device or the name of one."
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    kinds = [typing.get_args(p.annotation) for p in parameters]
    return any(torch.device in kind and str in kind for kind in kinds)


def public_callables():
    "Name and object of all functions, classes and methods that a module of the package offers."
    for found in pkgutil.walk_packages(mha_book.__path__, "mha_book."):
        module = importlib.import_module(found.name)
        for name, thing in vars(module).items():
            if name.startswith("_") or not callable(thing) or getattr(thing, "__module__", "") != found.name:
                continue
            yield name, thing
            if inspect.isclass(thing):
                own = {key: value for key, value in vars(thing).items() if not key.startswith("_") and callable(value)}
                yield from ((f"{name}.{key}", method) for key, method in own.items())


def test_every_public_callable_that_takes_a_device_is_asked():
    found = {name for name, thing in public_callables() if takes_device(thing)}
    assert found - {"RoPE.frequencies"} == set(ASKS)  # the default of a field, which is `rope_frequencies`


def test_a_parameter_for_devices_is_noticed():
    def made(n: int, device: torch.device | str | None = None): ...
    def named(place: str | torch.device): ...
    def inner(device: torch.device): ...  # of a tensor

    assert takes_device(made) and takes_device(named) and not takes_device(inner)


@pytest.mark.parametrize("device", ABSENT, ids=repr)
@pytest.mark.parametrize("name", ASKS)
def test_a_device_that_is_not_there_is_refused_before_anything_is_made(name, device):
    with Calls() as calls, refused(ValueError, f"device {str(device)!r}", "is not there; there is cpu"):
        ASKS[name](device)
    assert calls.seen == []


@pytest.mark.parametrize("device", NO_DEVICE, ids=lambda device: type(device).__name__)
@pytest.mark.parametrize("name", ASKS)
def test_what_is_no_device_is_refused_before_anything_is_made(name, device):
    with (
        Calls() as calls,
        refused(TypeError, "device must be a name such as 'cpu'", f"of type {type(device).__name__}"),
    ):
        ASKS[name](device)
    assert calls.seen == []


@pytest.mark.parametrize("device", ["cpu", "cpu:0", torch.device("cpu"), torch.device("cpu", 0), "meta", None])
@pytest.mark.parametrize("name", MAKES)
def test_a_device_that_is_there_is_taken(name, device):
    made = MAKES[name](device)
    tensor = next(made.parameters()) if isinstance(made, torch.nn.Module) else getattr(made, "k", made)
    assert tensor.device.type == torch.device(device or "cpu").type


@pytest.mark.parametrize("name", MAKES)
def test_a_default_device_leaves_named_ones_alone(name):
    with torch.device("meta"):
        test_a_device_that_is_there_is_taken(name, "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU, which nothing needs to simulate")
def test_a_gpu_is_there_while_it_is():
    with simulated_gpu.simulated_gpu():
        for name in MAKES:
            test_a_device_that_is_there_is_taken(name, "cuda")
            test_a_device_that_is_there_is_taken(name, torch.device("cuda:0"))
            for device in "cuda:1", torch.device("cuda:1"), "cuda:256":
                with refused(ValueError, f"device {str(device)!r} is not there; there is cpu, cuda:0"):
                    MAKES[name](device)
    with refused(ValueError, "device 'cuda' is not there; there is cpu"):
        check_device("cuda")


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu"), "cpu:0", "meta"])
def test_masks_of_named_devices_compile(device):
    def both(n, m):
        return causal_mask(n, m, device) & window_mask(n, m, 2, device)

    compiled = torch.compile(both, fullgraph=True, backend="eager")(5, 7)
    assert compiled.device == both(5, 7).device
    assert compiled.is_meta or torch.equal(compiled, both(5, 7))


def test_what_makes_before_it_asks_is_noticed():
    def hasty(device):
        torch.zeros(3)
        check_device(device)

    with Calls() as calls, refused(ValueError, "is not there"):
        hasty("cuda:99")
    assert calls.seen == [torch.zeros]
