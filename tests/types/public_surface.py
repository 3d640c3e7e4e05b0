"""Every public name, as a type checker sees it: plugs fit their sockets, and calls give what they say."""

from functools import partial

import torch
from torch import Tensor, nn

import mha_book
from mha_book import (
    ALiBi,
    Attend,
    BlockPool,
    Cache,
    ComposedHeads,
    ContextCache,
    Dialect,
    Finish,
    HeadLayout,
    HeadPrecision,
    HeadTemperature,
    InterleavedHeads,
    KVCache,
    LearnedPositions,
    MixedPrecision,
    MixtureOfHeads,
    MultiHeadAttention,
    MultiTokenAttention,
    OutputGate,
    PagedCache,
    Position,
    QuantizedKVCache,
    RelativeBias,
    RoPE,
    RoPELinearScaling,
    RoPELlama3Scaling,
    RoPENTKScaling,
    RoPEYaRNScaling,
    RotatedPosition,
    SinkAttention,
    TalkingHeads,
)

# into the sockets
attends: list[Attend] = [
    mha_book.fused_attend,
    mha_book.folded_attend,
    mha_book.attention,
    HeadTemperature(4),
    SinkAttention(4),
    MultiTokenAttention(4, queries=2, keys=3, group=2, window=9),
    InterleavedHeads(4, 2, num_kv_heads=2, window=8, attend=SinkAttention(8)),
    RelativeBias(4),
    ALiBi(4),
    mha_book.ExtraKeys(4, 8),
    MixedPrecision(HeadPrecision.uniform(4, "int4")),
    TalkingHeads(4, weights=False, window=(3, None), scale=0.5),
    TalkingHeads(4, attend=partial(mha_book.attention, window=4)),
    mha_book.DifferentialAttention(4, 16, 0),
    mha_book.SigmoidAttention(bias=-3.0, window=(5, 0)),
]
scalings = (RoPELinearScaling(2.0), RoPENTKScaling(2.0), RoPEYaRNScaling(2.0, 64), RoPELlama3Scaling(2.0, 64))
tables = partial(mha_book.rotate_by_tables, cos=torch.ones(9, 8), sin=torch.ones(9, 8))
positions: list[Position] = [RoPE(16), tables, *(RoPE(16, frequencies=scaling) for scaling in scalings)]
positions.append(RotatedPosition(RoPE(16), mha_book.hadamard(16)))
finishes: list[Finish] = [OutputGate(64, 4)]
finishes.append(MixtureOfHeads(64, 4, 3, num_shared=1, finish=OutputGate(64, 4)))
finishes.append(mha_book.HeadGates(4, start=1, finish=finishes[0]))
pool = BlockPool(8, 4, 4, 16)
rounded = mha_book.HeadPrecision.uniform(4, "int4", "int3", group=32, exact_first=1)
quantized = QuantizedKVCache(2, rounded, 32, 16)
held_bytes: bool = quantized.nbytes == 2 * mha_book.promised_bytes(rounded, 0, 16)
caches: list[Cache] = [KVCache(2, 4, 32, 16), PagedCache(pool, 2), ContextCache(), quantized]

# the layer
layout = HeadLayout(4, 2, 16)
layer = MultiHeadAttention(64, 4, num_kv_heads=2, finish=finishes[0], attend=attends[0], position=positions[0])
x = torch.randn(2, 8, 64)
q, k, v = layer.qkv(x)
projection, rows = layer.rows("k", 1)
weight: Tensor = projection.weight[rows]
with mha_book.commit_once(*caches):
    y: Tensor = layer(x, cache=caches[0])
wide: MultiHeadAttention = mha_book.pad_heads(MultiHeadAttention(64, 4), 6)
narrow: MultiHeadAttention = mha_book.prune_heads(MultiHeadAttention(64, 4), [1, 3], means=torch.zeros(4, 16))
smaller: nn.Module = mha_book.prune_model(nn.Sequential(narrow), {"0": range(1)}, means={"0": torch.zeros(2, 16)})
to_go: dict[str, tuple[int, ...]] = mha_book.least_heads({"0": torch.rand(2)}, 1)
smaller = mha_book.prune_model(nn.Sequential(narrow), to_go)
gates: dict[str, mha_book.HeadGates] = mha_book.add_gates(smaller, start=1.5)
open_heads: Tensor = mha_book.open_price(smaller) + gates["0"].expected_open() + gates["0"].draw(2).sum()
ungated: nn.Module = mha_book.prune_gated(smaller)
knocking: MultiHeadAttention = mha_book.mix_kv_heads_(mha_book.knock_heads_(MultiHeadAttention(64, 4), "v"), "k")
knocks: dict[str, nn.Parameter] = mha_book.mixing_matrices(knocking)
unmixed: MultiHeadAttention = mha_book.mix_output_heads(mha_book.fold_mixing(knocking), torch.eye(4))
knock: Tensor = mha_book.MixedHeads(layout, "q", "channels")(torch.zeros(128, 64))
shared_keys: mha_book.CollaborativeHeads = mha_book.collaborate(
    MultiHeadAttention(64, 4), 32, tokens=torch.randn(9, 64), steps=2
)
shared_cache: KVCache = shared_keys.new_cache(2, 32, window=8)
with_shared: Tensor = mha_book.CollaborativeHeads(64, 4, 24, num_kv_heads=2)(x, is_causal=True)
matched: nn.Module = mha_book.match_heads(nn.Sequential(narrow), smaller.state_dict())
in_pairs: mha_book.DifferentialHeads = mha_book.pair_heads(MultiHeadAttention(64, 4))
finishes.append(mha_book.SubtractHeads(64, 4, finish=finishes[0]))
subtracted: Tensor = mha_book.DifferentialHeads(64, 4, num_kv_heads=2)(x) + in_pairs.attention_map(x).sum()
apart: MultiHeadAttention = mha_book.separate_projections(layer)
stacked: MultiHeadAttention = mha_book.stack_projections(apart)
latent = MultiHeadAttention(64, 4, head_dim=24, value_dim=16)
from_three: Tensor = latent(x, x, value=x)
below, above = mha_book.nearest_head_counts(64, 3)
merged: Tensor = mha_book.merge_heads(mha_book.split_heads(x, 4))
head: Tensor = mha_book.AttentionHead(64, 16)(x)
listed: Tensor = mha_book.HeadList(64, 4, 16)(x)

# functions
out: Tensor = mha_book.attention(q, k, v, window=(3, None), softcap=30.0, impl=mha_book.implementations()[0])
maps: Tensor = mha_book.attention_weights(q, k)
logits: Tensor = mha_book.attention_logits(q, k)
part, lse = mha_book.attention_with_lse(q, k, v)
whole = mha_book.merge_attention([part], [lse])
masks: list[Tensor] = [mha_book.causal_mask(2, 3), mha_book.window_mask(2, 3, 2)]
places: Tensor = mha_book.sinusoidal_positions(torch.arange(4), 16)
learned = LearnedPositions(8, 64)
charge: Tensor = mha_book.z_loss(lse)
factors: Tensor = mha_book.qk_clip_(layer, mha_book.largest_logits(layer, x), 100.0)

# weights and masks of others
names: list[str] = list(mha_book.DIALECTS)
state: dict[str, Tensor] = dict(layer.named_parameters())
dialect: Dialect = mha_book.DIALECTS["stacked"]
converted: dict[str, Tensor] = mha_book.convert_weights(state, dialect, "separate", layout)
loaded: MultiHeadAttention = mha_book.from_state_dict(state, layout)
theirs: nn.MultiheadAttention = mha_book.to_torch(mha_book.from_torch(nn.MultiheadAttention(64, 4)))
fitting = mha_book.fitting_dialects(state, layout)
guess = mha_book.guess_dialect
mask = mha_book.convert_mask
turned: list[MultiHeadAttention] = [
    mha_book.repeat_kv_heads(layer, 4),
    mha_book.mean_kv_heads(layer, 1),
    mha_book.rotate_kv_heads(layer),
    mha_book.align_kv_heads(layer, 1),
    mha_book.permute_heads(layer, [1, 0]),
    mha_book.rotate_heads(layer, values=mha_book.hadamard(16)),
]
precision: HeadPrecision = mha_book.sort_heads(layer, HeadPrecision.uniform(2, "int4"))[1]
as_json: str = mha_book.precisions_to_json({"": precision})
with mha_book.use_precision(layer, mha_book.precisions_from_json(as_json, layer)):
    y = layer(x)

# look at it, measure it
report = mha_book.gradient_report(layer, lambda: layer(x).sum())
statistics = mha_book.head_statistics(q, k)
errors = mha_book.error_report(mha_book.fused_attend, q, k, v)
told = mha_book.explain_dispatch(q, k, v)
device: torch.device = mha_book.pick_device("cpu")
timings = mha_book.benchmark({"layer": lambda: layer(x)})
held: int = mha_book.peak_bytes(lambda: layer(x))
size: int = mha_book.cache_bytes(12, 4, 16, 1024)

# fewer bits
policy: HeadPrecision = HeadPrecision.uniform(2, "int4", torch.bfloat16, group=32)
mixed = HeadPrecision(["int4", torch.float16], ("int2", "int8"), exact_first=1).permuted([1, 0])
stored: float = mixed.bits(16)
codes = mha_book.quantize(k, 4, -1)
again: Tensor = mha_book.dequantize(codes, k.dtype)
coarse: list[Tensor] = [mha_book.round_keys(k, "int4", 2), mha_book.round_values(v, torch.float16)]

# which heads need bits
measured: mha_book.Sensitivity = mha_book.head_sensitivity(layer, [(x,)], ["int4", torch.bfloat16], group=4)
precisions = mha_book.allocate_precision(measured, 12.0)
sum_of_effects: list[float] = [measured.predict(precisions), mha_book.allocation_bound(measured, 12.0)]
together: float = mha_book.joint_effect(layer, [(x,)], precisions)

# what a head is worth
worth: dict[str, Tensor] = mha_book.head_importance(layer, [(x,)])
worth = mha_book.ablation_effects(layer, [(x,)], means=mha_book.head_means(layer, [(x,)]))
gone: dict[str, tuple[int, ...]] = mha_book.least_heads(worth, 1)
scaling: Finish = mha_book.ScaledHeads(torch.ones(4))
with mha_book.without_heads(layer, gone), mha_book.scaled_heads(layer, {"": torch.ones(4)}):
    y = layer(x)
# fewer heads: a few for each token
routes: mha_book.Routes = MixtureOfHeads(64, 4, 2).route(x)
balance: Tensor = mha_book.balance_loss(routes, torch.ones(2, 8, dtype=torch.bool))
with mha_book.recorded_routes(layer) as recorded:
    y = layer(x)
per_plug: dict[str, list[mha_book.Routes]] = recorded
skipped: Tensor = mha_book.skip_heads(layer, x, is_causal=True)
# a number of heads that adapts to the input
controller = mha_book.HeadBudget(3, 2, hidden_dim=8).fit(torch.randn(5, 3))
expected: Tensor = mha_book.budget_loss(controller(x[:, 0, :3]), torch.rand(2, 2), torch.rand(2), 0.1)
ways = mha_book.AdaptiveHeads(nn.Sequential(layer), [{}, {"0": (1,)}], controller, lambda model, x: x[:, 0, :3])
found: mha_book.Budgeted = ways(x, levels=ways.choose(x))
given: list[Tensor] = [found.output, found.levels, found.num_heads]
more: int = ways.extra_bytes
composing: MultiHeadAttention = ComposedHeads(64, 4, rank=1, from_keys=False, window=9)
width_of_kept_keys: int = ComposedHeads(64, 4).key_dim
# heads that talk
talked: Tensor = mha_book.talk_through_kernel(q, k, v, torch.eye(4), None, attend=mha_book.fused_attend, is_causal=True)
mixed_maps: Tensor = mha_book.mix_heads(maps, torch.ones(2, 4))
