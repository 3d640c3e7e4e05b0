"""A model made on the meta device and reset module by module starts as its constructor starts it."""

import copy
import gc
import io
import pickle
import pkgutil
import weakref
from importlib import import_module

import pytest
import torch
from torch import nn

import mha_book
from mha_book import HeadTemperature, MultiHeadAttention, OutputGate, SinkAttention
from mha_book.heads.head_counts import pad_heads, separate_projections
from mha_book.heads.head_list import HeadList
from mha_book.heads.masks import ExtraKeys
from mha_book.heads.single_head import AttentionHead, fused_attend
from mha_book.heads.weight_split import HeadLayout, StackedProjections
from mha_book.lab.nine_ways import Way
from mha_book.lab.stress import Block
from mha_book.models.encoder import Encoder, EncoderConfig, EncoderLayer
from mha_book.models.language_model import DecoderLayer, LanguageModel, LanguageModelConfig
from mha_book.plugs.quantize import HeadPrecision
from mha_book.plugs.rope import RoPE
from mha_book.variants.collaborative_heads import CollaborativeHeads
from mha_book.variants.composed_heads import ComposedHeads, MultiTokenAttention
from mha_book.variants.differential import DifferentialAttention, DifferentialHeads, SigmoidAttention
from mha_book.variants.head_budget import HeadBudget
from mha_book.variants.head_gates import HeadGates
from mha_book.variants.interleaved_heads import InterleavedHeads
from mha_book.variants.mixed_precision import MixedPrecision, RotatedPosition
from mha_book.variants.mixed_projections import MixedHeads
from mha_book.variants.mixture_of_heads import MixtureOfHeads
from mha_book.variants.talking_heads import TalkingHeads

E, H, G, D, DV, C = 240, 6, 3, 48, 24, 160  # wide enough that a spread is known to a few percent
ENCODER = EncoderConfig(300, E, H, 2, 320, 50, 2, 1e-5)
DECODER = dict(vocab_size=300, embed_dim=E, num_heads=H, num_kv_heads=G, head_dim=D, num_layers=2, hidden_dim=320)


def language_config():
    "The sizes of a small language model; what else it has does not matter here."
    rest = dict(max_len=50, rope_base=1e4, eps=1e-5)
    names = LanguageModelConfig.__dataclass_fields__
    return LanguageModelConfig(**{name: (DECODER | rest)[name] for name in names})


def layer(**options):
    return MultiHeadAttention(E, H, **options)


MODULES = {
    "MultiHeadAttention": layer,
    "without biases": lambda: layer(bias=False),
    "grouped": lambda: layer(num_kv_heads=G, head_dim=D),
    "another width of values": lambda: layer(num_kv_heads=G, head_dim=D, value_dim=DV),
    "with context": lambda: layer(context_dim=C),
    "with context and both": lambda: layer(num_kv_heads=G, head_dim=D, value_dim=DV, context_dim=C),
    "with norms": lambda: layer(qk_norm=nn.RMSNorm),
    "with a gate": lambda: layer(finish=OutputGate(E, H)),
    "MixedPrecision": lambda: layer(attend=MixedPrecision(HeadPrecision.uniform(H, "int4"), HeadTemperature(H))),
    "RotatedPosition": lambda: layer(position=RotatedPosition(None, torch.eye(E // H, device="cpu"))),
    "with temperatures": lambda: layer(attend=HeadTemperature(H)),
    "StackedProjections": lambda: StackedProjections(E, HeadLayout(H, G, D, DV), 100, True, None),
    "SeparateProjections": lambda: separate_projections(layer(head_dim=D)),
    "AttentionHead": lambda: AttentionHead(E, D),
    "HeadList": lambda: HeadList(E, H),
    "OutputGate": lambda: OutputGate(E, H),
    "HeadTemperature": lambda: HeadTemperature(H),
    "InterleavedHeads": lambda: InterleavedHeads(H, 4, num_kv_heads=G, spread=0.1),
    "interleaved across heads": lambda: layer(attend=InterleavedHeads(H, 2, across_heads=True, spread=0.0)),
    "SinkAttention": lambda: SinkAttention(H),
    "ExtraKeys": lambda: ExtraKeys(G, D, value_dim=DV, zero=True),
    "EncoderLayer": lambda: EncoderLayer(ENCODER),
    "Encoder": lambda: Encoder(ENCODER),
    "DecoderLayer": lambda: DecoderLayer(language_config(), RoPE(D, 1e4), fused_attend),
    "LanguageModel": lambda: LanguageModel(language_config()),
    "HeadBudget": lambda: HeadBudget(E, 3),
    "CollaborativeHeads": lambda: CollaborativeHeads(E, H, 144, num_kv_heads=G, value_dim=DV),
    "_Silent": lambda: CollaborativeHeads(E, H).content_proj,
    "HeadGates": lambda: layer(finish=HeadGates(H)),
    "MixtureOfHeads": lambda: layer(finish=MixtureOfHeads(E, H, 4, num_shared=1)),
    "MixedHeads": lambda: MixedHeads(HeadLayout(H, G, D, DV), "qv", "channels"),
    "_Router": lambda: MixtureOfHeads(E, 100, 3).router,
    "ComposedHeads": lambda: ComposedHeads(E, H, num_kv_heads=G, head_dim=D, value_dim=DV, context_dim=C),
    "_TokenMix": lambda: ComposedHeads(E, H).of_queries,
    "_Composition": lambda: ComposedHeads(E, H).attend,
    "MultiTokenAttention": lambda: layer(attend=MultiTokenAttention(H)),
    "DifferentialAttention": lambda: layer(attend=DifferentialAttention(H, D, 2)),
    "DifferentialHeads": lambda: DifferentialHeads(E, H, num_kv_heads=G, value_dim=DV),
    "SubtractHeads": lambda: DifferentialHeads(E, H, context_dim=C).finish,
    "SigmoidAttention": lambda: layer(attend=SigmoidAttention()),
    "Block": lambda: Block(layer(), E),
    "TalkingHeads": lambda: layer(attend=TalkingHeads(H)),
}
ELSEWHERE = {
    "LearnedPositions",
    "RelativeBias",
    "ALiBi",
    "CopyModel",
    "Watched",
    "AdaptiveHeads",
}  # with their own tests, or made of these


def own_modules():
    "The classes of modules that the package has, but for the nine ways, which share another layer's parameters."
    for info in pkgutil.walk_packages(mha_book.__path__, "mha_book."):
        if not info.name.startswith(("mha_book.bench", "mha_book.figures")):
            for name, value in vars(import_module(info.name)).items():
                if isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == info.name:
                    if not issubclass(value, Way):
                        yield name


def test_every_module_is_tried():
    assert set(own_modules()) <= MODULES.keys() | ELSEWHERE


def parents_first(module):
    return list(module.modules())


ORDERS = {"parents first": parents_first, "children first": lambda module: parents_first(module)[::-1]}


def reset(module, order=parents_first):
    "What a framework does with a model that was made on meta: each module with parameters of its own resets them."
    for part in order(module):
        if [*part.parameters(recurse=False)]:
            part.reset_parameters()
    return module


def on_meta(make):
    with torch.device("meta"):
        module = make()
    module = module.to_empty(device="cpu")
    with torch.no_grad():
        for t in module.parameters():
            t.fill_(7.0)  # what memory may hold
    return module


def assert_alike(got, wanted):
    "Two draws from one distribution: constants are equal, and the spread and the bounds of the rest agree."
    for (name, a), (other, b) in zip(got.named_parameters(), wanted.named_parameters(), strict=True):
        assert name == other and a.shape == b.shape
        if not b.std() > 0:
            assert torch.equal(a, b), name
            continue
        assert 0.5 < a.abs().max() / b.abs().max() < 2, name
        if b.numel() > 9_000:  # what is smaller has no spread to speak of
            for rows_a, rows_b in zip(a.chunk(3), b.chunk(3)):  # keys apart from values, too
                spread = rows_a.std() / rows_b.std()
                assert abs(spread - 1) < 0.06 and abs(rows_a.mean()) < 0.06 * rows_b.std(), f"{name}: {spread}"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", MODULES)
def test_a_module_made_on_meta_starts_as_its_constructor_starts_it(name, order):
    torch.manual_seed(0)
    wanted, got = MODULES[name](), on_meta(MODULES[name])
    assert_alike(reset(got, ORDERS[order]), wanted)
    for part in got.modules():
        if isinstance(part, StackedProjections):
            part.reset_parameters()  # once more, as a whole
    assert_alike(got, wanted)


def test_a_start_that_is_not_the_constructors_is_noticed():
    got, wanted = on_meta(layer), layer()
    for part in got.modules():
        if isinstance(part, nn.Linear):
            nn.Linear.reset_parameters(part)  # torch's own, which knows of no stack
    with pytest.raises(AssertionError):
        assert_alike(got, wanted)


def test_bounds_are_xaviers_of_the_whole_matrix_and_of_each_part():
    for module, name, rows, fan_out in (
        (layer(num_kv_heads=G, head_dim=D, value_dim=DV), "in_proj", slice(None), H * D + G * (D + DV)),
        (layer(num_kv_heads=G, head_dim=D, value_dim=DV, context_dim=C), "in_proj", slice(None), H * D),
        (layer(num_kv_heads=G, head_dim=D, value_dim=DV, context_dim=C), "context_proj", slice(0, G * D), G * D),
        (layer(num_kv_heads=G, head_dim=D, value_dim=DV, context_dim=C), "context_proj", slice(G * D, None), G * DV),
    ):
        weight = getattr(module, name).weight[rows]
        bound = (6 / (weight.shape[1] + fan_out)) ** 0.5
        assert 0.98 * bound < weight.abs().max() <= bound


def test_the_seeds_numbers_are_torchs_with_a_context_too():
    ours, theirs = layer(context_dim=C), nn.MultiheadAttention(E, H, kdim=C, vdim=C)
    torch.manual_seed(7)
    reset_all = ours.reset_parameters
    reset_all()
    torch.manual_seed(7)
    theirs.out_proj.reset_parameters()
    theirs._reset_parameters()
    assert torch.equal(ours.in_proj.weight, theirs.q_proj_weight)
    assert torch.equal(ours.context_proj.weight, torch.cat([theirs.k_proj_weight, theirs.v_proj_weight]))


# The start goes with its projection


def test_projections_stay_torchs_own_class_and_save_no_more():
    module = layer(context_dim=C)
    assert type(module.in_proj) is type(module.context_proj) is type(module.out_proj) is nn.Linear
    names = {f"{proj}.{kind}" for proj in ("in_proj", "context_proj", "out_proj") for kind in ("weight", "bias")}
    assert module.state_dict().keys() == names | {"_extra_state"}


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded])
def test_a_copy_resets_itself_and_not_the_original(again):
    module = layer(context_dim=C)
    before = {name: t.clone() for name, t in module.state_dict().items()}
    copied = again(module)
    for name, t in copied.state_dict().items():
        assert torch.equal(t, before[name])
    reset(copied)
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    assert not torch.equal(copied.in_proj.weight, module.in_proj.weight)
    assert_alike(copied, module)
    one = again(module.context_proj)  # alone, too, without the layer around it
    one.reset_parameters()
    assert torch.equal(module.context_proj.weight, before["context_proj.weight"])
    assert not torch.equal(one.weight, module.context_proj.weight)


def test_a_layer_with_other_heads_starts_by_its_own_rows():
    wide = pad_heads(layer(num_kv_heads=G, head_dim=D, value_dim=DV, context_dim=C), 2 * H)
    wanted = MultiHeadAttention(E, 2 * H, num_kv_heads=2 * G, head_dim=D, value_dim=DV, context_dim=C)
    assert_alike(reset(wide), wanted)


def test_a_layer_goes_as_soon_as_nobody_holds_it():
    gc.disable()
    try:
        module = layer(context_dim=C)
        gone = weakref.ref(module.context_proj)
        del module
        assert gone() is None
    finally:
        gc.enable()


def test_what_has_no_matrix_of_its_own_is_not_reset_in_silence():
    for name in ("in_proj", "out_proj"):
        for change in (lambda proj: nn.Sequential(proj), nn.utils.parametrizations.weight_norm):
            module = layer()
            setattr(module, name, change(getattr(module, name)))
            with pytest.raises(TypeError, match=name):
                module.reset_parameters()


def test_a_new_matrix_is_reset_as_the_layers_own():
    module = layer()
    module.in_proj = nn.Linear(E, 3 * E)
    module.reset_parameters()
    assert_alike(module, layer())
