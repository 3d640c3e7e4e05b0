"""A whole language model beside Transformers' Llama: the same weights, the same tokens, two programs.

The model has SmolLM2's sizes, but for the width and the number of heads, which the command line gives. Its weights
are random, since no number in them changes the time.
"""

import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..heads.dialects import Dialect, convert_weights
from ..models.language_model import LanguageModel, LanguageModelConfig
from .suites import SUITES, Contest, Setting

# The model and its rival


def _model(at: Setting) -> LanguageModel:
    "SmolLM2's depth, vocabulary and proportions, with another width and other heads."
    groups = at.heads // 3 if at.heads % 3 == 0 else at.heads
    config = LanguageModelConfig(
        vocab_size=49152,
        embed_dim=at.width,
        num_layers=30,
        num_heads=at.heads,
        num_kv_heads=groups,
        head_dim=at.width // at.heads,
        hidden_dim=at.width * 8 // 3,
        max_len=8192,
        rope_base=1e5,
        eps=1e-5,
    )
    return LanguageModel(config).to(at.device, at.dtype).eval()


_LLAMA = Dialect({part: f"self_attn.{part}_proj" for part in "qkvo"})


def llama_state(model: LanguageModel) -> dict[str, Tensor]:
    "The weights of a language model under the names of Transformers' Llama."
    state = {
        "model.embed_tokens.weight": model.word.weight,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.word.weight,
    }
    for i, layer in enumerate(model.layers):
        gate, up = layer.gate_up.weight.chunk(2)
        theirs = {
            "mlp.gate_proj.weight": gate,
            "mlp.up_proj.weight": up,
            "mlp.down_proj.weight": layer.down.weight,
            "input_layernorm.weight": layer.attention_norm.weight,
            "post_attention_layernorm.weight": layer.norm.weight,
        }
        theirs |= convert_weights(dict(layer.attention.named_parameters()), "stacked", _LLAMA, layer.attention.layout)
        state |= {f"model.layers.{i}.{name}": rows for name, rows in theirs.items()}
    return state


def llama(model: LanguageModel) -> nn.Module | None:
    "Llama of Transformers with the weights of `model`; None where it is absent."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of packages that it would like to have
            from transformers import LlamaConfig, LlamaForCausalLM
    except (ImportError, RuntimeError):  # absent, or broken
        return None
    weight = model.word.weight
    theirs = LlamaForCausalLM(LlamaConfig(**_llama_sizes(model.config))).to(weight.device, weight.dtype).eval()
    theirs.load_state_dict(llama_state(model))
    return theirs


def _llama_sizes(sizes: LanguageModelConfig) -> dict[str, object]:
    "The sizes of a model under Transformers' names."
    return dict(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.embed_dim,
        head_dim=sizes.head_dim,
        intermediate_size=sizes.hidden_dim,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_kv_heads,
        max_position_embeddings=sizes.max_len,
        rms_norm_eps=sizes.eps,
        rope_parameters=dict(rope_type="default", rope_theta=sizes.rope_base),
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )


# Two contests: a prompt at once, and token by token


STEPS = 16  # tokens that follow the prompt


@torch.no_grad()
def language(at: Setting) -> Iterator[Contest]:
    "A whole language model: a prompt at once, and then token by token."
    model, absent = _model(at), {}
    ids = torch.randint(model.config.vocab_size, (at.batch, at.tokens), device=at.device)
    prompts, answers = _ours(model, ids)
    reads, says = {"LanguageModel": prompts}, {"LanguageModel": answers}
    if rival := llama(model):
        reads["Llama of Transformers"], says["Llama of Transformers"] = _theirs(rival, ids)
    else:
        absent["Llama of Transformers"] = "not installed"
    scores = 2 * at.batch * model.word.weight.numel()  # asked for once a call
    layers = 2 * at.batch * sum(p.numel() for p in model.layers.parameters())
    prompt, tokens = at.tokens * layers + scores, STEPS * (layers + scores)
    yield Contest("a prompt at once", reads, (ids,), prompt, absent)
    yield Contest(f"then {STEPS} tokens", says, (ids,), tokens, absent)


def _ours(model: LanguageModel, ids: Tensor) -> tuple[Callable, Callable]:
    "To read a prompt with an empty cache, and to say what follows it."

    def read(cache=None):
        cache = cache or model.new_cache(len(ids), ids.shape[1] + STEPS)
        return model.logits(model.states(ids, cache=cache)[:, -1])

    cache = model.new_cache(len(ids), ids.shape[1] + STEPS)
    first = read(cache).argmax(-1)

    def say():
        for kept in cache:
            kept.crop(ids.shape[1])
        tokens = [first]
        for _ in range(STEPS):
            states = model.states(tokens[-1][:, None], cache=cache)
            tokens.append(model.logits(states[:, -1]).argmax(-1))
        return torch.stack(tokens)

    return read, say


def _theirs(model: nn.Module, ids: Tensor) -> tuple[Callable, Callable]:
    "The same for a model of Transformers, with its dynamic cache."
    from transformers import DynamicCache

    def scores(tokens, cache):
        return model(tokens, past_key_values=cache, logits_to_keep=1).logits[:, -1]

    cache = DynamicCache()
    first = scores(ids, cache).argmax(-1)
    before = [(layer.keys, layer.values) for layer in cache.layers]

    def say():
        for layer, (keys, values) in zip(cache.layers, before):
            layer.keys, layer.values = keys, values
        tokens = [first]
        for _ in range(STEPS):
            tokens.append(scores(tokens[-1][:, None], cache).argmax(-1))
        return torch.stack(tokens)

    return lambda: scores(ids, DynamicCache()), say


SUITES["language"] = language
