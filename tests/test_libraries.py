"""The libraries themselves: their weights in, their outputs out, our weights and masks into them.

Small random models, built here, in float64; nothing is fetched. The tests of a library that is absent are skipped,
and with MHA_LIBRARIES_REQUIRED=1 they fail.
"""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mha_book import (
    HeadLayout,
    RoPE,
    RoPELinearScaling,
    RoPELlama3Scaling,
    RoPENTKScaling,
    RoPEYaRNScaling,
    causal_mask,
    rotate_by_tables,
)
from mha_book.bench import suites, suites_language
from mha_book.heads.dialects import DIALECTS, Dialect, convert_weights, from_state_dict
from mha_book.heads.layer import MultiHeadAttention
from mha_book.heads.masks import MASK_DIALECTS, convert_mask, from_torch
from mha_book.heads.single_head import plain_attention
from mha_book.heads.which_dialect import guess_dialect
from mha_book.instruments.cache_size import PUBLISHED
from mha_book.instruments.testing import SIZES, assert_as_exact
from mha_book.lab.one_wrong_line import hamlet
from mha_book.models.encoder import encode
from mha_book.models.language_model import LanguageModel, LanguageModelConfig, generate, load_smollm2
from mha_book.plugs.cache import KVCache
from mha_book.plugs.positions import alibi_slopes, relative_buckets
from mha_book.variants.differential import DifferentialAttention, SigmoidAttention
from mha_book.variants.head_gates import HeadGates, prune_gated
from mha_book.variants.mixture_of_heads import MixtureOfHeads, skip_heads
from mha_book.variants.prune_heads import match_heads, prune_heads
from mha_book.variants.talking_heads import TalkingHeads, talk_through_kernel

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
s = SIZES
EQUAL, GROUPED, SHARED = (HeadLayout(s.h, g, s.d) for g in (s.h, s.g, 1))
WIDE = s.h * s.d  # the width of a model whose heads divide it


def library(name):
    "The module; the test is skipped, or fails, where it is absent."
    if os.environ.get("MHA_LIBRARIES_REQUIRED") == "1":
        return importlib.import_module(name)
    reason = f"needs {name.split('.')[0]}: make test-libraries installs it"
    return pytest.importorskip(name, reason=reason, exc_type=ImportError)


def random(*shape):
    return torch.randn(shape, dtype=torch.float64)


def fill(parameters):
    "Random numbers everywhere: a bias that begins as 0 would hide its place."
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.3)


def assert_close(got, wanted, atol=1e-10):
    "The same to 1e-10, and something to compare."
    torch.testing.assert_close(got, wanted, atol=atol, rtol=0)
    assert wanted.abs().max() > 0.1


# Transformers


@dataclass
class Rotary:
    "Rotary positions on the first `width` numbers of a head; angles in float32, as Transformers computes them."

    width: int

    def __call__(self, q, k, *, offset):
        frequencies = 1.0 / 10_000.0 ** (torch.arange(0, self.width, 2).float() / self.width)
        angles = (torch.arange(q.shape[2]).float()[:, None] * frequencies).repeat(1, 2)
        cos, sin = angles.cos().double(), angles.sin().double()

        def turn(t):
            turned, rest = t[..., : self.width], t[..., self.width :]
            first, second = turned.chunk(2, dim=-1)
            return torch.cat([turned * cos + torch.cat([-second, first], dim=-1) * sin, rest], dim=-1)

        return turn(q), turn(k)


@dataclass
class Model:
    "A model of Transformers, and where its first attention stands."

    kind: str  # its class; the config's is named after it
    heads: HeadLayout
    dialect: str | Dialect  # how it is read
    names: dict  # what it calls its tensors
    prefix: str
    config: dict = field(default_factory=dict)
    position: Rotary | None = None
    causal: bool = True
    reads: str = ""  # which module gets the input, below the prefix
    gives: str = ""  # which one gives the output
    config_kind: str = ""
    ignore: tuple[str, ...] = ()  # what stands beside the projections and belongs elsewhere
    qk_norm: Callable | None = None  # norms of queries and keys, which are carried
    atol: float = 1e-10
    norms = property(lambda self: ("q_norm", "k_norm") if self.qk_norm else ())

    def build(self, **config):
        transformers = library("transformers")
        transformers.logging.set_verbosity_error()
        config_kind = self.config_kind or self.kind.replace("Model", "Config")
        config = getattr(transformers, config_kind)(vocab_size=11, pad_token_id=0, **self.config | config)
        where = {"WhisperDecoder": "transformers.models.whisper.modeling_whisper"}.get(self.kind, "transformers")
        model = getattr(importlib.import_module(where), self.kind)(config).double().eval()
        fill(model.parameters())
        return model

    def layer(self, model):
        return from_state_dict(
            model.state_dict(),
            self.heads,
            self.dialect,
            prefix=self.prefix,
            ignore=self.ignore,
            qk_norm=self.qk_norm,
            position=self.position,
        )

    def write(self, layer, model):
        "This layer's weights under the names of the model, whose attention they replace."
        own = DIALECTS[self.dialect] if isinstance(self.dialect, str) else self.dialect
        state = layer.state_dict()
        written = convert_weights(state, "stacked", replace(own, names=self.names), self.heads, ignore=self.norms)
        written |= {f"{name}.weight": state[f"{name}.weight"] for name in self.norms}
        written = {self.prefix + name: tensor for name, tensor in written.items()}
        theirs = model.state_dict()
        absent = set(written) - set(theirs)
        assert not any(written.pop(name).any() for name in absent)  # biases of 0 stand for those that it lacks
        model.load_state_dict(theirs | written)
        return set(theirs) & set(written)

    def asked(self, model, **options):
        "What the first attention read and gave while the whole model ran."
        seen = {}

        def note_input(module, args, kwargs):
            seen["x"] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

        def note_output(module, args, output):
            seen["y"] = output[0] if isinstance(output, tuple) else output

        hooks = [
            model.get_submodule((self.prefix + self.reads).rstrip(".")).register_forward_pre_hook(
                note_input, with_kwargs=True
            ),
            model.get_submodule((self.prefix + self.gives).rstrip(".")).register_forward_hook(note_output),
        ]
        with torch.no_grad():
            model(input_ids=torch.randint(1, 11, (s.b, s.n)), **options)
        for hook in hooks:
            hook.remove()
        return seen["x"], seen["y"]


def sizes(width=WIDE, **more):
    return (
        dict(
            hidden_size=width,
            num_attention_heads=s.h,
            num_hidden_layers=1,
            intermediate_size=10,
            max_position_embeddings=16,
        )
        | more
    )


GPT = dict(n_embd=WIDE, n_head=s.h, n_layer=1, n_positions=16)
FALCON = dict(hidden_size=WIDE, num_attention_heads=s.h, num_hidden_layers=1, bias=True)
CONV = dict(qkv="c_attn", o="c_proj")
FUSED = dict(qkv="query_key_value", o="dense")
SPLIT = dict(q="q_proj", k="k_proj", v="v_proj", o="o_proj")
BERT = dict(q="self.query", k="self.key", v="self.value", o="output.dense")
HALF = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}

MODELS = {
    "GPT-2": Model("GPT2Model", EQUAL, "conv1d", CONV, "h.0.attn.", GPT),
    "BERT": Model(
        "BertModel",
        EQUAL,
        Dialect(BERT),
        BERT,
        "encoder.layer.0.attention.",
        sizes(),
        causal=False,
        reads="self",
        gives="output.dense",
        ignore=("output.LayerNorm",),
    ),
    "GPT-NeoX": Model(
        "GPTNeoXModel", EQUAL, "interleaved", FUSED, "layers.0.attention.", sizes(rope_parameters=HALF), Rotary(4)
    ),
    "Llama": Model(
        "LlamaModel",
        GROUPED,
        "separate",
        SPLIT,
        "layers.0.self_attn.",
        sizes(24, num_key_value_heads=s.g, head_dim=s.d, attention_bias=True),
        Rotary(s.d),
    ),
    "Qwen2": Model(
        "Qwen2Model",
        GROUPED,
        "separate",
        SPLIT,
        "layers.0.self_attn.",  # no bias of the output
        sizes(num_key_value_heads=s.g),
        Rotary(s.d),
    ),
    "Qwen3": Model(
        "Qwen3Model",
        GROUPED,
        "separate",
        SPLIT,
        "layers.0.self_attn.",
        sizes(num_key_value_heads=s.g, head_dim=s.d),
        Rotary(s.d),
        qk_norm=partial(nn.RMSNorm, eps=1e-6),
        atol=1e-6,  # their norm is taken in float32
    ),
    "Whisper": Model(
        "WhisperDecoder",
        EQUAL,
        "separate",
        SPLIT | {"o": "out_proj"},  # no bias of the keys
        "layers.0.self_attn.",
        dict(d_model=WIDE, decoder_layers=1, decoder_attention_heads=s.h, decoder_ffn_dim=10, max_target_positions=16),
        config_kind="WhisperConfig",
    ),
    "Falcon-40B": Model(
        "FalconModel",
        GROUPED,
        "grouped",
        FUSED,
        "h.0.self_attention.",
        FALCON | dict(new_decoder_architecture=True, num_kv_heads=s.g),
        Rotary(s.d),
    ),
    "Falcon-7B": Model(
        "FalconModel", SHARED, "multi_query", FUSED, "h.0.self_attention.", FALCON | dict(multi_query=True), Rotary(s.d)
    ),
    "Falcon-RW": Model(
        "FalconModel", EQUAL, "interleaved", FUSED, "h.0.self_attention.", FALCON | dict(multi_query=False), Rotary(s.d)
    ),
    "StarCoder": Model("GPTBigCodeModel", SHARED, "multi_query", CONV, "h.0.attn.", GPT | dict(multi_query=True)),
    "BigCode": Model("GPTBigCodeModel", EQUAL, "interleaved", CONV, "h.0.attn.", GPT | dict(multi_query=False)),
    "Phi-3": Model(
        "Phi3Model",
        GROUPED,
        "stacked",
        dict(qkv="qkv_proj", o="o_proj"),
        "layers.0.self_attn.",
        sizes(num_key_value_heads=s.g),
        Rotary(s.d),
    ),
}
EVERY_MODEL = pytest.mark.parametrize("case", MODELS.values(), ids=MODELS)


@EVERY_MODEL
def test_their_weights_give_their_outputs(case):
    model = case.build()
    x, y = case.asked(model)
    assert_close(case.layer(model)(x, is_causal=case.causal), y, case.atol)


@EVERY_MODEL
def test_our_weights_give_our_outputs_there(case):
    model = case.build()
    layer = case.layer(model)
    _, before = case.asked(model)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(torch.randn_like(parameter))  # what was 0, for the library has no such bias, remains 0
    expected = {
        name
        for name in model.state_dict()
        for own in (*case.names.values(), *case.norms)
        if name.startswith(f"{case.prefix}{own}.")
    }
    assert case.write(layer, model) == expected
    x, y = case.asked(model)
    assert_close(layer(x, is_causal=case.causal), y, case.atol)
    assert not torch.allclose(before, y)


FUSED_MODELS = {name: case for name, case in MODELS.items() if "qkv" in case.names}


@pytest.mark.parametrize("case", FUSED_MODELS.values(), ids=FUSED_MODELS)
def test_the_dialect_of_a_fused_tensor_is_found(case):
    model = case.build()
    x, y = case.asked(model)
    errors = guess_dialect(
        model.state_dict(), case.heads, x, y, prefix=case.prefix, is_causal=case.causal, position=case.position
    )
    _, g, _ = case.heads
    same = {name for name in errors if g == 1 or DIALECTS[name].order == DIALECTS[case.dialect].order}
    assert case.dialect in same and all(errors[name] < 1e-10 for name in same)  # with one group all orders are one
    assert all(errors[name] > 0.01 for name in set(errors) - same)
    assert list(errors.values()) == sorted(errors.values())
    assert g == 1 or case.dialect == "conv1d" or len(errors) > len(same)  # and something wrong was tried


# Fewer heads


REAL = {  # the sizes of the published models, two layers of each; where the last product of a layer stands
    "GPT-2": (dict(n_layer=2), "h.{}.attn.", "c_proj"),
    "BERT": (dict(num_hidden_layers=2), "encoder.layer.{}.attention.", "output.dense"),
}


@pytest.mark.parametrize("name", REAL)
def test_a_pruned_layer_is_their_layer_that_reads_nothing_of_these_heads(name):
    "Transformers of today has no mask for heads: where its last product reads one that goes, its weight is 0 there."
    (config, prefix, last), case = REAL[name], MODELS[name]
    transformers = library("transformers")
    made = getattr(transformers, case.kind.replace("Model", "Config"))(**config)
    model = getattr(transformers, case.kind)(made).eval()
    fill(p for place, p in model.named_parameters() if place.endswith("bias"))
    for i, gone in enumerate([[0, 3, 4, 11], [*range(1, 12)]]):
        own = replace(case, heads=HeadLayout(12, 12, 64), prefix=prefix.format(i))
        layer = own.layer(model)
        small = prune_heads(layer, gone)
        assert small.layout == HeadLayout(12 - len(gone), 12 - len(gone), 64)
        weight = model.get_submodule(own.prefix + last).weight.data
        reads = weight if name == "GPT-2" else weight.T  # a Conv1D has a row for each number that it reads
        reads.unflatten(0, (12, 64))[gone] = 0
        x, y = own.asked(model.double())
        assert_close(small.double()(x, is_causal=case.causal), y)
        assert not torch.allclose(layer.double()(x, is_causal=case.causal), y, atol=0.01)
        x, plain = own.asked(model.float())
        exact = small(x.double(), is_causal=case.causal)
        assert_as_exact(small.float()(x, is_causal=case.causal), exact, plain)


def real_layer(name):
    "A model of theirs, where its first layer is, ours with its weights, and what its last product reads: h d e."
    (config, prefix, last), case = REAL[name], MODELS[name]
    transformers = library("transformers")
    made = getattr(transformers, case.kind.replace("Model", "Config"))(**config)
    model = getattr(transformers, case.kind)(made).eval().double()
    fill(p for place, p in model.named_parameters() if place.endswith("bias"))
    own = replace(case, heads=HeadLayout(12, 12, 64), prefix=prefix.format(0))
    product = model.get_submodule(own.prefix + last)
    reads = product.weight.data if name == "GPT-2" else product.weight.data.T
    return model, own, own.layer(model), reads.unflatten(0, (12, 64)), product.bias.data


@pytest.mark.parametrize("name", REAL)
def test_a_gated_layer_is_their_layer_that_reads_so_much_of_each_head(name):
    model, own, layer, reads, _ = real_layer(name)
    layer.finish = HeadGates(12, dtype=torch.float64)
    layer.finish.log_alpha.data = torch.tensor([-9.0, 9.0, 0.5] * 4, dtype=torch.float64)
    layer.eval()
    assert layer.finish.closed() == [0, 3, 6, 9]
    reads *= layer.finish.gates().detach()[:, None, None]
    x, y = own.asked(model)
    assert_close(layer(x, is_causal=own.causal), y)
    small = prune_gated(layer)
    assert small.layout == HeadLayout(8, 8, 64) and small.finish is None
    assert_close(small(x, is_causal=own.causal), y)


@pytest.mark.parametrize("name", REAL)
def test_a_mixture_is_the_sum_of_their_layers_that_read_one_head_each(name):
    model, own, layer, reads, bias = real_layer(name)
    layer.finish = MixtureOfHeads(768, 12, 7, num_shared=2, dtype=torch.float64)
    nn.init.normal_(layer.finish.router.weight)
    whole, mixed = reads.clone(), bias
    for i in range(12):
        reads.zero_()
        reads[i] = whole[i]
        torch.manual_seed(1)  # the same tokens each time
        x, y = own.asked(model)
        weights = layer.finish.route(x).weights
        mixed = mixed + weights[..., i : i + 1] * (y - bias)
    assert (weights > 0).sum(-1).unique().tolist() == [7]
    assert_close(layer(x, is_causal=own.causal), mixed)
    assert_close(skip_heads(layer, x, is_causal=own.causal), mixed)


def test_heads_may_differ_from_layer_to_layer_there():
    "As in Laguna; what a file then says of them, our layers are told one by one."
    transformers, counts = library("transformers"), [s.g, s.h, 2 * s.g]
    config = transformers.LagunaConfig(
        vocab_size=11,
        **sizes(24, num_hidden_layers=3, num_key_value_heads=s.g, head_dim=s.d),
        num_attention_heads_per_layer=counts,
        mlp_layer_types=["dense"] * 3,
    )
    layers = transformers.LagunaModel(config).layers
    assert [len(layer.self_attn.q_proj.weight) // s.d for layer in layers] == counts
    assert {len(layer.self_attn.k_proj.weight) // s.d for layer in layers} == {s.g}
    ours = [
        from_state_dict(
            layer.self_attn.state_dict(),
            HeadLayout(h, s.g, s.d),
            "separate",
            qk_norm=nn.RMSNorm,
            ignore=("g_proj",),  # of its output gate
        )
        for h, layer in zip(counts, layers)
    ]
    options = dict(num_kv_heads=s.g, head_dim=s.d, qk_norm=nn.RMSNorm, bias=ours[0].in_proj.bias is not None)
    fresh, state = (
        nn.ModuleList(MultiHeadAttention(24, s.h, **options) for _ in ours),
        nn.ModuleList(ours).state_dict(),
    )
    matched = match_heads(fresh, state)
    matched.load_state_dict(state)
    assert [layer.layout.num_heads for layer in matched] == counts
    x = torch.randn(s.b, s.n, 24)
    assert all(torch.equal(one(x), other(x)) for one, other in zip(matched, ours))


# Positions of Transformers


SCALED = {  # rope_type -> ours, their parameters, and how long the text is
    "linear": (RoPELinearScaling(8.0), dict(factor=8.0), None),
    "dynamic": (RoPENTKScaling(5.0), dict(factor=4.0), 4096),  # 4 · 4096 / 2048 - (4 - 1)
    "yarn": (RoPEYaRNScaling(4.0, 2048), dict(factor=4.0, original_max_position_embeddings=2048), None),
    "llama3": (
        RoPELlama3Scaling(8.0, 2048),
        dict(factor=8.0, original_max_position_embeddings=2048, low_freq_factor=1.0, high_freq_factor=4.0),
        None,
    ),
}


def llama_config(base, head_dim, **rope):
    return library("transformers").LlamaConfig(
        vocab_size=11,
        **sizes(
            4 * head_dim,
            num_attention_heads=4,
            head_dim=head_dim,
            max_position_embeddings=2048,
            rope_parameters={"rope_theta": base} | rope,
        ),
    )


@pytest.mark.parametrize("base, head_dim", [(10_000.0, 64), (500_000.0, 128), (100.0, 16)])
@pytest.mark.parametrize("kind", SCALED)
def test_frequencies_are_theirs(kind, base, head_dim):
    scaling, parameters, length = SCALED[kind]
    config = llama_config(base, head_dim, rope_type=kind, **parameters)
    function = library("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS[kind]
    theirs, magnitude = function(config, torch.device("cpu"), **{} if length is None else dict(seq_len=length))
    torch.testing.assert_close(scaling(head_dim, base), theirs.double(), rtol=2e-6, atol=0)
    assert magnitude == pytest.approx(getattr(scaling, "magnitude", 1.0))
    other = RoPELinearScaling(3.0)(head_dim, base)  # and another scaling is seen
    assert not torch.allclose(other, theirs.double(), rtol=1e-3)


def test_queries_and_keys_are_turned_as_theirs():
    llama = library("transformers.models.llama.modeling_llama")
    yarn, parameters, _ = SCALED["yarn"]
    config = llama_config(10_000.0, 64, rope_type="yarn", **parameters)
    q, k, places = torch.randn(2, 4, 9, 64), torch.randn(2, 2, 9, 64), torch.arange(3, 12).expand(2, -1)
    theirs = llama.apply_rotary_pos_emb(q, k, *llama.LlamaRotaryEmbedding(config)(q, places))
    rope = RoPE(64, frequencies=yarn, magnitude=yarn.magnitude)
    for ours, wanted, wrong in zip(rope(q, k, offset=3), theirs, RoPE(64, pairing="interleaved")(q, k, offset=3)):
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=0)
        assert not torch.allclose(wrong, wanted, atol=1e-2)


@pytest.mark.parametrize("width", [1.0, 0.5])
def test_their_tables_turn_as_they_turn(width):
    "Cosines and sines of any places, as they hand them from layer to layer; with a part of each head too."
    llama, phi = (library(f"transformers.models.{name}.modeling_{name}") for name in ("llama", "phi"))
    config = llama_config(10_000.0, 64, rope_type="default", partial_rotary_factor=width)
    q, k = torch.randn(2, 4, 9, 64), torch.randn(2, 2, 9, 64)
    places, turns = torch.randint(300, (2, 9)), int(64 * width)
    table = llama.LlamaRotaryEmbedding(config) if width == 1 else phi.PhiRotaryEmbedding(config)
    cos, sin = table(q, places)
    assert cos.shape == (2, 9, turns)
    wanted = [
        torch.cat([turned, t[..., turns:]], -1)
        for t, turned in zip((q, k), llama.apply_rotary_pos_emb(q[..., :turns], k[..., :turns], cos, sin))
    ]
    whole_cos, whole_sin = table(q, torch.arange(300)[None])
    for given in (
        dict(cos=cos, sin=sin),
        dict(cos=whole_cos[0], sin=whole_sin[0], position_ids=places),
        dict(cos=whole_cos[0, :, : turns // 2], sin=whole_sin[0, :, : turns // 2], position_ids=places),
    ):
        for ours, want in zip(rotate_by_tables(q, k, **given, rotary_dim=turns), wanted):
            torch.testing.assert_close(ours, want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("num_buckets, max_distance", [(32, 128), (16, 40)])
def test_buckets_are_those_of_t5(num_buckets, max_distance, bidirectional):
    t5 = library("transformers.models.t5.modeling_t5").T5Attention
    far = torch.arange(-400, 400)
    theirs = t5._relative_position_bucket(
        far, bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance
    )
    assert torch.equal(relative_buckets(far, num_buckets, max_distance, bidirectional), theirs)


@pytest.mark.parametrize("num_heads", [1, 6, 8, 12, 40])
def test_slopes_are_those_of_mpt(num_heads):
    theirs = library("transformers.models.mpt.modeling_mpt").build_mpt_alibi_tensor(num_heads, 5)[..., 0]
    torch.testing.assert_close(-4 * torch.tensor(alibi_slopes(num_heads)), theirs.flatten(), rtol=1e-6, atol=0)


# What the book says of published models, and their caches

CONFIGS = {
    "GPT-2": "GPT2Config",
    "Gemma 2 2B": "Gemma2Config",
    "Falcon-7B": "FalconConfig",
    "Llama 2 7B": "LlamaConfig",
    "Mistral 7B": "MistralConfig",
    "GPT-NeoX-20B": "GPTNeoXConfig",
    "gpt-oss-120b": "GptOssConfig",
    "DeepSeek-V3": "DeepseekV3Config",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_model_is_that_of_its_configuration(name):
    config, model = getattr(library("transformers"), CONFIGS[name])(), PUBLISHED[name]
    h = config.num_attention_heads
    g = 1 if getattr(config, "multi_query", False) else getattr(config, "num_key_value_heads", None) or h
    d = getattr(config, "head_dim", None) or config.hidden_size // h
    if name == "DeepSeek-V3":  # a latent, and a rotary part, for all heads
        g, d = 1, config.kv_lora_rank + config.qk_rope_head_dim
    kinds = getattr(config, "layer_types", None) or []
    rolling = (
        kinds.count("sliding_attention")
        if kinds
        else (config.num_hidden_layers if getattr(config, "sliding_window", None) else 0)
    )
    assert (model.num_layers, model.layout, model.rolling) == (config.num_hidden_layers, HeadLayout(h, g, d), rolling)
    assert model.window == (config.sliding_window if rolling else None)


def test_the_weights_of_llama_2_are_counted_right():
    config = library("transformers").LlamaConfig()
    assert (config.vocab_size, config.intermediate_size, config.hidden_size, config.num_hidden_layers) == (
        32_000,
        11_008,
        4096,
        32,
    )


def test_a_decoding_step_is_that_of_gpt_2_with_its_own_cache():
    library("transformers")
    for tokens in 1, 9:
        contest = next(suites.decode(suites.Setting(2, tokens, 48, 6, torch.device("cpu"), torch.float64)))
        assert not contest.absent
        with torch.no_grad():
            ours, *others = (call() for call in contest.calls.values())
            assert len(others) == 3
            for theirs in others:
                assert_close(theirs, ours)
            for call in contest.calls.values():  # and a step can be timed again
                assert torch.equal(call(), call())


@pytest.mark.parametrize("groups", [6, 3, 1])
def test_a_language_model_is_their_llama(groups):
    library("transformers")
    config = LanguageModelConfig(
        vocab_size=23,
        embed_dim=48,
        num_layers=3,
        num_heads=6,
        num_kv_heads=groups,
        head_dim=8,
        hidden_dim=14,
        max_len=40,
        rope_base=100.0,
        eps=1e-5,
    )
    model = LanguageModel(config)
    fill(model.parameters())
    theirs, ids = suites_language.llama(model.eval()), torch.randint(23, (2, 9))
    with torch.no_grad():
        wanted, got = theirs(ids).logits, model(ids)
        error = (got - wanted).abs().max() / wanted.abs().max()
        model.layers[1].attention.position = RoPE(8, 99.0)
        assert error < 1e-5 < (model(ids) - wanted).abs().max() / wanted.abs().max()  # their angles are float32


def test_smollm2_is_their_llama_and_says_the_same():
    library("transformers")
    model, tokenizer = load_smollm2()
    theirs, (ids, _) = suites_language.llama(model), encode(tokenizer, [hamlet("To be, or not to be")[:300]])
    with torch.no_grad():
        wanted, got = theirs(ids).logits, model(ids)
    assert (got - wanted).abs().max() < 5e-4 and wanted.abs().max() > 10
    said = torch.stack([*generate(model, ids[:, :9], 12)], dim=1)
    answered = theirs.generate(ids[:, :9], max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=2)
    assert torch.equal(answered[:, 9:], said)


# Keras and Flax


class Keras:
    "A layer of Keras, in float64, on torch."

    dialect = replace(
        DIALECTS["kernels"],
        names=DIALECTS["kernels"].names | {"o": "attention_output"},
        weight="{}/kernel",
        bias="{}/bias",
    )

    def __init__(self, heads, width, context_width, bias):
        keras = library("keras")
        if keras.backend.backend() != "torch":
            pytest.skip("needs KERAS_BACKEND=torch")
        h, g, d = heads
        options = dict(use_bias=bias, dtype="float64")
        self.layer = (
            keras.layers.MultiHeadAttention(h, d, **options)
            if h == g
            else keras.layers.GroupQueryAttention(d, h, g, **options)
        )
        self.layer.build((None, None, width), (None, None, context_width))
        self.weights = {weight.path.split("/", 1)[1]: weight for weight in self.layer.weights}
        self.load({name: random(*weight.shape) * 0.3 for name, weight in self.weights.items()})

    def state(self):
        return {name: weight.value.detach() for name, weight in self.weights.items()}

    def load(self, state):
        assert set(state) == set(self.weights)
        for name, weight in self.weights.items():
            weight.assign(state[name])

    def __call__(self, x, context, mask=None):
        "Keras's fused kernel would round float64 to float32; it is not used where the weights are asked for."
        return self.layer(x, context, attention_mask=mask, return_attention_scores=True)[0].detach()


class Flax:
    "A layer of Flax, in float64."

    dialect = DIALECTS["kernels"]

    def __init__(self, heads, width, context_width, bias):
        jax, linen = library("jax"), library("flax.linen")
        jax.config.update("jax_enable_x64", True)
        h, _, d = heads
        self.numpy, self.util = jax.numpy, library("flax.traverse_util")
        self.layer = linen.MultiHeadDotProductAttention(
            h, qkv_features=h * d, use_bias=bias, param_dtype=jax.numpy.float64
        )
        shapes = (jax.numpy.zeros((1, 1, size)) for size in (width, context_width))
        params = self.util.flatten_dict(self.layer.init(jax.random.key(0), *shapes)["params"], sep=".")
        self.load({name: random(*array.shape) * 0.3 for name, array in params.items()})

    def state(self):
        return {name: torch.tensor(array.tolist(), dtype=torch.float64) for name, array in self.params.items()}

    def load(self, state):
        self.params = {name: self.numpy.asarray(tensor.numpy()) for name, tensor in state.items()}

    def __call__(self, x, context, mask=None):
        arrays = [self.numpy.asarray(t.numpy()) for t in (x, context)]
        mask = None if mask is None else self.numpy.asarray(mask.numpy())
        params = {"params": self.util.unflatten_dict(self.params, sep=".")}
        return torch.tensor(self.layer.apply(params, *arrays, mask=mask).tolist(), dtype=torch.float64)


LAYERS = pytest.mark.parametrize(
    "kind, heads", [(Keras, EQUAL), (Keras, GROUPED), (Flax, EQUAL)], ids=["Keras", "Keras-grouped", "Flax"]
)


@LAYERS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [s.e, 11])
def test_kernels_are_read_and_written(kind, heads, width, bias):
    theirs = kind(heads, s.e, width, bias)
    x, context = random(s.b, s.n, s.e), random(s.b, s.m, width)
    layer = from_state_dict(theirs.state(), heads, "kernels")
    assert_close(layer(x, context), theirs(x, context))
    fill(layer.parameters())
    own = "stacked" if width == s.e else Dialect(dict(q="in_proj", kv="context_proj", o="out_proj"))
    theirs.load(convert_weights(layer.state_dict(), own, kind.dialect, heads))
    assert_close(layer(x, context), theirs(x, context))


# Masks


def ask_kernel(call):
    "What a function answers to its own mask, and what ours answers to ours."

    def ask(mask, theirs, m):
        q, k, v = random(s.b, s.h, s.n, s.d), random(s.b, s.g, m, s.d), random(s.b, s.g, m, s.d)
        return call(q, k, v, theirs), plain_attention(q, k, v, mask=mask)

    return ask


def sdpa(q, k, v, mask, **options):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True, **options)


def onnx(q, k, v, mask, **options):
    return torch.onnx.ops.attention(q, k, v, mask, **options)[0]


def ask_layer(kind):
    "The same for a layer of Keras or Flax."

    def ask(mask, theirs, m):
        layer = kind(EQUAL, s.e, s.e, True)
        x, context = random(s.b, s.n, s.e), random(s.b, m, s.e)
        return layer(x, context, theirs), from_state_dict(layer.state(), EQUAL, "kernels")(x, context, mask=mask)

    return ask


def ask_torch(name):
    "The same for torch's layer, which takes its mask under this name."

    def ask(mask, theirs, m):
        layer = torch.nn.MultiheadAttention(WIDE, s.h, batch_first=True, dtype=torch.float64)
        fill(layer.parameters())
        x, context = random(s.b, s.n, WIDE), random(s.b, m, WIDE)
        return layer(x, context, context, **{name: theirs})[0], from_torch(layer)(x, context, mask=mask)

    return ask


def ask_transformers(implementation):
    "The same for a whole BERT, of which its first attention is asked."

    def ask(mask, theirs, m):
        case = MODELS["BERT"]
        model = case.build(attn_implementation=implementation)
        x, y = case.asked(model, attention_mask=theirs)
        return y, case.layer(model)(x, mask=mask)

    return ask


ASK = {
    "sdpa": ask_kernel(sdpa),
    "sdpa_added": ask_kernel(sdpa),
    "torch_added": ask_torch("attn_mask"),
    "onnx": ask_kernel(onnx),
    "keras": ask_layer(Keras),
    "flax": ask_layer(Flax),
    "torch": ask_torch("attn_mask"),
    "torch_padding": ask_torch("key_padding_mask"),
    "transformers_eager": ask_transformers("eager"),
    "transformers_sdpa": ask_transformers("sdpa"),
    "transformers_padding": ask_transformers("sdpa"),
}
KINDS = {"one for all": "n m", "per head": "h n m", "per sentence": "b 1 n m", "both": "b h n m", "padding": "b 1 1 m"}


def mask_of(axes, m, share=0.5):
    "A random mask of this book; every query sees the first key at least."
    mask = torch.rand([{"b": s.b, "h": s.h, "n": s.n, "m": m, "1": 1}[axis] for axis in axes.split()]) < share
    mask[..., 0] = True
    return mask


@pytest.mark.parametrize(
    "kind, dialect",
    [(kind, dialect) for kind in KINDS for dialect in ASK if kind == "padding" or "padding" not in dialect],
)
def test_a_converted_mask_says_the_same_there(kind, dialect):
    m = s.n if "transformers" in dialect else s.m
    mask = mask_of(KINDS[kind], m)
    other = mask & mask_of(KINDS[kind], m)
    theirs, others = (
        convert_mask(one, "mha_book", dialect, (s.b, s.h, s.n, m), dtype=torch.float64) for one in (mask, other)
    )
    assert_close(*ASK[dialect](mask, theirs, m))
    with pytest.raises(AssertionError):  # and another mask does not
        assert_close(*ASK[dialect](mask, others, m))


def test_every_library_is_asked():
    assert set(ASK) == set(MASK_DIALECTS) - {"mha_book", "mha_book_padding"}


@pytest.mark.parametrize("dialect", ["sdpa", "onnx", "keras", "flax", "torch"])
def test_causality_travels_as_a_mask(dialect):
    causal = causal_mask(s.n, s.m)  # aligned at the end, as everywhere here
    both = causal & mask_of("b 1 n m", s.m, 0.9)
    for mask in (causal, both):
        assert_close(*ASK[dialect](mask, convert_mask(mask, "mha_book", dialect, (s.b, s.h, s.n, s.m)), s.m))


@pytest.mark.parametrize("call", [sdpa, onnx])
def test_their_own_causality_begins_at_the_first_key(call):
    for m in (s.n, s.m):
        q, k, v = random(s.b, s.h, s.n, s.d), random(s.b, s.h, m, s.d), random(s.b, s.h, m, s.d)
        got = call(q, k, v, None, is_causal=True)
        assert_close(got, plain_attention(q, k, v, mask=torch.ones(s.n, m, dtype=torch.bool).tril()))
        assert torch.allclose(got, plain_attention(q, k, v, is_causal=True)) == (m == s.n)


def random_rows(*shape):
    "A mask of three axes, read in any way that its sizes allow."
    mask = torch.rand(shape) < 0.5
    mask[..., 0] = True
    return mask


@pytest.mark.parametrize("call, dialect", [(sdpa, "sdpa"), (onnx, "onnx")])
def test_three_axes_mean_heads_to_a_kernel(call, dialect):
    mask, shape = random_rows(4, s.n, s.m), (4, 4, s.n, s.m)
    q, k, v = random(4, 4, s.n, s.d), random(4, 4, s.m, s.d), random(4, 4, s.m, s.d)
    assert_close(call(q, k, v, mask), plain_attention(q, k, v, mask=mask[None]))
    assert torch.equal(convert_mask(mask, dialect, "mha_book", shape), mask[None].expand(shape))
    assert not torch.allclose(call(q, k, v, mask), plain_attention(q, k, v, mask=mask[:, None]))


@pytest.mark.parametrize("kind, dialect, place", [(Keras, "keras", 1), (Flax, "flax", 0)])
def test_three_axes_mean_sentences_to_keras_and_heads_to_flax(kind, dialect, place):
    mask, shape, heads = random_rows(4, s.n, s.m), (4, 4, s.n, s.m), HeadLayout(4, 4, s.d)
    theirs, x, context = kind(heads, s.e, s.e, True), random(4, s.n, s.e), random(4, s.m, s.e)
    ours = from_state_dict(theirs.state(), heads, "kernels")
    right, wrong = mask.unsqueeze(place), mask.unsqueeze(1 - place)
    assert_close(theirs(x, context, mask), ours(x, context, mask=right))
    assert torch.equal(convert_mask(mask, dialect, "mha_book", shape), right.expand(shape))
    assert not torch.allclose(theirs(x, context, mask), ours(x, context, mask=wrong))


def test_three_axes_mean_both_to_torchs_layer():
    mask = random_rows(4, s.n, s.m)  # two sentences of two heads each
    layer = torch.nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    x, context = random(2, s.n, 8), random(2, s.m, 8)
    pairs = torch.stack([torch.stack([mask[2 * i + a] for a in range(2)]) for i in range(2)])
    assert_close(layer(x, context, context, attn_mask=~mask)[0], from_torch(layer)(x, context, mask=pairs))
    assert torch.equal(convert_mask(~mask, "torch", "flax", (2, 2, s.n, s.m)), pairs)


@pytest.mark.parametrize("implementation, wrong", [("eager", "transformers_sdpa"), ("sdpa", "torch_padding")])
def test_a_mask_in_another_models_words_is_no_mask(implementation, wrong):
    shape, mask = (s.b, s.h, s.n, s.n), mask_of("b 1 1 m", s.n)
    theirs = convert_mask(mask, "mha_book", wrong, shape)
    theirs = theirs if implementation == "eager" else theirs.long()  # True is added as 1, or 1 is a real token
    got, wanted = ask_transformers(implementation)(mask, theirs, s.n)
    assert not torch.allclose(got, wanted)


# Talking heads of x-transformers

# when it is imported it calls a function that torch deprecates
scripted = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def talked_as_theirs(theirs, num_heads=s.h):
    "A plug with the numbers of their `Attend`: it adds the mixed logits to the logits, and replaces the weights."
    before, after = theirs.pre_softmax_talking_heads, theirs.post_softmax_talking_heads
    plug = TalkingHeads(num_heads, logits=before is not None, weights=after is not None, dtype=torch.float64)
    with torch.no_grad():
        if before is not None:
            plug.logit_mixing.add_(before.weight[:, :, 0, 0])  # ours begins as the identity
        if after is not None:
            plug.weight_mixing.copy_(after.weight[:, :, 0, 0])
    return plug


def talking_of_theirs(**options):
    "Random mixtures; with qk_norm their softmax is in the dtype of the logits, and otherwise in float32."
    made = library("x_transformers.attend").Attend(heads=s.h, qk_norm=True, **options).double()
    fill(made.parameters())
    return made


@scripted
@pytest.mark.parametrize("which", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("causal", [False, True])
def test_talking_heads_are_those_of_x_transformers(which, causal):
    theirs = talking_of_theirs(pre_talking_heads=which[0], post_talking_heads=which[1], causal=causal)
    plug = talked_as_theirs(theirs)
    q, k, v = random(s.b, s.h, s.n, s.d), random(s.b, s.h, s.m, s.d), random(s.b, s.h, s.m, s.dv)
    mask, bias = random_rows(s.b, 1, 1, s.m), random(s.h, s.n, s.m)
    wanted, _ = theirs(q, k, v, mask=mask, attn_bias=bias)
    options = dict(mask=mask, bias=bias, is_causal=causal)
    assert_close(plug(q, k, v, **options), wanted)
    assert_close(talk_through_kernel(q, k, v, plug.logit_mixing, plug.weight_mixing, **options), wanted)


@scripted
def test_talking_heads_of_x_transformers_begin_at_twice_the_logits():
    theirs = library("x_transformers.attend").Attend(heads=s.h, qk_norm=True, pre_talking_heads=True).double()
    q, k, v = random(s.b, s.h, s.n, s.d), random(s.b, s.h, s.m, s.d), random(s.b, s.h, s.m, s.d)
    assert_close(theirs(q, k, v)[0], plain_attention(q, k, v, scale=2 * s.d**-0.5))
    assert torch.equal(TalkingHeads(s.h)(q, k, v), plain_attention(q, k, v))


@scripted
@pytest.mark.parametrize("which", [(True, True), (True, False), (False, True)])
def test_a_layer_of_x_transformers_whose_heads_talk_comes_in(which):
    theirs = (
        library("x_transformers.x_transformers")
        .Attention(WIDE, heads=s.h, dim_head=s.d, causal=True, pre_talking_heads=which[0], post_talking_heads=which[1])
        .double()
    )
    fill(theirs.parameters())
    state = {name: t for name, t in theirs.state_dict().items() if name.startswith("to_")}
    own = Dialect(dict(q="to_q", k="to_k", v="to_v", o="to_out"))
    ours = from_state_dict(state, EQUAL, own, attend=talked_as_theirs(theirs.attend))
    x, real = random(s.b, s.n, WIDE), mask_of("b m", s.n)
    # their softmax is in float32, and they give 0 for padding
    assert_close(ours(x, is_causal=True, key_mask=real)[real], theirs(x, mask=real)[real], atol=1e-5)


# Heads that are subtracted, and weights without a sum


def turned_as_there(q, k, *, offset):
    "Rotary positions after `offset` tokens, for all rows or for each; angles in float32."
    frequencies = 1.0 / 10_000.0 ** (torch.arange(0, s.d, 2).float() / s.d)
    places = torch.as_tensor(offset).view(-1, 1) + torch.arange(q.shape[2])
    angles = (places.float()[..., None] * frequencies).repeat(1, 1, 2)[:, None]
    halves = [torch.cat([-second, first], -1) for first, second in (t.chunk(2, -1) for t in (q, k))]
    return tuple(t * angles.cos().double() + half * angles.sin().double() for t, half in zip((q, k), halves))


class Differential:
    "The attention of Transformers' DiffLlama and this book's layer with its weights, in float64."

    def __init__(self, num_heads, num_kv_heads, index):
        library("transformers").logging.set_verbosity_error()
        theirs = importlib.import_module("transformers.models.diffllama.modeling_diffllama")
        self.config = theirs.DiffLlamaConfig(
            hidden_size=s.e, num_attention_heads=num_heads, num_key_value_heads=num_kv_heads, head_dim=s.d
        )
        self.config._attn_implementation = "sdpa"  # their eager one takes its softmax in float32
        self.module = theirs.DiffLlamaAttention(self.config, index).double().eval()
        fill(self.module.parameters())
        for q, k in ((self.module.lambda_q1, self.module.lambda_k1), (self.module.lambda_q2, self.module.lambda_k2)):
            place, dot = torch.randint(s.d, ()).item(), next(exact_exponents)
            with torch.no_grad():  # a sum that float32 has, in which they take their exponential
                k.mul_(torch.arange(s.d) == place), k[place].fill_(1.0), q[place].fill_(dot)
        self.layer = self.carried(HeadLayout(num_heads, num_kv_heads, s.d), index)

    def carried(self, heads, index):
        plug = DifferentialAttention(heads.num_heads, s.d, index, dtype=torch.float64)
        names = {f"attend.{n}" if n.startswith("lambda") else n: t for n, t in self.module.state_dict().items()}
        return from_state_dict(names, heads, "separate", position=turned_as_there, attend=plug).eval()

    def __call__(self, x, mask=None):
        "Their output; their mask is added to the logits."
        seen = causal_mask(x.shape[1], x.shape[1]) if mask is None else mask
        added = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)
        added = added[(None,) * (4 - added.dim())].expand(len(x), 1, -1, -1)
        frequencies = 1.0 / 10_000.0 ** (torch.arange(0, s.d, 2).float() / s.d)
        angles = torch.arange(x.shape[1]).float()[:, None] * frequencies
        tables = [table.double().repeat(1, 2)[None] for table in (angles.cos(), angles.sin())]
        return self.module(x, position_embeddings=tables, attention_mask=added)[0]


def numbers_with_exact_exponents():
    "Numbers of float32 whose exponential, taken there, is that of float64 to 1e-11."
    near = torch.linspace(-0.9, 0.9, 400_001, dtype=torch.float32)
    error = (near.exp().double() - near.double().exp()).abs()
    yield from near[error.argsort()[:30]][torch.randperm(30)].tolist()


exact_exponents = numbers_with_exact_exponents()


@pytest.mark.parametrize("num_heads, num_kv_heads, index", [(6, 6, 0), (8, 4, 3), (12, 2, 17), (4, 2, 1)])
def test_differential_attention_is_that_of_diffllama(num_heads, num_kv_heads, index):
    theirs, x = Differential(num_heads, num_kv_heads, index), random(s.b, s.m, s.e)
    layer = theirs.layer
    assert abs(layer.attend.factor() - layer.attend.lambda_init) > 1e-3
    assert_close(layer(x, is_causal=True), theirs(x))
    mask = torch.rand(s.b, 1, s.m, s.m) < 0.6
    mask[..., 0] = True
    assert_close(layer(x, mask=mask), theirs(x, mask))
    cache = KVCache(s.b, num_kv_heads, s.m, s.d, dtype=torch.float64)
    with torch.no_grad():
        parts = [layer(part, is_causal=True, cache=cache) for part in x.split([3, 1, 2, 1], 1)]
        assert_close(torch.cat(parts, 1), theirs(x))
        layer.position = RoPE(s.d)  # the book's own, whose angles are not rounded
        assert_close(layer(x, is_causal=True), theirs(x), atol=1e-6)


def test_the_factor_of_diffllama_is_theirs_to_float32_and_begins_as_theirs():
    theirs = Differential(4, 2, 5)
    fill(theirs.module.parameters())
    layer, x = theirs.carried(HeadLayout(4, 2, s.d), 5), random(s.b, s.m, s.e)
    assert_close(layer(x, is_causal=True), theirs(x), atol=1e-5)
    assert layer.attend.lambda_init == theirs.module.lambda_init and layer.attend.eps == theirs.module.groupnorm.eps
    with pytest.raises(AssertionError):
        wrong = DifferentialAttention(4, s.d, 6, dtype=torch.float64)
        wrong.load_state_dict(layer.attend.state_dict())
        layer.attend = wrong
        assert_close(layer(x, is_causal=True), theirs(x), atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by what it imports
@pytest.mark.parametrize("causal", [False, True])
def test_sigmoid_attention_without_a_bias_is_that_of_x_transformers(causal):
    theirs = library("x_transformers.attend").Attend(sigmoid=True, causal=causal, heads=s.h).eval()
    q, k, v = (random(s.b, s.h, n, s.d) for n in (s.n, s.m, s.m))
    assert_close(SigmoidAttention(bias=0.0)(q, k, v, is_causal=causal), theirs(q, k, v)[0])
    assert not torch.allclose(SigmoidAttention()(q, k, v, is_causal=causal), theirs(q, k, v)[0], atol=1e-3)
