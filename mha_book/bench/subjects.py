"""Whom `mha-book precision` asks: an encoder and a language model, with texts on which their heads are measured, and
others on which the rules are compared.
"""

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..lab.frontier import Storage, head_traits, kv_layouts, stored_as
from ..lab.one_wrong_line import HAMLET, token_nll
from ..models.encoder import load_minilm, package_file
from ..models.language_model import load_smollm2
from ..plugs.quantized_cache import QuantizedKVCache
from ..variants.sensitivity import head_sensitivity

# Texts


GROUP = 64  # tokens that share the scale of a key's channel
PLAYS = (  # of which the rules are tested; the heads are measured on Hamlet
    *("macbeth", "othello", "lear", "tempest", "julius_caesar", "as_you_like_it", "romeo_and_juliet", "twelfth_night"),
    *("coriolanus", "cymbeline", "henry_v", "richard_ii", "timon_of_athens", "much_ado_about_nothing", "pericles"),
    "john",
)


def passages(
    tokenizer,  # a `tokenizers.Tokenizer`
    play: str,  # as in the name of its file
    count: int,
    tokens: int,  # of each
) -> Tensor:  # count tokens
    "Passages one after the other, from the middle of a play on, without special tokens."
    package, version, _ = HAMLET
    text = package_file(package, version, f"{play}_gut.txt").read_text(encoding="latin-1")
    lines = text[len(text) // 2 :].partition("\n")[2]
    ids = tokenizer.encode(lines, add_special_tokens=False).ids[: count * tokens]
    return torch.tensor(ids, device="cpu").view(count, tokens)


def tests(
    tokenizer,
    texts: int,  # how many, of as many plays as there are
    tokens: int,
) -> Tensor:  # texts tokens
    "Passages in turn from each play."
    each = -(-texts // len(PLAYS))
    found = torch.stack([passages(tokenizer, play, each, tokens) for play in PLAYS[: min(texts, len(PLAYS))]])
    return found.transpose(0, 1).flatten(0, 1)[:texts]


# How many of them


TEXTS = {  # least, unless told, most, what it is; always a multiple of the least
    "sequences": (1, 32, 512, "that the encoder is tested on (32)"),
    "calibration_sequences": (1, 4, 64, "on which its heads are measured (4)"),
    "texts": (1, 8, 64, "that the language model is tested on (8)"),
    "tokens": (GROUP, 512, 1024, "of each, a multiple of 64 (512)"),
    "calibration_tokens": (GROUP, 256, 1024, "of the text on which its heads are measured, a multiple of 64 (256)"),
}


def checked_sizes(
    given: dict[str, int],  # by the names of `allowed`
    allowed: dict[str, tuple[int, int, int, str]] = TEXTS,
) -> dict[str, int]:
    "The same; ValueError for a number that is too small, too large or no whole number of blocks."
    for name, (least, _, most, _) in allowed.items():
        if not least <= given[name] <= most or given[name] % least:
            blocks = f", a multiple of {least}" * (least > 1)
            raise ValueError(f"--{name.replace('_', '-')} {given[name]} must be {least} to {most}{blocks}")
    return {name: given[name] for name in allowed}


# Models


class _Tail(nn.Module):
    "The layers of a model from one on: what comes before it does not hang on what it rounds."

    def __init__(self, layers: nn.ModuleList, last: nn.Module):
        super().__init__()
        self.layers, self.last = layers, last

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, None)
        return self.last(x)


class Subject:
    "A model, in eval mode, with the texts that it is asked about."

    name: str
    budgets: tuple[float, ...]  # bits a number; the uniform rule fills each of them
    formats: tuple[str, ...]  # that a head may get
    firsts: tuple[int, ...] = (0,)  # how many first tokens stay exact
    main: float  # the budget at which all rules are tried

    def __init__(
        self,
        model: nn.Module,
        tests: Tensor,  # texts tokens
        calibration: Tensor,  # on which the heads are measured
    ):
        device = model.word.weight.device
        self.model, self.tests, self.calibration = model, tests.to(device), calibration.to(device)
        self.layouts = kv_layouts(model)

    def traits(self) -> dict[str, dict[str, Tensor]]:
        "What can be seen of the heads on the calibration texts."
        return head_traits(self.model, [(self.calibration,)])

    @torch.no_grad()
    def effects(
        self,
        name: str,  # of a layer
        exact_first: int,
    ) -> Tensor:  # 2 g formats
        "What rounding each head of a layer costs the last hidden states, as a squared relative error."
        place = [*self.layouts].index(name)
        x, last = self.begin(self.calibration)
        for layer in self.model.layers[:place]:
            x = layer(x, None)
        tail = _Tail(self.model.layers[place:], last)
        options = dict(group=GROUP, exact_first=exact_first, layers=["layers.0.attention"])
        return head_sensitivity(tail, [(x,)], self.formats, **options).effects["layers.0.attention"]

    def begin(self, ids: Tensor) -> tuple[Tensor, nn.Module]:
        "What the first layer reads, and what follows the last one."
        raise NotImplementedError

    def scores(self, storage: Storage | None, way: str) -> Tensor:
        "A number for each text: how well the model does with keys and values stored so."
        raise NotImplementedError


class EncoderSubject(Subject):
    "Squared relative error of the last hidden state, for each sequence."

    name = "encoder"
    budgets = 3.75, 4.75, 5.75, 6.75, 7.75  # int3 to int7 for all, heads of width 32
    main = 7.75
    formats = *(f"int{bits}" for bits in range(2, 9)), "float16"

    def begin(self, ids: Tensor) -> tuple[Tensor, nn.Module]:
        return self.model(ids)[0], nn.Identity()

    @cached_property
    def exact(self) -> Tensor:
        "The last hidden states, side by side: texts, tokens times e."
        return self.model(self.tests)[-1].flatten(1)

    @torch.no_grad()
    def scores(self, storage: Storage | None, way: str) -> Tensor:
        exact = self.exact
        with stored_as(self.model, storage):
            rounded = self.model(self.tests)[-1].flatten(1)
        return (rounded - exact).square().sum(1) / exact.square().sum(1)


class LanguageSubject(Subject):
    "Loss of each text, in nats a token, keys and values rounded by a plug, or kept in a cache."

    name = "language"
    budgets = 3.5, 4.5, 5.5  # int3 to int5 for all, heads of width 64
    main = 4.5
    formats = *(f"int{bits}" for bits in range(2, 7)), "int8"
    firsts = 0, 1

    def begin(self, ids: Tensor) -> tuple[Tensor, nn.Module]:
        return self.model.word(ids), self.model.norm

    @torch.no_grad()
    def scores(self, storage: Storage | None, way: str) -> Tensor:
        if storage is None:
            return token_nll(self.model, self.tests).mean(1)
        if way == "cache":
            return torch.cat([self._cached(ids, storage) for ids in self.tests.split(4)])
        with stored_as(self.model, storage):
            return torch.cat([token_nll(self.model, ids).mean(1) for ids in self.tests.split(4)])

    def _cached(self, ids: Tensor, storage: Storage) -> Tensor:
        "The same texts in calls of `GROUP` tokens, which find those before them in a cache."
        dtype, rows, length = self.model.word.weight.dtype, *ids.shape
        caches = [
            QuantizedKVCache(rows, policy, length, self.layouts[name].head_dim, device=ids.device, dtype=dtype)
            for name, policy in storage.precisions.items()
        ]
        first = next(iter(storage.precisions.values())).exact_first
        calls = [ids[:, : first + GROUP], *ids[:, first + GROUP :].split(GROUP, 1)]
        states = torch.cat([self.model.states(part, cache=caches) for part in calls], 1)
        return token_nll(self.model, ids, states).mean(1)


def load_encoder(sizes: dict[str, int], device: torch.device) -> Subject:
    "MiniLM, and sequences of 128 tokens with those that it begins and ends them with."
    model, tokenizer = load_minilm(device)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    begin, end = tokenizer.encode("").ids

    def framed(ids: Tensor) -> Tensor:
        return F.pad(F.pad(ids, (1, 0), value=begin), (0, 1), value=end)

    calibration = passages(tokenizer, "hamlet", sizes["calibration_sequences"], 2 * GROUP - 2)
    return EncoderSubject(model, framed(tests(tokenizer, sizes["sequences"], 2 * GROUP - 2)), framed(calibration))


def load_language(sizes: dict[str, int], device: torch.device) -> Subject:
    """SmolLM2, and texts of whole blocks and one token more: with the first token left exact,
    all others are in blocks; else the last one, which no other asks about, is not.
    """
    model, tokenizer = load_smollm2(device)
    calibration = passages(tokenizer, "hamlet", 1, sizes["calibration_tokens"] + 1)
    return LanguageSubject(model, tests(tokenizer, sizes["texts"], sizes["tokens"] + 1), calibration)


SUBJECTS = {"encoder": load_encoder, "language": load_language}


def checked_models(
    asked: list[str],  # none means all
) -> list[str]:
    "Each model once. ValueError for one that is not there."
    for name in asked:
        if name not in SUBJECTS:
            raise ValueError(f"unknown model {name!r}; there are {', '.join(SUBJECTS)}")
    return list(dict.fromkeys(asked or SUBJECTS))


def check_packages(*files: tuple[str, str, str]) -> None:
    "ValueError, with the command to run, where a package is not there."
    for file in files:
        try:
            package_file(*file)
        except (ModuleNotFoundError, FileNotFoundError) as error:
            raise ValueError(str(error)) from None
