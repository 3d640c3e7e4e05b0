"""Two tasks for heads that talk: letters of plays, and shifts of a sequence; and how a model of them is trained."""

import math
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..instruments.device import synchronize
from ..lab.head_mixing import head_resemblance, shift_task
from ..models.encoder import package_file
from ..models.language_model import DecoderLayer, LanguageModelConfig
from ..plugs.positions import LearnedPositions
from ..plugs.rope import RoPE
from .climber import short
from .mixing_kinds import CONTROLS, KINDS, PLAIN, Sizes

NUMBERS = dict(dtype=torch.float32, device="cpu")


# Training


def drawn_by_name(
    module: nn.Module,
    seed: int,
    scale: Callable[[str, Tensor], float],  # of a matrix, by its name
) -> None:
    "Every projection anew, by its name alone: two models have the same numbers where they have the same parts."
    for name, p in module.named_parameters():
        plain = name.replace("parametrizations.weight.original", "weight")
        if p.dim() == 2 and plain.removesuffix(".weight").endswith(DRAWN):
            generator = torch.Generator("cpu").manual_seed(zlib.crc32(f"{plain} {seed}".encode()))
            p.data.copy_(torch.randn(p.shape, generator=generator, **NUMBERS) * scale(plain, p))


DRAWN = "in_proj", "q_proj", "k_proj", "v_proj", "context_proj", "out_proj", "gate_up", "down", "word", "places"


def train(
    module: nn.Module,
    losses: Iterator[Callable[[], Tensor]],  # one for each step
    steps: int,
    rate: float,  # of AdamW: a short warm-up, then linear to 0
) -> list[float]:  # the loss, tenth by tenth
    "AdamW, with gradients of norm 1 at most."
    optimizer = torch.optim.AdamW(module.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    seen = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 50) * (1 - step / steps)
        optimizer.zero_grad(set_to_none=True)
        loss = next(losses)()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        seen.append(float(loss.detach()))
    return short([float(part.mean()) for part in torch.tensor(seen, **NUMBERS).tensor_split(min(10, steps))])


# Letters


PLAYS = "macbeth", "othello", "romeo_and_juliet", "as_you_like_it"  # to train on
CHOSEN_ON, TESTED_ON = "julius_caesar", "hamlet"  # the rate, and the results
WIDTH, LENGTH, HEADS, LAYERS, BATCH, WINDOWS = 64, 64, 4, 2, 16, 512
HIDDEN = 172  # of the plain model's gated map


@cache
def texts() -> tuple[dict[str, Tensor], int]:  # play -> its letters as numbers; how many letters there are
    "All plays, in the letters of all."
    plays = {
        play: package_file("shakespeare", "0.6", f"{play}_gut.txt").read_text(encoding="latin-1")
        for play in (*PLAYS, CHOSEN_ON, TESTED_ON)
    }
    letters = {letter: i for i, letter in enumerate(sorted(set("".join(plays.values()))))}
    return {play: torch.tensor([letters[c] for c in text], device="cpu") for play, text in plays.items()}, len(letters)


class Speaker(nn.Module):
    "A causal model of letters: pre-norm blocks with a kind of attention, places by rotation or learned, one table."

    def __init__(self, kind: str, hidden: int):
        super().__init__()
        size = dict(vocab_size=texts()[1], embed_dim=WIDTH, num_heads=HEADS, num_kv_heads=HEADS, num_layers=LAYERS)
        size |= dict(head_dim=WIDTH // HEADS)
        config = LanguageModelConfig(**size, hidden_dim=hidden, max_len=LENGTH, rope_base=1e4, eps=1e-5)
        self.word = nn.Embedding(config.vocab_size, WIDTH)
        kind = (KINDS | CONTROLS)[kind]
        turned = kind.base == PLAIN
        self.places = nn.Identity() if turned else LearnedPositions(LENGTH, WIDTH)
        self.layers = nn.ModuleList(DecoderLayer(config, None, None) for _ in range(LAYERS))
        for i, layer in enumerate(self.layers):
            layer.attention = kind.make(sizes_of_a_layer(turned), i)
        self.norm = nn.RMSNorm(WIDTH, config.eps)

    def states(self, ids: Tensor) -> list[Tensor]:
        "What each layer gets, and what leaves the last one."
        found = [self.places(self.word(ids))]
        for layer in self.layers:
            found.append(layer(found[-1]))
        return found

    def forward(self, ids: Tensor) -> Tensor:
        "Scores of the next letter."
        return F.linear(self.norm(self.states(ids)[-1]), self.word.weight)


def sizes_of_a_layer(turned: bool) -> Sizes:
    "Of a layer of letters, which turns queries and keys by their places, or not."
    sizes = dict(embed_dim=WIDTH, num_heads=HEADS, head_dim=WIDTH // HEADS, out_dim=WIDTH)
    return sizes | dict(position=RoPE(WIDTH // HEADS)) if turned else sizes


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def matched_speaker(kind: str) -> tuple[Speaker, int]:
    "A model with at most the plain one's parameters: what the mixing takes, its gated maps give up."
    spare = count(Speaker(PLAIN, HIDDEN)) - count(Speaker(kind, HIDDEN))
    hidden = HIDDEN + spare // (3 * WIDTH * LAYERS)
    return Speaker(kind, hidden), hidden


def _scale_of_letters(name: str, p: Tensor) -> float:
    "Small words and places; maps as torch scales them, those that add to the stream smaller."
    if "word" in name or "places" in name:
        return 0.02
    deep = math.sqrt(2 * LAYERS) if "out_proj" in name or "down" in name else 1.0
    return (3 * p.shape[1]) ** -0.5 / deep


def windows(ids: Tensor, number: int, generator: torch.Generator) -> Tensor:  # number LENGTH + 1
    "So many windows of a text, each with the letter that comes after it."
    at = torch.randint(len(ids) - LENGTH - 1, (number, 1), generator=generator, device="cpu")
    return ids[at + torch.arange(LENGTH + 1, device="cpu")]


def _batches(seed: int) -> Iterator[Tensor]:
    "Windows to train on, without end."
    plays, generator = torch.cat([texts()[0][play] for play in PLAYS]), torch.Generator("cpu").manual_seed(seed)
    while True:
        yield windows(plays, BATCH, generator)


def letter_loss(model: Speaker, ids: Tensor) -> Tensor:
    "Mean nats a letter."
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def learn_letters(kind: str, heads: int, rate: float, seed: int, steps: int, device: torch.device) -> dict[str, Any]:
    "Train a model of letters, and test it on plays that it has not read."
    torch.manual_seed(seed)
    model, hidden = matched_speaker(kind)
    drawn_by_name(model, seed, _scale_of_letters)
    model.to(device)
    losses = (lambda ids=ids: letter_loss(model, ids.to(device)) for ids in _batches(seed))
    course = train(model, losses, steps, rate)
    model.eval()
    with torch.no_grad():
        found = {
            name: float(letter_loss(model, _test_windows(play).to(device)))
            for name, play in (("chosen_on", CHOSEN_ON), ("loss", TESTED_ON))
        }
        alike = resemblances(model, _test_windows(TESTED_ON)[:64, :-1].to(device))
    synchronize(device)
    return found | dict(course=course, parameters=count(model), hidden=hidden, alike=alike, mixing=mixing_of(model))


def _test_windows(play: str) -> Tensor:
    return windows(texts()[0][play], WINDOWS, torch.Generator("cpu").manual_seed(0))


def resemblances(model: Speaker, ids: Tensor) -> list[float]:
    "How alike two different heads of each layer look, on average; none where weights do not describe a layer."
    found = []
    for x, layer in zip(model.states(ids), model.layers):
        try:
            maps = layer.attention.attention_map(layer.attention_norm(x), is_causal=True)
        except (AttributeError, ValueError, TypeError):
            return []
        alike = head_resemblance(maps)
        off = ~torch.eye(len(alike), dtype=torch.bool, device=alike.device)
        found.append(float(alike[off].mean()))
    return short(found)


def mixing_of(model: nn.Module) -> dict[str, list[list[float]]]:
    "Square matrices of heads that a model has learned, by their names in it."
    return {
        name: short(p.detach().cpu().tolist())
        for name, p in model.named_parameters()
        if p.shape == (HEADS, HEADS) and "_mixing" in name
    }


# Shifts


SHIFTS, TOKENS, NUMBERS_EACH, SEQUENCES, TESTED = 16, 24, 4, 16, 64
OUT = SHIFTS * NUMBERS_EACH


class Shifter(nn.Module):
    "One attention layer whose queries and keys are made of places alone, and whose values are the tokens."

    def __init__(self, kind: str, heads: int):
        super().__init__()
        self.attention = (KINDS | CONTROLS)[kind].make(
            dict(embed_dim=TOKENS, num_heads=heads, head_dim=OUT // heads, out_dim=OUT), 0
        )

    def forward(self, x: Tensor) -> Tensor:  # b TOKENS NUMBERS_EACH -> b TOKENS OUT
        places = torch.eye(TOKENS, device=x.device).expand(len(x), -1, -1)
        return self.attention(places, places, value=F.pad(x, (0, TOKENS - NUMBERS_EACH)))


def learn_shifts(kind: str, heads: int, rate: float, seed: int, steps: int, device: torch.device) -> dict[str, Any]:
    "Train a layer to give all shifts of a sequence side by side; its error as a share of the variance."
    torch.manual_seed(seed)
    model = Shifter(kind, heads)
    drawn_by_name(model, seed, lambda name, p: 0.5 if "out_proj" not in name else (3 * p.shape[1]) ** -0.5)
    model.to(device)

    def loss(sequences: int, generator: torch.Generator) -> Tensor:
        "Share of the variance that remains."
        x, target = shift_task(sequences, TOKENS, SHIFTS, NUMBERS_EACH, generator)
        return (model(x.to(device)) - target.to(device)).square().mean() / target.square().mean()

    generator = torch.Generator("cpu").manual_seed(seed)
    course = train(model, iter(lambda: lambda: loss(SEQUENCES, generator), None), steps, rate)
    model.eval()
    with torch.no_grad():
        found = {
            name: float(loss(TESTED, torch.Generator("cpu").manual_seed(2**31 + i)))
            for i, name in enumerate(("chosen_on", "loss"))
        }
    synchronize(device)
    return found | dict(course=course, parameters=count(model), hidden=0, alike=[], mixing={})


TASKS = {"shifts": learn_shifts, "letters": learn_letters}
