"""What a smaller encoder is asked: lines of Shakespeare and what can happen to them, ranked by similarity as the whole
encoder ranks them.
"""

import random
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..lab.frontier import rank_correlation
from ..models.encoder import Encoder, encode, mean_pool, package_file

# The texts


TRAINED = (  # on these plays a smaller model may learn; Hamlet is for what is measured of heads
    *("coriolanus", "cymbeline", "henry_v", "richard_ii", "timon_of_athens", "much_ado_about_nothing", "pericles"),
    "john",
)
TESTED = "macbeth", "othello", "lear", "tempest", "julius_caesar", "as_you_like_it", "romeo_and_juliet", "twelfth_night"
WORDS = range(5, 15)  # of a line
PASSAGE = 5  # lines


class Text(NamedTuple):
    "A text, and what it was made by."

    kind: str  # "line", or one of KINDS
    text: str


def _swapped(words: list[str], draw: random.Random) -> list[str]:
    "Two neighbours have changed places."
    at = draw.randrange(len(words) - 1)
    return [*words[:at], words[at + 1], words[at], *words[at + 2 :]]


def _dropped(words: list[str], draw: random.Random) -> list[str]:
    "One word is missing."
    at = draw.randrange(len(words))
    return words[:at] + words[at + 1 :]


def _misspelt(words: list[str], draw: random.Random) -> list[str]:
    "Three times two letters have changed places."
    letters = [*" ".join(words)]
    for _ in range(3):
        at = draw.randrange(len(letters) - 1)
        letters[at : at + 2] = letters[at + 1], letters[at]
    return "".join(letters).split()


KINDS: dict[str, Callable[[list[str], random.Random], list[str]]] = {
    "two words swapped": _swapped,
    "a word dropped": _dropped,
    "misspelt": _misspelt,
    "first three words": lambda words, draw: words[:3],
}
WITH_NEXT = "with the lines after it"


def play_lines(play: str) -> list[str]:  # as in the name of its file
    "Spoken lines of a play, of five to fourteen words, from behind its first third."
    text = package_file("shakespeare", "0.6", f"{play}_gut.txt").read_text(encoding="latin-1")
    lines = [re.sub(r"\s+", " ", line).strip() for line in text[len(text) // 3 :].split("\n")]
    return [line for line in lines if len(line.split()) in WORDS and not line.isupper()]


def perturbed(
    play: str,
    lines: int,  # how many; each gives len(KINDS) + 2 texts
    seed: int = 0,
) -> list[Text]:
    "Lines of a play in their order; behind each what can happen to it, and at last the line with those after it."
    draw, spoken, texts = random.Random(f"{play} {seed}"), play_lines(play), []
    for at in range(lines):
        words = spoken[at].split()
        texts.append(Text("line", spoken[at]))
        texts += [Text(kind, " ".join(change(words, draw))) for kind, change in KINDS.items()]
        texts.append(Text(WITH_NEXT, " ".join(spoken[at : at + PASSAGE])))
    return texts


def scored_texts(lines: int = 64) -> list[Text]:  # a multiple of the 8 plays
    "The scored set: as many lines of each play, and what can happen to them."
    return [text for play in TESTED for text in perturbed(play, lines // len(TESTED))]


def calibration_texts(lines: int = 32) -> list[Text]:
    "On which heads are measured: *Hamlet*."
    return perturbed("hamlet", lines)


def training_batches(
    size: int,  # texts
    seed: int = 0,
) -> list[list[str]]:
    "Batches of texts of about one length, in an order drawn at random, from other plays than those that are scored."
    draw = random.Random(seed)
    texts = [one.text for play in TRAINED for one in perturbed(play, 400, seed)]
    draw.shuffle(texts)
    batches = []
    for at in range(0, len(texts) - 8 * size + 1, 8 * size):
        part = sorted(texts[at : at + 8 * size], key=len)
        batches += [part[i : i + size] for i in range(0, len(part), size)]
    draw.shuffle(batches)
    return batches


# How they are ranked


def pooled(
    model: Encoder,
    ids: Tensor,  # b n
    key_mask: Tensor,  # b n
) -> Tensor:  # b e
    "One vector of length 1 a text, with gradients."
    return unit_mean(model(ids, key_mask)[-1], key_mask)


def unit_mean(
    states: Tensor,  # b n e: last hidden states
    key_mask: Tensor,  # b n
) -> Tensor:  # b e
    "What `pooled` makes of them: the mean of the real tokens, at length 1."
    return F.normalize(mean_pool(states, key_mask), dim=-1)


@torch.no_grad()
def embed_texts(
    model: Encoder,
    tokenizer,
    texts: list[str],
    size: int = 32,  # texts at once, of about one length
    embed: Callable[[Tensor, Tensor], Tensor] | None = None,  # (ids, key_mask) -> b e; the model's unless told
) -> Tensor:  # b e
    "One vector a text, in their order."
    embed = embed or (lambda ids, key_mask: pooled(model, ids, key_mask))
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    device, found = model.word.weight.device, {}
    for at in range(0, len(order), size):
        part = order[at : at + size]
        rows = embed(*encode(tokenizer, [texts[i] for i in part], device))
        found |= dict(zip(part, rows))
    return torch.stack([found[i] for i in range(len(texts))])


def ranking_scores(
    found: Tensor,  # texts e: of a smaller model
    exact: Tensor,  # texts e: of the whole one
    kinds: list[str],  # of the texts
) -> Tensor:  # of each line, 1 = ranked as by the whole model
    "Each line ranks all texts that are no lines by similarity; Spearman's correlation with the whole model's ranking."
    line = torch.tensor([kind == "line" for kind in kinds], device=found.device)
    ours, theirs = (z[line] @ z[~line].mT for z in (found, exact))
    return torch.tensor([rank_correlation(a, b) for a, b in zip(ours, theirs)], device="cpu")


def squared_distances(found: Tensor, exact: Tensor) -> Tensor:  # of each text, 0 to 4
    "How far each text's vector is from the whole model's."
    return (found - exact).square().sum(-1)
