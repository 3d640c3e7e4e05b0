"""Weights in other dialects: every number's place is written out by hand, and what does not fit is refused."""

import copy
import itertools
import warnings
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mha_book import HeadLayout, MultiHeadAttention
from mha_book.heads.dialects import (
    DIALECTS,
    Dialect,
    convert_weights,
    from_state_dict,
    interleave_pairs,
)
from mha_book.heads.head_counts import separate_projections
from mha_book.heads.masks import from_torch, to_torch
from mha_book.heads.single_head import plain_attention
from mha_book.heads.which_dialect import fitting_dialects, guess_dialect
from mha_book.instruments.testing import SIZES
from mha_book.plugs.logits import SinkAttention
from mha_book.plugs.rope import RoPE
from support.refusals import refused

settings.register_profile("book", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("book")
s = SIZES
BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
GROUPED, EQUAL = HeadLayout(s.h, s.g, s.d), HeadLayout(s.h, s.h, s.d)


# Where each dialect keeps the number of row r in head i of a part that multiplies input c; heads are (h, g, d)


def row(part, i, r, h, g, d):
    "All q, all k, all v, one head after the other."
    return ({"q": 0, "k": h, "v": h + g}[part] + i) * d + r


def grouped_row(part, i, r, h, g, d):
    "Group by group: its queries, its key, its value."
    size = h // g
    group, slot = (i // size, i % size) if part == "q" else (i, {"k": size, "v": size + 1}[part])
    return (group * (size + 2) + slot) * d + r


def paired(r, width):
    "Where row r of a head stands when the rows r and r + width/2 are neighbours."
    return r if r >= width else 2 * r if r < width // 2 else 2 * (r - width // 2) + 1


PLACES = {
    "separate": lambda p, i, r, c, h, g, d: (f"{p}_proj.weight", (i * d + r, c)),
    "stacked": lambda p, i, r, c, h, g, d: ("in_proj.weight", (row(p, i, r, h, g, d), c)),
    "interleaved": lambda p, i, r, c, h, g, d: ("query_key_value.weight", ((i * 3 + "qkv".index(p)) * d + r, c)),
    "grouped": lambda p, i, r, c, h, g, d: ("linear_qkv.weight", (grouped_row(p, i, r, h, g, d), c)),
    "per_head": lambda p, i, r, c, h, g, d: (f"W_{p.upper()}", (i, c, r)),
    "conv1d": lambda p, i, r, c, h, g, d: ("c_attn.weight", (c, row(p, i, r, h, g, d))),
    "kernels": lambda p, i, r, c, h, g, d: ({"q": "query", "k": "key", "v": "value"}[p] + ".kernel", (c, i, r)),
    "packed_kv": lambda p, i, r, c, h, g, d: (
        ("Wq.weight", (i * d + r, c)) if p == "q" else ("Wkv.weight", (("kv".index(p) * g + i) * d + r, c))
    ),
    "multi_query": lambda p, i, r, c, h, g, d: ("query_key_value.weight", (row(p, i, r, h, g, d), c)),
    "gguf": lambda p, i, r, c, h, g, d: (f"attn_{p}.weight", (i * d + (r if p == "v" else paired(r, d)), c)),
}
OUTPUTS = {
    "separate": lambda i, r, c, d: ("out_proj.weight", (c, i * d + r)),
    "stacked": lambda i, r, c, d: ("out_proj.weight", (c, i * d + r)),
    "interleaved": lambda i, r, c, d: ("dense.weight", (c, i * d + r)),
    "grouped": lambda i, r, c, d: ("linear_proj.weight", (c, i * d + r)),
    "per_head": lambda i, r, c, d: ("W_O", (i, r, c)),
    "conv1d": lambda i, r, c, d: ("c_proj.weight", (i * d + r, c)),
    "kernels": lambda i, r, c, d: ("out.kernel", (i, r, c)),
    "packed_kv": lambda i, r, c, d: ("out_proj.weight", (c, i * d + r)),
    "multi_query": lambda i, r, c, d: ("dense.weight", (c, i * d + r)),
    "gguf": lambda i, r, c, d: ("attn_output.weight", (c, i * d + r)),
}


def place(dialect, heads, part, i, r, c):
    "Name and index of a number; without an input (c is None) of a bias."
    name, index = OUTPUTS[dialect](i, r, c, heads.head_dim) if part == "o" else PLACES[dialect](part, i, r, c, *heads)
    if c is None:
        name = name.replace("W_", "b_").replace("weight", "bias").replace("kernel", "bias")
    return name, tuple(axis for axis in index if axis is not None)


@dataclass
class Numbers:
    "The numbers of one layer as bits, part by part: weights h d e, biases h d, the output's h d e and e."

    heads: HeadLayout
    dtype: torch.dtype
    weights: dict
    biases: dict

    @classmethod
    def random(cls, heads, widths, biases="qkvo", dtype=torch.float32):
        "`widths` are what q, k and v read and what the output writes; `biases` are the parts that have one."
        h, g, d = heads
        counts, ends = dict(q=h, k=g, v=g, o=h), torch.iinfo(BITS[dtype])

        def bits(*shape):
            return torch.randint(ends.min, ends.max, shape, dtype=BITS[dtype]).numpy()

        return cls(
            heads,
            dtype,
            {part: bits(counts[part], d, width) for part, width in widths.items()},
            {part: bits(widths["o"]) if part == "o" else bits(counts[part], d) for part in biases},
        )

    def write(self, place):
        "Every number at its place: `place(part, head, row, input)` is a tensor's name and an index."
        values = {}
        for part, array in self.weights.items():
            for where, value in np.ndenumerate(array):
                name, index = place(part, *where)
                values.setdefault(name, {})[index] = value
        for part, array in self.biases.items():
            for where, value in np.ndenumerate(array):
                name, index = (place("o", 0, 0, None)[0], where) if part == "o" else place(part, *where, None)
                values.setdefault(name, {})[index] = value
        return {name: self.tensor(numbers) for name, numbers in values.items()}

    def tensor(self, numbers):
        array = np.full([max(axis) + 1 for axis in zip(*numbers)], 77, dtype=next(iter(numbers.values())).dtype)
        for index, value in numbers.items():
            array[index] = value
        assert len(numbers) == array.size  # no place was left empty, or taken twice
        return torch.from_numpy(array).view(self.dtype)

    def in_dialect(self, name):
        return self.write(lambda *where: place(name, self.heads, *where))

    def dialects(self):
        "The names of those that can carry them."
        h, g, d = self.heads
        widths = [self.weights[part].shape[2] for part in "qkv"]
        able = {"separate", "per_head", "kernels"}
        able |= {"gguf"} if d % 2 == 0 else set()
        able |= {"packed_kv"} if widths[1] == widths[2] else set()
        if len(set(widths)) == 1:
            able |= {"stacked", "grouped"} | ({"interleaved", "conv1d"} if g == h else set())
            able |= {"multi_query"} if g == 1 else set()
        return [name for name in DIALECTS if name in able]


def assert_same_bits(got, wanted):
    "The same names, shapes, dtypes and bits; NaN and -0 too."
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape, name
        assert torch.equal(got[name].view(BITS[tensor.dtype]), tensor.view(BITS[tensor.dtype])), name


HEADS = pytest.mark.parametrize(
    "heads",
    [HeadLayout(*sizes) for sizes in ((6, 6, 2), (6, 3, 1), (6, 2, 3), (3, 1, 4), (1, 1, 2), (4, 4, 1))],
    ids=str,
)


@st.composite
def numbers(draw, heads):
    "Any widths, with or without biases, in any dtype; bits at random."
    e, c, v, out = (draw(st.integers(1, 5)) for _ in range(4))
    c, v = draw(st.sampled_from([(e, e), (e, e), (c, c), (c, v)]))
    torch.manual_seed(draw(st.integers(0, 1000)))
    return Numbers.random(
        heads, dict(q=e, k=c, v=v, o=out), draw(st.sampled_from(["qkvo", ""])), draw(st.sampled_from([*BITS]))
    )


def named(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


@cache
def shapes(dialect, heads, width):
    state = Numbers.random(heads, dict(q=width, k=width, v=width, o=width)).in_dialect(dialect)
    return {name: tensor.shape for name, tensor in state.items()}


def random_state(dialect="separate", heads=GROUPED, width=s.e):
    "Plain numbers in float32, in a dialect."
    return {name: torch.randn(shape) for name, shape in shapes(dialect, heads, width).items()}


# Converting


@HEADS
@given(st.data())
def test_every_number_is_at_its_place_in_every_dialect(heads, data):
    problem = data.draw(numbers(heads))
    written = {name: problem.in_dialect(name) for name in problem.dialects()}
    for source, target in itertools.product(written, repeat=2):
        assert_same_bits(convert_weights(written[source], source, target, problem.heads), written[target])


def test_all_ten_are_tried():
    assert set(PLACES) == set(OUTPUTS) == set(DIALECTS)
    able = {
        name for g in (6, 3, 1) for name in Numbers.random(HeadLayout(6, g, 2), dict(q=4, k=4, v=4, o=4)).dialects()
    }
    assert able == set(DIALECTS)


def test_a_wrong_place_is_seen():
    problem = Numbers.random(GROUPED, dict(q=2, k=2, v=2, o=2))
    right = convert_weights(problem.in_dialect("grouped"), "grouped", "stacked", GROUPED)
    problem.weights["v"] = problem.weights["v"][[1, 0, 2]]
    with pytest.raises(AssertionError, match="in_proj.weight"):
        assert_same_bits(right, problem.in_dialect("stacked"))
    with pytest.raises(AssertionError):  # one place for two numbers
        problem.write(lambda part, i, r, c: place("stacked", GROUPED, part, 0, r, c))


AXES = "hd e", "e hd", "h d e", "h e d", "e h d"


def own_dialects():
    "Dialects that no library has: q, k and v in any order, cut into tensors anywhere, in any axes."
    for parts, cuts, order in itertools.product(
        itertools.permutations("qkv"), [(), (1,), (2,), (1, 2)], ["parts", "groups"]
    ):
        names = ["".join(parts[i:j]) for i, j in zip((0, *cuts), (*cuts, 3))]
        for i, axes in enumerate(AXES):
            yield Dialect(
                {own: f"the_{own}" for own in [*names, "o"]},
                axes,
                AXES[i - len(names)],
                order,
                weight="w.{}",
                bias="{}_b",
            )


def own_place(dialect, heads, part, i, r, c):
    "Name and index in a dialect of one's own, by arithmetic."
    h, g, d = heads
    counts = dict(q=h, k=g, v=g, o=h)
    shared = next(names for names in dialect.names if part in names)
    before = shared[: shared.index(part)]
    if dialect.order == "parts" or len(shared) == 1:
        head = sum(counts[other] for other in before) + i
    else:
        share = counts[part] // g
        head = (
            i // share * sum(counts[other] // g for other in shared)
            + sum(counts[other] // g for other in before)
            + i % share
        )
    axes = dialect.out_axes if part == "o" else dialect.axes
    index = [{"h": head, "d": r, "e": c, "hd": head * d + r}[axis] for axis in axes.split()]
    form = dialect.bias if c is None else dialect.weight
    return form.format(f"the_{shared}"), tuple(axis for axis in index if axis is not None)


@pytest.mark.parametrize("heads", [HeadLayout(6, 2, 1), HeadLayout(2, 2, 3)], ids=str)
def test_a_dialect_of_ones_own(heads):
    problem = Numbers.random(heads, dict(q=4, k=4, v=4, o=5))
    separate = problem.in_dialect("separate")
    for dialect in own_dialects():
        written = problem.write(lambda *where: own_place(dialect, heads, *where))
        assert_same_bits(convert_weights(separate, "separate", dialect, heads), written)
        assert_same_bits(convert_weights(written, dialect, "separate", heads), separate)


@pytest.mark.parametrize("width", [None, 2, 4, 6, 8])
@pytest.mark.parametrize("base", ["separate", "grouped", "per_head", "conv1d", "kernels", "packed_kv"])
def test_pairs_of_rows_in_any_dialect_and_any_width(base, width):
    heads = EQUAL if base == "conv1d" else GROUPED
    own = replace(DIALECTS[base], pairs="interleaved", rotary_dim=width)
    problem = Numbers.random(heads, dict(q=4, k=4, v=4, o=5))

    def own_row(part, i, r, c):
        return place(base, heads, part, i, paired(r, width or s.d) if part in "qk" else r, c)

    written, plain = problem.write(own_row), problem.in_dialect(base)
    assert_same_bits(convert_weights(plain, base, own, heads), written)
    assert_same_bits(convert_weights(written, own, base, heads), plain)
    same = all(torch.equal(written[name].view(torch.int32), plain[name].view(torch.int32)) for name in plain)
    assert same == (width == 2)  # a single pair is in order either way


def test_rows_of_a_norm_move_as_those_of_a_head():
    rows = torch.arange(2 * 8.0).view(2, 8)
    assert interleave_pairs(rows)[1].tolist() == [8, 12, 9, 13, 10, 14, 11, 15]
    assert interleave_pairs(rows, 4)[0].tolist() == [0, 2, 1, 3, 4, 5, 6, 7]
    assert torch.equal(interleave_pairs(interleave_pairs(rows, 6), 6, back=True), rows)


def test_parts_that_read_different_widths_cannot_share_a_tensor():
    state = Numbers.random(GROUPED, dict(q=s.e, k=11, v=13, o=s.e)).in_dialect("separate")
    sharing = [dialect for dialect in own_dialects() if any(len(parts) > 1 for parts in dialect.names)]
    assert sharing
    for dialect in sharing:
        with refused(ValueError, "width"):
            convert_weights(state, "separate", dialect, GROUPED)


@pytest.mark.parametrize(
    "dialect, names",
    [
        ("separate", "query key value output.dense"),
        ("separate", "q_proj k_proj v_proj o_proj"),
        ("separate", "to_q to_k to_v to_out"),
        ("separate", "Wq Wk Wv Wo"),
        ("separate", "wq wk wv wo"),
        ("separate", "linear_q linear_k linear_v linear_proj"),
        ("separate", "query key value attention_output"),
        ("separate", "Q K V O"),
        ("stacked", "Wqkv out_proj"),
        ("stacked", "qkv proj"),
        ("stacked", "qkv_proj o_proj"),
        ("stacked", "to_qkv out"),
        ("multi_query", "c_attn c_proj"),
        ("grouped", "query_key_value dense"),
        ("packed_kv", "to_q to_kv to_out"),
        ("packed_kv", "q_proj kv_proj o_proj"),
        ("packed_kv", "query key_value dense"),
        ("packed_kv", "linear_q linear_kv linear_proj"),
        ("packed_kv", "in_proj context_proj out_proj"),
        ("kernels", "q_proj k_proj v_proj o_proj"),
        ("conv1d", "qkv proj"),
    ],
)
@pytest.mark.parametrize(
    "form",
    [
        ("{}.weight", "{}.bias"),
        ("{}_weight", "{}_bias"),
        ("{}/kernel", "{}/bias"),
        ("{}.kernel", "{}.bias"),
        ("W_{}", "b_{}"),
    ],
)
def test_tensors_are_known_by_the_names_that_libraries_use(dialect, names, form):
    heads = HeadLayout(s.h, {"multi_query": 1, "conv1d": s.h}.get(dialect, s.g), s.d)
    state = random_state(dialect, heads)
    stems = dict(zip(DIALECTS[dialect].names.values(), names.split()))
    renamed = {
        form[name.endswith("bias")].format(stems[name.rpartition(".")[0]]): tensor for name, tensor in state.items()
    }
    assert len(renamed) == len(state)
    if "kernel" in form[0] and DIALECTS[dialect].axes.startswith("h"):  # a kernel has its inputs first
        with refused(ValueError, "no weight for", *(name for name in renamed if "kernel" in name)):
            convert_weights(renamed, dialect, dialect, heads)
    else:
        assert_same_bits(convert_weights(renamed, dialect, dialect, heads), state)


def test_a_dialects_own_names_come_first():
    # each of these names means another part elsewhere
    own = Dialect(dict(v="q_proj", q="key", k="proj", o="value"))
    state = random_state()
    mine = {f"{name}.weight": state[f"{DIALECTS['separate'].names[part]}.weight"] for part, name in own.names.items()}
    wanted = {name: tensor for name, tensor in state.items() if name.endswith("weight")}
    assert_same_bits(convert_weights(mine, own, "separate", GROUPED), wanted)
    assert_same_bits(convert_weights(wanted, "separate", own, GROUPED), mine)


@pytest.mark.parametrize("source, target", list(itertools.product(DIALECTS, repeat=2)))
def test_results_own_their_memory(source, target):
    heads = HeadLayout(s.h, s.h, s.d) if {"interleaved", "conv1d"} & {source, target} else GROUPED
    heads = HeadLayout(1, 1, s.d) if "multi_query" in (source, target) else heads
    state = random_state(source, heads)
    state = {
        name: nn.Parameter(tensor.clone().mT.contiguous().mT if tensor.dim() > 1 else tensor)  # strided
        for name, tensor in state.items()
    }
    before = {name: tensor.detach().clone() for name, tensor in state.items()}
    got = convert_weights(state, source, target, heads)
    blocks = [tensor.untyped_storage() for tensor in got.values()]
    assert all(tensor.is_contiguous() for tensor in got.values())
    assert all(len(block) == tensor.nbytes for block, tensor in zip(blocks, got.values()))
    addresses = [block.data_ptr() for block in [*blocks, *(t.untyped_storage() for t in state.values())]]
    assert len(set(addresses)) == len(addresses)
    with torch.no_grad():
        for tensor in got.values():
            tensor.fill_(7)
    assert_same_bits({name: tensor.detach() for name, tensor in state.items()}, before)


def test_results_can_be_saved():
    safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors: pip install safetensors")
    state = convert_weights(random_state("kernels"), "kernels", "grouped", GROUPED)
    assert_same_bits(safetensors.load(safetensors.save(state)), state)


@pytest.mark.parametrize("name", DIALECTS)
def test_shapes_alone_can_be_converted(name):
    heads = HeadLayout(s.h, 1, s.d) if name == "multi_query" else EQUAL
    state = random_state(name, heads)
    empty = {key: tensor.to("meta") for key, tensor in state.items()}
    there = convert_weights(empty, name, "separate", heads)
    back = convert_weights(there, "separate", name, heads)
    assert {key: tensor.shape for key, tensor in back.items()} == {key: t.shape for key, t in state.items()}
    assert all(tensor.device.type == "meta" for tensor in [*there.values(), *back.values()])
    assert from_state_dict(empty, heads, name).in_proj.weight.device.type == "meta"


# Layers


@HEADS
@given(st.data(), st.sampled_from(["", "h.0.attn."]))
def test_a_layer_holds_the_numbers_at_their_places(heads, data, prefix):
    problem = data.draw(numbers(heads))
    if "packed_kv" not in problem.dialects():
        with refused(ValueError, "width"):
            from_state_dict(problem.in_dialect("separate"), problem.heads, "separate")
        return
    context = problem.weights["q"].shape[2] != problem.weights["k"].shape[2]
    state = problem.in_dialect("packed_kv" if context else "stacked")
    wanted = {name.replace("Wq", "in_proj").replace("Wkv", "context_proj"): t for name, t in state.items()}
    around = (
        {
            "embed.weight": torch.ones(2, 3),
            "h.1.attn.in_proj.weight": torch.ones(1),
            "more.h.0.attn.in_proj.weight": torch.ones(1),
        }
        if prefix
        else {}
    )
    for name in problem.dialects():
        layer = from_state_dict(named(prefix, problem.in_dialect(name)) | around, problem.heads, name, prefix=prefix)
        got = layer.state_dict()
        assert got.pop("_extra_state").tolist() == [*problem.heads] == [*layer.layout]
        assert_same_bits(got, wanted)
        assert (layer.context_proj is not None) == context and layer.dropout == 0


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("context_dim, dialect", [(None, "stacked"), (11, "packed_kv")])
def test_a_layer_read_from_its_own_weights_is_the_same_layer(context_dim, dialect, bias):
    model = nn.ModuleDict(
        {
            "a": nn.Linear(2, 2),
            "mha": MultiHeadAttention(
                s.e, s.h, num_kv_heads=s.g, head_dim=s.d, out_dim=13, context_dim=context_dim, bias=bias
            ),
        }
    )
    again = from_state_dict(model.state_dict(), GROUPED, dialect, prefix="mha.")
    x, context = torch.randn(s.b, s.n, s.e), torch.randn(s.b, s.m, context_dim or s.e)
    assert torch.equal(again(x, context), model["mha"](x, context))
    assert again.state_dict().keys() == model["mha"].state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model["mha"].state_dict().items())
    model["mha"].in_proj.weight.data.fill_(0)
    assert again.in_proj.weight.abs().min() > 0  # its own memory


@pytest.mark.parametrize("context_dim", [None, 11])
def test_a_layer_whose_parts_stand_apart_is_read_as_separate(context_dim):
    layer = MultiHeadAttention(s.e, s.h, num_kv_heads=s.g, head_dim=s.d, context_dim=context_dim)
    apart = separate_projections(layer)
    again = from_state_dict(named("a.", apart.state_dict()), GROUPED, "separate", prefix="a.")
    x, context = torch.randn(s.b, s.n, s.e), torch.randn(s.b, s.m, context_dim or s.e)
    assert torch.equal(again(x, context), layer(x, context))


def test_plugs_go_into_their_sockets():
    def position(q, k, *, offset):
        return q * 2, k

    state = random_state("stacked")
    layer = from_state_dict(state, GROUPED, position=position, attend=plain_attention)
    assert layer.position is position and layer.attend is plain_attention
    assert from_state_dict(state, GROUPED).position is None


@pytest.mark.parametrize("biases", ["".join(c) for n in range(5) for c in itertools.combinations("qkvo", n)])
def test_absent_biases_are_zeros_in_a_layer(biases):
    problem = Numbers.random(GROUPED, dict(q=s.e, k=s.e, v=s.e, o=13), biases)
    filled = copy.deepcopy(problem)
    if biases:
        filled.biases = {
            part: problem.biases.get(part, np.zeros(array.shape[:2] if part != "o" else 13, np.int32))
            for part, array in problem.weights.items()
        }
    wanted, written = filled.in_dialect("stacked"), problem.in_dialect("kernels")
    got = from_state_dict(written, GROUPED, "kernels").state_dict()
    del got["_extra_state"]
    assert_same_bits(got, wanted)
    # without a layer no bias is invented: either all that share a tensor have one, or none has
    assert_same_bits(convert_weights(written, "kernels", "separate", GROUPED), problem.in_dialect("separate"))
    shared = set(biases) - {"o"}
    if shared and shared != set("qkv"):
        with refused(ValueError, "q, k, v", "bias", ", ".join(sorted(shared, key="qkv".index)), "zeros"):
            convert_weights(written, "kernels", "stacked", GROUPED)
    else:
        assert_same_bits(convert_weights(written, "kernels", "stacked", GROUPED), problem.in_dialect("stacked"))


@pytest.mark.parametrize("dtype", BITS)
def test_a_layer_has_the_dtype_of_its_weights(dtype):
    state = {name: tensor.to(dtype) for name, tensor in random_state("stacked").items()}
    assert {p.dtype for p in from_state_dict(state, GROUPED).parameters()} == {dtype}


# Which dialect


@pytest.mark.parametrize(
    "g, writer, fitting",
    [
        (6, "stacked", "stacked interleaved grouped"),
        (3, "stacked", "stacked grouped"),
        (6, "conv1d", "conv1d"),
        (1, "stacked", "stacked grouped multi_query"),
        (1, "separate", "separate gguf"),
        (3, "gguf", "separate gguf"),
        (3, "packed_kv", "packed_kv"),
        (3, "kernels", "kernels"),
        (3, "per_head", "per_head"),
    ],
)
def test_names_and_shapes_leave_few_dialects(g, writer, fitting):
    heads = HeadLayout(s.h, g, s.d)
    neutral = dict(q="query", k="key", v="value", kv="kv_proj", qkv="qkv", o="out")
    own = replace(
        DIALECTS[writer],
        names={parts: neutral[parts] for parts in DIALECTS[writer].names},
        weight="{}.weight",
        bias="{}.bias",
    )
    state = named("mha.", convert_weights(random_state(heads=heads), "separate", own, heads))
    assert fitting_dialects(state, heads, prefix="mha.") == fitting.split()


@pytest.mark.parametrize("context_width, is_causal", [(None, False), (None, True), (11, False)])
@pytest.mark.parametrize(
    "g, writer, right",
    [
        (6, "stacked", "stacked"),
        (6, "interleaved", "interleaved grouped"),
        (3, "stacked", "stacked"),
        (3, "grouped", "grouped"),
        (1, "multi_query", "stacked grouped multi_query"),
    ],
)
def test_an_input_and_its_output_name_the_dialect(g, writer, right, context_width, is_causal):
    def position(q, k, *, offset):
        assert not torch.is_grad_enabled()  # a guess keeps nothing for a backward pass
        return q + torch.arange(q.shape[2])[:, None], k

    heads = HeadLayout(s.h, g, s.d)
    writer, right = (writer, right.split()) if context_width is None else ("packed_kv", ["packed_kv"])
    layer = MultiHeadAttention(
        s.e, s.h, num_kv_heads=g, head_dim=s.d, context_dim=context_width, position=position, dtype=torch.float64
    )
    state = convert_weights(layer.state_dict(), "packed_kv" if context_width else "stacked", writer, heads)
    x = torch.randn(s.b, s.n, s.e, dtype=torch.float64)
    context = None if context_width is None else torch.randn(s.b, s.m, context_width, dtype=torch.float64)
    with torch.no_grad():
        y = layer(x, context, is_causal=is_causal)
    errors = guess_dialect(
        named("a.", state), heads, x, y, prefix="a.", context=context, is_causal=is_causal, position=position
    )
    assert [*errors.values()] == sorted(errors.values())
    assert {name for name, error in errors.items() if error < 1e-12} == set(right)
    assert all(error > 0.1 for name, error in errors.items() if name not in right)
    assert len(errors) > len(right) or g == 1 or context_width
    twice = guess_dialect(
        named("a.", state), heads, x, 2 * y, prefix="a.", context=context, is_causal=is_causal, position=position
    )
    assert twice[right[0]] == pytest.approx(0.5)  # the error is a share of what was answered


# Values of a width of their own


def cut(heads, part):
    "How many heads a part has, and of which width."
    return heads.count(part), heads.width(part)


def value_place(dialect, heads, part, i, r, c):
    "Name and index of a number where values are dv wide; c is None in a bias."
    h, g, d = heads
    dv, index = heads.value_dim, i * heads.width(part) + r
    kernel = {"q": "query", "k": "key", "v": "value", "o": "out"}[part]
    stacked = {"q": 0, "k": h * d, "v": h * d + g * d}.get(part, 0) + index
    before = {"q": i // (h // g), "k": i, "v": i, "o": 0}[part] * ((h // g + 1) * d + dv)
    grouped = before + {"q": i % (h // g) * d, "k": h // g * d, "v": (h // g + 1) * d}.get(part, 0) + r
    name, at = {
        "separate": (f"{part}_proj" if part != "o" else "out_proj", (index, c)),
        "stacked": ("in_proj" if part != "o" else "out_proj", (stacked, c)),
        "grouped": ("linear_qkv" if part != "o" else "linear_proj", (grouped if part != "o" else index, c)),
        "kernels": (kernel, (c, i, r)),
        "per_head": (f"W_{part.upper()}", (i, c, r)),
        "packed_kv": (
            dict(q="Wq", k="Wkv", v="Wkv", o="out_proj")[part],
            (index + (g * d if part == "v" else 0), c),
        ),
        "conv1d": ("c_attn" if part != "o" else "c_proj", (c, stacked)),
        "gguf": (
            f"attn_{part}" if part != "o" else "attn_output",
            (i * d + paired(r, d) if part in "qk" else index, c),
        ),
    }[dialect]
    if part == "o":
        at = {"kernels": (i, r, c), "per_head": (i, r, c), "conv1d": (index, c)}.get(dialect, (c, index))
    if dialect == "per_head":
        return name if c is not None else name.replace("W_", "b_"), tuple(a for a in at if a is not None)
    kind = "kernel" if dialect == "kernels" else "weight"
    return f"{name}.{kind if c is not None else 'bias'}", tuple(a for a in at if a is not None)


@pytest.mark.parametrize(
    "heads", [HeadLayout(6, 3, 4, 5), HeadLayout(4, 4, 6, 2), HeadLayout(6, 1, 2, 7)], ids=lambda a: str(a.saved)
)
def test_values_of_another_width_are_at_their_places_in_every_dialect(heads):
    numbers = {part: torch.randn(*cut(heads, part), s.e, dtype=torch.float64) for part in "qkvo"} | {
        f"{part}b": torch.randn(*cut(heads, part), dtype=torch.float64) for part in "qkv"
    }
    numbers["ob"] = torch.randn(s.e, dtype=torch.float64)

    def written(dialect):
        values = {}
        for part, tensor in numbers.items():
            for at in itertools.product(*map(range, tensor.shape)):
                if part == "ob":
                    name, index = value_place(dialect, heads, "o", 0, 0, None)[0], at
                else:
                    name, index = value_place(dialect, heads, part[0], *(*at, None)[:3])
                values.setdefault(name, {})[index] = tensor[at].item()
        made = {}
        for name, found in values.items():
            made[name] = torch.full([max(axis) + 1 for axis in zip(*found)], torch.nan, dtype=torch.float64)
            for index, value in found.items():
                made[name][index] = value
            assert not made[name].isnan().any()
        return made

    able = ["separate", "stacked", "grouped", "kernels", "per_head", "packed_kv", "gguf"]
    states = {name: written(name) for name in able + ["conv1d"] * (heads.num_heads == heads.num_kv_heads)}
    for source, target in itertools.product(states, repeat=2):
        assert_same_bits(convert_weights(states[source], source, target, heads), states[target])
    x = torch.randn(s.b, s.n, s.e, dtype=torch.float64)
    answers = [from_state_dict(state, heads, name)(x) for name, state in states.items()]
    assert all(torch.equal(y, answers[0]) for y in answers)
    again = from_state_dict(states["stacked"], heads)
    assert again.layout == heads
    assert torch.equal(from_state_dict(again.state_dict(), heads)(x), answers[0])


def test_a_layer_with_wider_values_and_another_input_is_read_from_its_own_state():
    layer = MultiHeadAttention(s.e, s.h, num_kv_heads=s.g, head_dim=s.d, value_dim=5, context_dim=11)
    again = from_state_dict(layer.state_dict(), layer.layout, "packed_kv")
    x, context = torch.randn(s.b, s.n, s.e), torch.randn(s.b, s.m, 11)
    assert torch.equal(again(x, context), layer(x, context)) and again.layout == layer.layout


@pytest.mark.usefixtures("own_messages")
def test_a_width_of_values_that_was_not_told_is_refused():
    layer = MultiHeadAttention(s.e, s.h, num_kv_heads=s.g, head_dim=s.d, value_dim=5)
    with refused(ValueError, "[6, 3, 8, 5]", "[6, 3, 8]"):
        from_state_dict(layer.state_dict(), GROUPED)
    state = {name: tensor for name, tensor in layer.state_dict().items() if name != "_extra_state"}
    with refused(ValueError, "in_proj.weight", "(87, 20)", "(96, e)"):
        from_state_dict(state, GROUPED)
    shared = Dialect(dict(qkv="qkv", o="out"), "h d e", "h d e")
    with refused(ValueError, "axis of their own", "width 5", "keys 8"):
        convert_weights(layer.state_dict(), "stacked", shared, layer.layout)
    with refused(ValueError, "values of width 5"):
        to_torch(MultiHeadAttention(48, 6, value_dim=5))


# Checkpoints as they are: what else stands under a prefix

NORM = partial(nn.RMSNorm, eps=0.1)  # an eps that shows in the answer


def normed(**options):
    "A layer whose norms of queries and keys have weights that differ."
    layer = MultiHeadAttention(s.e, s.h, num_kv_heads=s.g, head_dim=s.d, qk_norm=NORM, **options)
    for p in (*layer.q_norm.parameters(), *layer.k_norm.parameters()):
        nn.init.normal_(p)
    return layer


@pytest.mark.parametrize("names", ["q_norm k_norm", "q_layernorm k_layernorm", "query_norm key_norm", "norm_q norm_k"])
@pytest.mark.parametrize("dialect", ["stacked", "separate", "gguf", "kernels"])
def test_norms_are_carried_by_the_names_that_libraries_use(dialect, names):
    "In a dialect with pairs the rows of a norm move as those of its head, or the rotation met other rows."
    layer, x = normed(position=RoPE(s.d)), torch.randn(s.b, s.n, s.e)
    own = {name: p for name, p in layer.state_dict().items() if "norm" not in name}
    rows = (lambda w: interleave_pairs(w[None])[0]) if dialect == "gguf" else (lambda w: w)
    norms = {
        f"{name}.weight": rows(norm.weight.detach()) for name, norm in zip(names.split(), (layer.q_norm, layer.k_norm))
    }
    state = named("h.0.attn.", convert_weights(own, "stacked", dialect, GROUPED) | norms)
    again = from_state_dict(state, GROUPED, dialect, prefix="h.0.attn.", qk_norm=NORM, position=RoPE(s.d))
    torch.testing.assert_close(again(x), layer(x), atol=1e-6, rtol=0)
    assert again.q_norm.eps == 0.1 and again.q_norm.weight.device.type == "cpu"
    guessed = guess_dialect(state, GROUPED, x, layer(x), prefix="h.0.attn.", qk_norm=NORM, position=RoPE(s.d))
    assert next(iter(guessed)) == dialect and guessed[dialect] < 1e-5


@pytest.mark.parametrize("norm", [NORM, nn.LayerNorm, partial(nn.RMSNorm, elementwise_affine=False)])
def test_a_layer_with_norms_and_plugs_is_read_from_its_own_state(norm):
    def build():
        return dict(qk_norm=norm, attend=SinkAttention(s.h))

    layer = MultiHeadAttention(s.e, s.h, num_kv_heads=s.g, head_dim=s.d, **build())
    for p in layer.parameters():
        nn.init.normal_(p)
    again = from_state_dict(layer.state_dict(), GROUPED, **build())
    x = torch.randn(s.b, s.n, s.e)
    assert torch.equal(again(x), layer(x))
    with torch.no_grad():
        layer.attend.sinks.fill_(7)
    assert not (again.attend.sinks == 7).any()  # its own memory


STRANGERS = {  # what stands beside the projections, and the shortest way to leave it out
    "BERT": (["output.LayerNorm.weight", "output.LayerNorm.bias"], ("output.LayerNorm",)),
    "GPT-2": (["bias", "masked_bias"], ("bias", "masked_bias")),
    "Llama": (["rotary_emb.inv_freq"], ("rotary_emb",)),
    "T5": (["relative_attention_bias.weight"], ("relative_attention_bias",)),
    "Flax": (["LayerNorm/scale"], ("LayerNorm",)),
    "norms": (["q_norm.weight", "k_norm.weight"], ("q_norm", "k_norm")),
}


@pytest.mark.parametrize("case", STRANGERS)
def test_names_that_belong_elsewhere_are_refused_by_name_and_left_out_by_an_argument(case):
    names, ignore = STRANGERS[case]
    plain = random_state()
    state = named("a.", plain | {name: torch.ones(s.d) for name in names}) | {"b.bias": torch.ones(2)}
    wanted, own = from_state_dict(plain, GROUPED, "separate").state_dict(), dict(prefix="a.")
    with refused(ValueError, "no place", "ignore=", *names, *(["qk_norm="] if case == "norms" else [])):
        from_state_dict(state, GROUPED, "separate", **own)
    for left in (ignore, tuple(names)):  # a stem, or each name
        got = from_state_dict(state, GROUPED, "separate", **own, ignore=left).state_dict()
        assert all(torch.equal(tensor, got[name]) for name, tensor in wanted.items()) and got.keys() == wanted.keys()
        assert fitting_dialects(state, GROUPED, **own, ignore=left) == ["separate", "gguf"]
    under = {name[2:]: tensor for name, tensor in state.items() if name.startswith("a.")}
    with refused(ValueError, *names):
        convert_weights(under, "separate", "stacked", GROUPED)
    got = convert_weights(under, "separate", "stacked", GROUPED, ignore=ignore)
    assert_same_bits(got, convert_weights(plain, "separate", "stacked", GROUPED))


@pytest.mark.usefixtures("own_messages")
class TestNamesWithoutAPlace:
    @pytest.mark.parametrize("ignore", [("output.LayerNrom",), ("q_pro",), ("LayerNorm",), ("",)])
    def test_a_name_to_leave_out_must_be_there(self, ignore):
        state = random_state() | {"output.LayerNorm.weight": torch.ones(s.e)}
        with refused(ValueError, repr(ignore[0]), "output.LayerNorm.weight"):
            from_state_dict(state, GROUPED, "separate", ignore=ignore)

    def test_two_ways_to_leave_out_one_name(self):
        state = random_state() | {"output.LayerNorm.weight": torch.ones(s.e)}
        from_state_dict(state, GROUPED, "separate", ignore=("output", "output.LayerNorm"))

    @pytest.mark.parametrize("ignore", ["output", None, ["output"], (None,), 3])
    def test_names_to_leave_out_are_a_tuple_of_names(self, ignore):
        with refused(TypeError, "tuple" if ignore != (None,) else "None"):
            from_state_dict(random_state(), GROUPED, "separate", ignore=ignore)

    @pytest.mark.parametrize(
        "names, norm, words",
        [
            ({}, NORM, ["qk_norm=", "q_norm.weight"]),
            ({"q_norm.weight": (s.d,)}, NORM, ["k_norm.weight"]),
            ({"q_norm.weight": (s.d,), "k_norm.weight": (s.d,)}, nn.LayerNorm, ["q_norm.bias"]),
            ({"q_norm.weight": (s.h * s.d,), "k_norm.weight": (s.d,)}, NORM, ["(48,)", "(8,)", "q_norm.weight"]),
            ({"q_norm.bias": (s.d,)}, NORM, ["q_norm.bias"]),
            ({"norm_q.weight": (s.d,), "q_norm.weight": (s.d,)}, NORM, ["norm_q.weight"]),
        ],
    )
    def test_norms_and_their_weights_go_together(self, names, norm, words):
        with refused(ValueError, *words):
            from_state_dict(
                random_state() | {name: torch.ones(shape) for name, shape in names.items()},
                GROUPED,
                "separate",
                qk_norm=norm,
            )

    def test_a_plug_of_another_shape(self):
        state, plug = random_state() | {"attend.sinks": torch.ones(5)}, SinkAttention(s.h)
        with refused(ValueError, "attend.sinks", "(5,)", "(6,)"):
            from_state_dict(state, GROUPED, "separate", attend=plug)
        assert not plug.sinks.any()


# Torch's layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [None, 48, 30])
@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_layer_answers_the_same(bias, width, batch_first):
    theirs = nn.MultiheadAttention(
        48, s.h, dropout=0.25, bias=bias, kdim=width, vdim=width, batch_first=batch_first, dtype=torch.float64
    ).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    before = copy.deepcopy(theirs.state_dict())
    x = torch.randn(s.b, s.n, 48, dtype=torch.float64)
    context = torch.randn(s.b, s.m, width or 48, dtype=torch.float64)
    turn = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = from_torch(theirs)
    assert [w.category for w in caught] == ([] if batch_first else [UserWarning])
    assert all("batch_first=False" in str(w.message) and "transpose" in str(w.message) for w in caught)
    wanted = turn(theirs(turn(x), turn(context), turn(context))[0])
    torch.testing.assert_close(ours(x, context), wanted, atol=1e-12, rtol=0)
    assert ours.dropout == 0.25 and not ours.training
    back = to_torch(ours)
    assert back.batch_first and back.dropout == 0.25 and not back.training
    torch.testing.assert_close(back(x, context, context)[0], wanted, atol=1e-12, rtol=0)
    for state in (theirs.state_dict(), back.state_dict()):
        assert state.keys() == before.keys() and all(torch.equal(state[name], before[name]) for name in before)


@pytest.mark.parametrize("context_dim", [None, 48, 11])
@pytest.mark.parametrize("dtype", BITS)
def test_our_layer_comes_back_from_torchs(dtype, context_dim):
    layer = MultiHeadAttention(48, s.h, context_dim=context_dim, dropout=0.5, attend=plain_attention, dtype=dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    there = to_torch(layer)
    assert there.training and there.dropout == 0.5 and {p.dtype for p in there.parameters()} == {dtype}
    again = from_torch(there)
    assert again.training and again.dropout == 0.5
    for name in ("weight", "bias"):
        rows = [
            [getattr(proj, name) for proj in (mha.in_proj, mha.context_proj) if proj is not None]
            for mha in (layer, again)
        ]
        rows = rows if context_dim == 11 else [[torch.cat(parts)] for parts in rows]  # one width: one matrix
        assert all(map(torch.equal, *rows))
        assert torch.equal(getattr(layer.out_proj, name), getattr(again.out_proj, name))
    with torch.no_grad():
        there.out_proj.weight.fill_(0)
        again.out_proj.weight.fill_(0)
    assert layer.out_proj.weight.any()  # nothing is shared


def test_layers_without_numbers_convert_too():
    layer = MultiHeadAttention(48, s.h, device="meta")
    assert from_torch(to_torch(layer)).in_proj.weight.device.type == "meta"


@pytest.mark.usefixtures("own_messages")
class TestRefusedByTorch:
    @pytest.mark.parametrize(
        "options, words",
        [
            (dict(kdim=20, vdim=30), ["kdim 20", "vdim 30"]),
            (dict(kdim=20), ["kdim 20", "vdim 48"]),
            (dict(dropout=1.0), ["dropout 1.0"]),
            (dict(kdim=20, dropout=1.0), ["kdim 20", "dropout 1.0"]),
        ],
    )
    def test_what_our_layer_lacks(self, options, words):
        with refused(ValueError, *words):
            from_torch(nn.MultiheadAttention(48, s.h, batch_first=True, **options))

    @pytest.mark.parametrize(
        "options, words",
        [
            (dict(num_kv_heads=3), ["6 query heads", "3 key-value heads"]),
            (dict(head_dim=5), ["heads of width 5", "48"]),
            (dict(out_dim=13), ["output of width 13"]),
            (dict(qk_norm=nn.RMSNorm), ["qk_norm"]),
            (dict(position=lambda q, k, *, offset: (q, k)), ["position"]),
            (dict(attend=lambda q, k, v, **options: v), ["attend"]),
            (dict(out_dim=13, num_kv_heads=3), ["output of width 13", "3 key-value heads"]),
        ],
    )
    def test_what_torchs_layer_lacks(self, options, words):
        with refused(ValueError, "nn.MultiheadAttention", *words):
            to_torch(MultiHeadAttention(48, s.h, **options))


# Bad input


def changed(**tensors):
    "The state of a separate layer with some tensors replaced, or left out where they are None."
    state = random_state() | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in state.items() if tensor is not None}


@pytest.mark.usefixtures("own_messages")
class TestBadWeights:
    @pytest.mark.parametrize(
        "state, error, words",
        [
            (changed(rotary__inv_freq=torch.ones(4)), ValueError, ["ignore=('rotary.inv_freq',)"]),
            (changed(query__weight=torch.ones(48, 20)), ValueError, ["query.weight", "second weight for q"]),
            (changed(k_proj__weight=torch.ones(48, 20)), ValueError, ["k_proj.weight", "(48, 20)", "(24, e)"]),
            (changed(k_proj__weight=torch.ones(24)), ValueError, ["k_proj.weight", "(24,)", "(24, e)"]),
            (changed(k_proj__weight=torch.ones(24, 20, 1)), ValueError, ["k_proj.weight", "(24, 20, 1)"]),
            (changed(out_proj__weight=torch.ones(20, 24)), ValueError, ["out_proj.weight", "(20, 24)", "(e, 48)"]),
            (changed(q_proj__bias=torch.ones(24)), ValueError, ["q_proj.bias", "(24,)", "(48)"]),
            (changed(out_proj__bias=torch.ones(13)), ValueError, ["output", "bias", "13", "20"]),
            (changed(out_proj__bias=torch.ones(20, 1)), ValueError, ["out_proj.bias", "(20, 1)"]),
            (changed(q_proj__weight=None), ValueError, ["no weight for q", "q_proj"]),
            (changed(out_proj__weight=None), ValueError, ["no weight for o", "out_proj"]),
            (changed(v_proj__bias=torch.ones(24).half()), TypeError, ["v bias", "float16", "float32"]),
            ({name: t.to(torch.int8) for name, t in random_state().items()}, TypeError, ["floating", "int8"]),
            (changed(k_proj__bias=None), ValueError, ["q, k, v", "q, v only", "zeros"]),
            (changed(k_proj__weight=torch.ones(24, 11)), ValueError, ["width", "11", "20"]),
            (changed(_extra_state=torch.tensor([6, 6, 8])), ValueError, ["[6, 6, 8]", "[6, 3, 8]"]),
            (changed(_extra_state=torch.tensor([8, 3, 6])), ValueError, ["[8, 3, 6]", "[6, 3, 8]"]),
        ],
    )
    def test_names_shapes_and_dtypes(self, state, error, words):
        before = {name: tensor.clone() for name, tensor in state.items()}
        with refused(error, *words):
            convert_weights(state, "separate", "stacked", GROUPED)
        assert state.keys() == before.keys() and all(torch.equal(state[name], before[name]) for name in state)

    @pytest.mark.parametrize(
        "arguments, words",
        [
            (dict(weights=[1]), ["weights", "dict"]),
            (dict(weights=None), ["weights", "None"]),
            (dict(weights=nn.Linear(2, 2)), ["weights", "dict", "Linear"]),
            (dict(weights={3: torch.ones(2)}), ["name", "str", "3"]),
            (dict(weights=changed(q_proj__weight=np.ones((48, 20), "f"))), ["q_proj.weight", "numpy", "from_numpy"]),
            (dict(weights=changed(q_proj__weight=[[1.0]])), ["q_proj.weight", "list"]),
            (dict(weights=random_state() | {"q_proj.weight": None}), ["q_proj.weight", "None"]),
            (dict(weights=random_state() | {"_extra_state": None}), ["head counts", "None"]),
            (dict(weights=random_state() | {"_extra_state": [6, 3, 8]}), ["head counts", "list"]),
            (dict(weights=changed(_extra_state=torch.ones(3, device="meta"))), ["head counts", "meta"]),
            ({"weights": {n: t.to(torch.complex64) for n, t in random_state().items()}}, ["floating", "complex64"]),
            (dict(heads=(6, 3, 8)), ["HeadLayout", "(6, 3, 8)"]),
            (dict(heads=None), ["HeadLayout", "None"]),
            (dict(dialect=3), ["dialect", "3"]),
            (dict(dialect=None), ["dialect", "None"]),
            (dict(dialect=["separate"]), ["dialect", "['separate']"]),
            (dict(prefix=None), ["prefix", "str", "None"]),
            (dict(prefix=3), ["prefix", "str", "3"]),
        ],
    )
    def test_arguments_of_another_type(self, arguments, words):
        "By every entry point alike, before anything is made."
        given = dict(weights=random_state(), heads=GROUPED, dialect="separate", prefix="") | arguments
        weights, heads, dialect, prefix = given.values()
        x = torch.randn(s.b, s.n, s.e)
        calls = [lambda: from_state_dict(weights, heads, dialect, prefix=prefix)]
        if "prefix" not in arguments:
            calls += [
                lambda: convert_weights(weights, dialect, "stacked", heads),
                lambda: convert_weights(weights, "separate", dialect, heads),
            ]
        if "dialect" not in arguments:
            calls += [
                lambda: fitting_dialects(weights, heads, prefix=prefix),
                lambda: guess_dialect(weights, heads, x, x, prefix=prefix),
            ]
        for call in calls[: -2 if "head counts" in words or "floating" in words else None]:
            with refused(TypeError, *words):
                call()

    @pytest.mark.parametrize("y", [np.ones((2, 5, 20)), None, [1.0]])
    def test_an_answer_that_is_no_tensor(self, y):
        state = random_state("stacked")
        for x, answer, name in ((y, torch.ones(2, 5, 20), "x"), (torch.ones(2, 5, 20), y, "y")):
            with refused(TypeError, name, "torch.Tensor"):
                guess_dialect(state, GROUPED, x, answer)

    @pytest.mark.parametrize("saved", [[6, 3], [[6, 3, 8]], [6.5, 3.0, 8.0], 6])
    def test_saved_head_counts_of_another_form(self, saved):
        with refused(ValueError, "num_kv_heads", str(saved)):
            from_state_dict(changed(_extra_state=torch.tensor(saved)), GROUPED, "separate")

    def test_head_counts_are_left_out_by_an_argument(self):
        state = changed() | {"_extra_state": None}
        assert from_state_dict(state, GROUPED, "separate", ignore=("_extra_state",)).layout == GROUPED

    @pytest.mark.parametrize("module", [None, nn.Linear(3, 3), MultiHeadAttention(48, 6), {}])
    def test_only_torchs_layer_is_torchs_layer(self, module):
        with refused(TypeError, "nn.MultiheadAttention", type(module).__name__):
            from_torch(module)
        if not isinstance(module, MultiHeadAttention):
            with refused(TypeError, "MultiHeadAttention", type(module).__name__):
                to_torch(module)

    def test_saved_head_counts_that_agree(self):
        counts = dict(_extra_state=torch.tensor([6, 3, 8]))
        assert "_extra_state" not in convert_weights(random_state() | counts, "separate", "stacked", GROUPED)

    def test_dialects_that_do_not_exist(self):
        for pair in (("seperate", "stacked"), ("separate", "staked")):
            with refused(ValueError, *set(pair) - set(DIALECTS), *DIALECTS):
                convert_weights(random_state(), *pair, GROUPED)

    @pytest.mark.parametrize(
        "dialect, able", [("interleaved", "grouped"), ("conv1d", "stacked"), ("multi_query", "packed_kv")]
    )
    def test_heads_that_a_dialect_cannot_carry(self, dialect, able):
        with pytest.raises(ValueError, match="these can: ") as caught:
            convert_weights(random_state(), "separate", dialect, GROUPED)
        complaint, ways_out = str(caught.value).split("these can: ")
        assert all(word in complaint for word in (dialect, "6 query heads", "3 key-value heads"))
        assert able in ways_out.split(", ") and not {"interleaved", "conv1d", "multi_query"} & set(ways_out.split(", "))
        with refused(ValueError, dialect):
            from_state_dict(random_state(), GROUPED, dialect)

    @pytest.mark.parametrize("d, width", [(5, None), (8, 3), (8, 10)])
    def test_pairs_that_a_head_has_not(self, d, width):
        own, heads = replace(DIALECTS["gguf"], rotary_dim=width), HeadLayout(6, 3, d)
        with refused(ValueError, "rotary_dim", str(d if width is None else width), str(d), "even"):
            convert_weights(random_state("separate", heads), "separate", own, heads)

    def test_prefixes_that_nothing_begins_with(self):
        for refuse in (from_state_dict, fitting_dialects):
            with refused(ValueError, "'h.1.'", "h.0.q_proj.weight"):
                refuse(named("h.0.", random_state()), GROUPED, prefix="h.1.")

    def test_checkpoints_that_no_dialect_fits(self):
        with refused(ValueError, "no dialect fits", *DIALECTS, "(48, e)"):
            fitting_dialects(random_state(), EQUAL)
        with refused(ValueError, "no dialect fits"):
            guess_dialect(random_state(), EQUAL, torch.ones(2, 5, 20), torch.ones(2, 5, 20))

    @pytest.mark.parametrize("y", [torch.ones(2, 5, 13), torch.ones(2, 5, 1), torch.zeros(2, 5, 20)])
    def test_answers_that_tell_nothing(self, y):
        with refused(ValueError, "y ", str(tuple(y.shape)), "(2, 5, 20)"):
            guess_dialect(random_state("stacked"), GROUPED, torch.randn(2, 5, 20), y)

    @pytest.mark.parametrize(
        "options, words",
        [
            (dict(names=dict(qkv="qkv")), ["names", "o"]),
            (dict(names=dict(qk="qk", o="o")), ["names", "v"]),
            (dict(names=dict(qkv="qkv", k="k", o="o")), ["names", "k"]),
            (dict(names=dict(q="a", k="a", v="b", o="o")), ["names", "'a'"]),
            (dict(order="part"), ["order", "'part'", "parts", "groups"]),
            (dict(kv_heads="all"), ["kv_heads", "'all'", "any"]),
            (dict(pairs="neox"), ["pairs", "'neox'", "half_split", "interleaved"]),
            (dict(axes="h d"), ["axes", "'h d'", "hd e"]),
            (dict(out_axes="e"), ["out_axes", "'e'", "e hd"]),
            (dict(names="qkvo"), ["names", "dict", "'qkvo'"]),
            (dict(names=None), ["names", "dict", "None"]),
            (dict(weight=None), ["weight", "str", "None"]),
            (dict(bias=3), ["bias", "str", "3"]),
            (dict(rotary_dim=4.0), ["rotary_dim", "int", "4.0"]),
            (dict(axes=None), ["axes", "None", "hd e"]),
        ],
    )
    def test_dialects_that_cannot_be(self, options, words):
        with refused((TypeError, ValueError), *words):
            Dialect(**dict(names=dict(qkv="qkv", o="o")) | options)


# What users bring along


def test_plugs_with_parameters_and_buffers_stay_as_they_are():
    class Plug(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = torch.nn.Parameter(torch.tensor(3.0))
            self.register_buffer("shift", torch.tensor(2.0))

        def forward(self, q, k, *, offset):
            return q * self.factor + self.shift, k

    layer = MultiHeadAttention(s.e, s.h, head_dim=s.d, position=Plug())
    copied = from_state_dict(MultiHeadAttention(s.e, s.h, head_dim=s.d).state_dict(), layer.layout, position=Plug())
    assert copied.position.factor == 3 and copied.position.shift == 2
    assert copied.in_proj.weight.device.type == "cpu"


def test_loading_draws_no_random_numbers():
    layer, module = MultiHeadAttention(s.e, s.h, head_dim=s.d), torch.nn.MultiheadAttention(48, 6, batch_first=True)
    state = torch.get_rng_state()
    from_state_dict(layer.state_dict(), layer.layout)
    from_torch(module)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("trained", [True, False])
def test_frozen_layers_stay_frozen(trained):
    module = torch.nn.MultiheadAttention(48, 6, batch_first=True).requires_grad_(trained)
    layer = from_torch(module)
    for found in (layer, to_torch(layer)):
        assert {p.requires_grad for p in found.parameters()} == {trained}


def test_a_forward_of_its_own_is_refused():
    class Theirs(torch.nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x)

    class Ours(MultiHeadAttention):
        def forward(self, x):
            return x + super().forward(x)

    with pytest.raises(ValueError, match="forward of its own"):
        from_torch(Theirs(48, 6, batch_first=True))
    with pytest.raises(ValueError, match="forward of its own"):
        to_torch(Ours(48, 6))


def test_an_answer_with_nan_is_refused():
    layer, x = MultiHeadAttention(s.e, s.h, head_dim=s.d), torch.randn(s.b, s.n, s.e)
    y = layer(x).detach()
    y[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        guess_dialect(layer.state_dict(), layer.layout, x, y)


# Adapters, shards and rows in pairs


@pytest.mark.parametrize("name", ["q_proj.lora_A.default.weight", "adapter.down.weight", "q_proj.base_layer.scale"])
def test_an_adapter_is_to_be_merged_not_ignored(name):
    weights = convert_weights(MultiHeadAttention(s.e, s.h, head_dim=s.d).state_dict(), "stacked", "separate", EQUAL)
    with pytest.raises(ValueError, match="merge the adapter") as caught:
        from_state_dict(weights | {name: torch.ones(2, s.e)}, EQUAL, "separate")
    assert name in str(caught.value) and "ignore" not in str(caught.value)
    with refused(ValueError, f"ignore=('other.{name[-5:]}',)"):
        from_state_dict(weights | {f"other.{name[-5:]}": torch.ones(2, s.e)}, EQUAL, "separate")


def test_weights_that_devices_share_are_gathered_first():
    class Shared(nn.Parameter):
        def full_tensor(self):
            return self

    state = MultiHeadAttention(s.e, s.h, head_dim=s.d).state_dict()
    for read in (from_state_dict, partial(convert_weights, source="stacked", target="separate", heads=EQUAL)):
        with refused(TypeError, "in_proj.bias is sharded", "full_tensor"):
            args = (EQUAL,) if read is from_state_dict else ()
            read(state | {"in_proj.bias": Shared(state["in_proj.bias"])}, *args)


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize("wrong", [-2, -1, 0, True, 2.0])
def test_rows_in_pairs_are_counted(wrong):
    with refused((TypeError, ValueError), "rotary_dim"):
        replace(DIALECTS["gguf"], rotary_dim=wrong)
