"""Weights of an encoder that are missing or no tensors, and masks that are none, are refused in words."""

import numpy as np
import pytest
import torch

from mha_book.models.encoder import EncoderConfig, convert_bert, expected_tensors, mean_pool
from support.refusals import refused

CONFIG = EncoderConfig(11, 6, 2, 1, 10, 9, 2, 1e-12)


def state(**changed):
    "Weights under BERT's names; with __ for a dot, and left out where they are None."
    made = {name: torch.randn(shape) for name, (_, shape) in expected_tensors(CONFIG).items()}
    made |= {name.replace("__", "."): tensor for name, tensor in changed.items()}
    return {name: tensor for name, tensor in made.items() if tensor is not None}


QUERY = "encoder__layer__0__attention__self__query__"


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize(
    "weights, error, words",
    [
        (state(**{QUERY + "weight": np.ones((6, 6), "f")}), TypeError, ["query.weight", "numpy", "from_numpy"]),
        (state(**{QUERY + "bias": [1.0]}), TypeError, ["query.bias", "list"]),
        (state(**{QUERY + "weight": None}), KeyError, ["query.weight"]),
        (state(**{QUERY.replace("query", "value") + "bias": None}), KeyError, ["value.bias"]),
        (state(embeddings__word_embeddings__weight=None), KeyError, ["word_embeddings.weight"]),
    ],
)
def test_weights_that_are_missing_or_no_tensors(weights, error, words):
    with refused(error, *words):
        convert_bert(weights, CONFIG.num_layers)


def test_queries_keys_and_values_are_stacked():
    given = state()
    found = convert_bert(given, CONFIG.num_layers)
    parts = [given[f"encoder.layer.0.attention.self.{part}.weight"] for part in ("query", "key", "value")]
    assert torch.equal(found["layers.0.attention.in_proj.weight"], torch.cat(parts))
    assert "word.bias" not in found


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize(
    "mask, error, words",
    [
        (np.ones((2, 5), bool), TypeError, ["key_mask", "from_numpy"]),
        (torch.ones(2, 5), TypeError, ["key_mask", "float32"]),
        (torch.ones(5) > 0, ValueError, ["key_mask", "(5,)", "(2, 5)"]),
    ],
)
def test_a_mean_over_tokens_takes_a_mask_of_real_tokens(mask, error, words):
    with refused(error, *words):
        mean_pool(torch.randn(2, 5, 6), mask)
