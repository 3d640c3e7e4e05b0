"""The scored set: lines and what can happen to them, and how a smaller model's ranking is compared with the whole's."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from mha_book.bench import similar_lines
from mha_book.bench.similar_lines import (
    KINDS,
    PASSAGE,
    TESTED,
    TRAINED,
    WITH_NEXT,
    calibration_texts,
    embed_texts,
    perturbed,
    play_lines,
    pooled,
    ranking_scores,
    scored_texts,
    squared_distances,
    training_batches,
)
from mha_book.models.encoder import Encoder, EncoderConfig

PLAYS = {play: play_lines(play) for play in (*TESTED, *TRAINED, "hamlet")}


# The texts


def test_a_line_is_followed_by_what_can_happen_to_it():
    texts = scored_texts(16)
    assert len(texts) == 16 * 6 and [text.kind for text in texts] == ["line", *KINDS, WITH_NEXT] * 16
    for at in range(0, len(texts), 6):
        line, *others = (text.text for text in texts[at : at + 6])
        words = line.split()
        swapped, dropped, misspelt, first, longer = (text.split() for text in others)
        assert Counter(swapped) == Counter(words) and sum(a != b for a, b in zip(swapped, words)) in (0, 2)
        assert any(words[:i] + words[i + 1 :] == dropped for i in range(len(words)))
        assert Counter("".join(misspelt)) == Counter("".join(words))
        assert first == words[:3] and longer[: len(words)] == words and len(longer) >= PASSAGE * 5


def test_lines_are_those_of_the_plays_in_their_order():
    for play, lines in PLAYS.items():
        assert len(lines) > 400 and all(5 <= len(line.split()) <= 14 and line == line.strip() for line in lines)
        texts = perturbed(play, 3)
        assert [text.text for text in texts if text.kind == "line"] == lines[:3]
        assert texts[-1].text == " ".join(lines[2:7])


def test_no_text_of_one_purpose_serves_another():
    assert not {*TESTED} & {*TRAINED} and "hamlet" not in {*TESTED, *TRAINED}
    scored, own = ({text.text for text in texts} for texts in (scored_texts(64), calibration_texts()))
    learned = {text for batch in training_batches(32) for text in batch}
    assert len(scored) > 0.98 * 64 * 6  # a line may begin as another does
    for one, other in (scored, learned), (scored, own), (own, learned):
        shared = one & other  # three words are soon the same
        assert len(shared) <= 2 and all(len(text.split()) == 3 for text in shared)


def test_the_same_seed_gives_the_same_texts_and_another_seed_others():
    assert scored_texts(8) == scored_texts(8) and perturbed("lear", 4, 1) != perturbed("lear", 4, 0)
    lines = [[text.text for text in perturbed("lear", 4, seed) if text.kind == "line"] for seed in (0, 1)]
    assert lines[0] == lines[1]
    assert training_batches(16, 3) == training_batches(16, 3) != training_batches(16, 4)


def test_batches_are_of_about_one_length_in_no_order_of_it():
    batches = training_batches(32)
    assert {len(batch) for batch in batches} == {32} and len(batches) == 8 * 400 * 6 // 32 // 8 * 8
    spread = [max(map(len, batch)) - min(map(len, batch)) for batch in batches]
    whole = [len(text) for batch in batches for text in batch]
    assert sorted(spread)[len(spread) // 2] < (max(whole) - min(whole)) / 10
    lengths = [sum(map(len, batch)) for batch in batches]
    rises = sum(a < b for a, b in zip(lengths, lengths[1:]))
    assert 0.4 < rises / len(lengths) < 0.6


def test_texts_of_a_play_that_is_not_there_are_refused():
    with pytest.raises(FileNotFoundError, match="holds no nothing_gut.txt"):
        play_lines("nothing")


# Their vectors, and their ranks


class Letters:
    "A tokenizer of letters, padded on the right."

    def encode_batch(self, texts):
        longest = max(map(len, texts))
        return [
            SimpleNamespace(
                ids=[1 + ord(letter) % 9 for letter in text] + [0] * (longest - len(text)),
                attention_mask=[1] * len(text) + [0] * (longest - len(text)),
            )
            for text in texts
        ]


def test_vectors_stand_in_the_order_of_the_texts_and_padding_changes_none():
    torch.manual_seed(0)
    sizes = dict(vocab_size=11, embed_dim=12, num_heads=3, num_layers=2, hidden_dim=8, max_len=20, num_segments=1)
    model = Encoder(EncoderConfig(**sizes, eps=1e-5)).eval()
    texts = ["to be", "or", "not to be, that is", "the", "question"]
    found = embed_texts(model, Letters(), texts, size=2)
    assert not found.requires_grad
    for text, row in zip(texts, found, strict=True):
        ids = torch.tensor([[1 + ord(letter) % 9 for letter in text]])
        state = model(ids)[-1][0].mean(0)
        torch.testing.assert_close(row, state / state.norm(), rtol=1e-4, atol=1e-6)
        own = pooled(model, ids, torch.ones_like(ids, dtype=torch.bool))[0]
        torch.testing.assert_close(row, own, rtol=1e-4, atol=1e-6)
    other = embed_texts(model, Letters(), texts, size=2, embed=lambda ids, mask: mask.sum(1, keepdim=True))
    assert other.flatten().tolist() == [*map(len, texts)]


def test_the_score_is_the_correlation_of_ranks_of_texts_that_are_no_lines():
    torch.manual_seed(0)
    kinds = ["line", "a", "b", "line", "a", "c", "b"]
    exact, found = torch.randn(2, 7, 5)
    others = [1, 2, 4, 5, 6]
    for score, line in zip(ranking_scores(found, exact, kinds), (0, 3), strict=True):
        ranks = [
            sorted(range(5), key=[(z[line] @ z[other]).item() for other in others].__getitem__) for z in (found, exact)
        ]
        places = [[order.index(i) for i in range(5)] for order in ranks]
        d2 = sum((a - b) ** 2 for a, b in zip(*places))
        assert score.item() == pytest.approx(1 - 6 * d2 / (5 * 24), abs=1e-6)
    assert ranking_scores(exact * 2, exact, kinds).tolist() == pytest.approx([1, 1])
    assert ranking_scores(-exact, exact, kinds)[0] == pytest.approx(1)  # both signs turn
    mirror = torch.where(torch.tensor([kind == "line" for kind in kinds])[:, None], -exact, exact)
    assert ranking_scores(mirror, exact, kinds).tolist() == pytest.approx([-1, -1])


def test_distances_are_those_of_each_text():
    found, exact = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert squared_distances(found, exact).tolist() == pytest.approx([0, 0.4])


def test_plays_are_read_once_a_set_and_lines_of_capitals_are_no_lines(monkeypatch, tmp_path):
    text = "first third\n" * 40 + "a\n" * 3 + "  one   two three four five  \nALL OF THIS IS SHOUTED HERE\n" * 30
    (tmp_path / "made_gut.txt").write_text(text, encoding="latin-1")
    monkeypatch.setattr(similar_lines, "package_file", lambda package, version, name: tmp_path / name)
    assert {*play_lines("made")} == {"one two three four five"}
