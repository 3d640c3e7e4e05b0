"""Masks in other dialects: what each number of them says is written out by hand, and what cannot be said is refused."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mha_book.heads.masks import MASK_DIALECTS, convert_mask
from support.refusals import refused

settings.register_profile("book", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("book")
SMALLEST = torch.finfo(torch.float32).min

# Where sentence s, head a, query i, key j stands (of h heads), in the order in which the forms are preferred
FORMS = {
    "b h n m": lambda s, a, i, j, h: (s, a, i, j),
    "h n m": lambda s, a, i, j, h: (a, i, j),
    "b n m": lambda s, a, i, j, h: (s, i, j),
    "bh n m": lambda s, a, i, j, h: (s * h + a, i, j),
    "n m": lambda s, a, i, j, h: (i, j),
    "b m": lambda s, a, i, j, h: (s, j),
    "m": lambda s, a, i, j, h: (j,),
}
# The forms of each dialect, what it says to show a key, and what to hide one
SAID = {
    "mha_book": (["b h n m", "h n m", "n m", "m"], True, False),
    "sdpa": (["b h n m", "h n m", "n m", "m"], True, False),
    "mha_book_padding": (["b m"], True, False),
    "sdpa_added": (["b h n m", "h n m", "n m", "m"], 0.0, SMALLEST),
    "torch_added": (["n m", "bh n m"], 0.0, SMALLEST),
    "torch": (["n m", "bh n m"], False, True),
    "torch_padding": (["b m"], False, True),
    "keras": (["b n m", "b h n m", "n m"], True, False),
    "flax": (["b h n m", "h n m", "n m", "m"], True, False),
    "transformers_eager": (["b h n m"], 0.0, SMALLEST),
    "transformers_sdpa": (["b h n m"], True, False),
    "transformers_padding": (["b m"], 1, 0),
    "onnx": (["b h n m", "h n m", "n m"], True, False),
}


def carries(form, grid):
    "Whether nothing differs along the axes that the form lacks."
    return all((grid == grid.narrow(axis, 0, 1)).all() for axis, letter in enumerate("bhnm") if letter not in form)


def write(dialect, form, grid):
    "The mask b h n m in that form, number by number."
    b, h, n, m = grid.shape
    _, shown, hidden = SAID[dialect]
    sizes = [math.prod({"b": b, "h": h, "n": n, "m": m}[letter] for letter in axis) for axis in form.split()]
    mask = torch.full(sizes, 77, dtype=torch.tensor(shown).dtype)
    for place in itertools.product(*map(range, grid.shape)):
        mask[FORMS[form](*place, h)] = shown if grid[place] else hidden
    return mask


def assert_the_same_in_every_dialect(grid):
    "From every form that can carry the grid into every dialect; and a refusal by those that cannot."
    shape = tuple(grid.shape)
    written = {
        (source, form): write(source, form, grid)
        for source, (forms, *_) in SAID.items()
        for form in forms
        if carries(form, grid)
    }
    for ((source, form), mask), target in itertools.product(written.items(), SAID):
        before, wanted = mask.clone(), next((form for form in SAID[target][0] if carries(form, grid)), None)
        if wanted is None:
            differs = [axis for axis in "bhnm" if not carries("bhnm".replace(axis, ""), grid)]
            with refused(ValueError, ", ".join(differs), *SAID[target][0]):
                convert_mask(mask, source, target, shape)
        else:
            got, expected = convert_mask(mask, source, target, shape), written[target, wanted]
            assert got.dtype == expected.dtype and torch.equal(got, expected), (source, form, target)
        assert torch.equal(mask, before)


KEPT = pytest.mark.parametrize("kept", ["".join(c) for k in range(5) for c in itertools.combinations("bhnm", k)])


def random_grid(kept):
    "Who may look where, which differs along these axes only."
    sizes = dict(b=2, h=3, n=4, m=5)
    mask = torch.rand([size if axis in kept else 1 for axis, size in sizes.items()]) < 0.5
    return mask.expand(2, 3, 4, 5)


@KEPT
def test_every_number_says_the_same_in_every_dialect(kept):
    assert_the_same_in_every_dialect(random_grid(kept))


@st.composite
def grids(draw):
    "Who may look where, b h n m, of any size, the same along some of the axes, perhaps everywhere."
    sizes = [draw(st.integers(1, 3)) for _ in range(4)]
    kept = [size if draw(st.booleans()) else 1 for size in sizes]
    torch.manual_seed(draw(st.integers(0, 1000)))
    return (torch.rand(kept) < draw(st.sampled_from([0.0, 0.5, 1.0]))).expand(sizes)


@given(grids())
def test_any_mask_says_the_same_in_every_dialect(grid):
    assert_the_same_in_every_dialect(grid)


def test_all_dialects_are_tried():
    assert set(SAID) == set(MASK_DIALECTS)


def test_a_mask_that_says_otherwise_is_seen():
    grid = torch.tensor([True, False, False])[:, None, None, None].expand(3, 2, 2, 2)
    mask = write("torch_padding", "b m", grid)
    assert not torch.equal(convert_mask(~mask, "torch_padding", "keras", (3, 2, 2, 2)), write("keras", "b n m", grid))
    assert not torch.equal(
        convert_mask(mask.flip(0), "torch_padding", "keras", (3, 2, 2, 2)), write("keras", "b n m", grid)
    )


@KEPT
def test_an_axis_of_size_1_holds_for_all(kept):
    grid = random_grid(kept)
    for source, (forms, *_) in SAID.items():
        for mask in [write(source, form, grid) for form in forms if carries(form, grid)]:
            for axis in range(mask.dim()):
                first = mask.narrow(axis, 0, 1)
                if torch.equal(first.expand(mask.shape), mask):
                    assert torch.equal(convert_mask(first, source, "mha_book", tuple(grid.shape)), grid)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_added_masks_in_any_dtype(dtype):
    visible = torch.tensor([[[[True, False]]]])
    added = convert_mask(visible, "flax", "transformers_eager", (1, 1, 1, 2), dtype=dtype)
    assert added.dtype == dtype and added.tolist() == [[[[0.0, torch.finfo(dtype).min]]]]
    assert torch.equal(convert_mask(added, "transformers_eager", "flax", (1, 1, 1, 2)), visible)
    infinite = torch.tensor([[[[-0.0, -math.inf]]]], dtype=dtype)
    assert torch.equal(convert_mask(infinite, "transformers_eager", "flax", (1, 1, 1, 2)), visible)


def test_the_default_dtype_is_torchs():
    torch.set_default_dtype(torch.float64)
    try:
        assert convert_mask(torch.ones(2) > 0, "sdpa", "transformers_eager", (1, 1, 1, 2)).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.float32])
def test_ones_in_any_dtype(dtype):
    real = torch.tensor([[1, 0], [1, 1]]).to(dtype)
    got = convert_mask(real, "transformers_padding", "torch_padding", (2, 3, 5, 2))
    assert got.tolist() == [[False, True], [False, False]]
    assert convert_mask(got, "torch_padding", "transformers_padding", (2, 3, 5, 2)).dtype == torch.int64


@pytest.mark.usefixtures("own_messages")
class TestBadMasks:
    SHAPE = 2, 6, 5, 7

    @pytest.mark.parametrize(
        "mask, source, error, words",
        [
            (torch.ones(2, 1, 6, 5, 7) > 0, "sdpa", ValueError, ["'sdpa'", "5 axes", "b h n m"]),
            (torch.ones(7) > 0, "keras", ValueError, ["'keras'", "1 axes", "b n m"]),
            (torch.ones(2, 5, 7) > 0, "sdpa", ValueError, ["(2, 5, 7)", "h n m", "(6, 5, 7)"]),
            (torch.ones(6, 5, 7) > 0, "keras", ValueError, ["(6, 5, 7)", "b n m", "(2, 5, 7)"]),
            (torch.ones(2, 5, 7) > 0, "torch", ValueError, ["(2, 5, 7)", "bh n m", "(12, 5, 7)"]),
            (torch.ones(7, 5) > 0, "torch", ValueError, ["(7, 5)", "n m", "(5, 7)"]),
            (torch.ones(2, 5) > 0, "torch_padding", ValueError, ["(2, 5)", "b m", "(2, 7)"]),
            (torch.ones(5, 7), "sdpa", TypeError, ["torch.bool", "float32", "may look", "'sdpa_added'"]),
            (torch.ones(5, 7, dtype=torch.int64), "torch", TypeError, ["torch.bool", "int64", "hidden"]),
            (torch.ones(2, 6, 5, 7) > 0, "transformers_eager", TypeError, ["floating point", "bool"]),
            (torch.full((2, 1, 5, 7), -1e4), "transformers_eager", ValueError, ["-10000.0", "bias"]),
            (torch.full((2, 1, 5, 7), 1.0), "transformers_eager", ValueError, ["1.0", "bias"]),
            (torch.full((2, 1, 5, 7), math.nan), "transformers_eager", ValueError, ["nan"]),
            (torch.full((2, 1, 5, 7), -65504.0), "transformers_eager", ValueError, ["-65504"]),
            (torch.tensor([[1, 1, 1, 1, 1, 0, 2]]), "transformers_padding", ValueError, ["2 neither"]),
            (torch.ones(5, 7) > 0, "pytorch", ValueError, ["'pytorch'", "sdpa", "torch_padding"]),
        ],
    )
    def test_masks_that_are_none(self, mask, source, error, words):
        before = mask.clone()
        with refused(error, *words):
            convert_mask(mask, source, "mha_book", self.SHAPE)
        assert torch.equal(mask.nan_to_num(5.0), before.nan_to_num(5.0))

    @pytest.mark.parametrize(
        "arguments, error, words",
        [
            (dict(mask=np.ones((5, 7), bool)), TypeError, ["mask", "numpy.ndarray", "from_numpy"]),
            (dict(mask=[[True] * 7] * 5), TypeError, ["mask", "list"]),
            (dict(mask=None), TypeError, ["mask", "NoneType"]),
            (dict(mask=True), TypeError, ["mask", "bool"]),
            (dict(mask=torch.ones(5, 7, dtype=torch.bool, device="meta")), ValueError, ["mask", "meta"]),
            (dict(mask=torch.ones(2, 7) * 1j, source="transformers_padding"), TypeError, ["complex64"]),
            (dict(source=None), TypeError, ["MASK_DIALECTS", "None"]),
            (dict(target=["keras"]), TypeError, ["MASK_DIALECTS", "['keras']"]),
            (dict(shape=None), ValueError, ["four ints", "None"]),
            (dict(shape=(2, 6, 5, 7.0)), ValueError, ["four ints", "7.0"]),
            (dict(shape=(2, 6, 5, True)), ValueError, ["four ints", "True"]),
            (dict(shape=(2, 6, 5, -7)), ValueError, ["four ints", "-7"]),
            (dict(dtype=torch.int32), TypeError, ["dtype", "int32"]),
            (dict(dtype="float32"), TypeError, ["dtype", "'float32'"]),
        ],
    )
    def test_arguments_of_another_type(self, arguments, error, words):
        given = dict(mask=torch.ones(5, 7) > 0, source="sdpa", target="sdpa_added", shape=self.SHAPE) | arguments
        with refused(error, *words):
            convert_mask(**given)

    def test_targets_that_do_not_exist(self):
        with refused(ValueError, "'jax'", *MASK_DIALECTS):
            convert_mask(torch.ones(5, 7) > 0, "sdpa", "jax", self.SHAPE)

    @pytest.mark.parametrize("shape", [(2, 6, 5), (2, 6, 5, 7, 1)])
    def test_shapes_that_are_no_four_sizes(self, shape):
        with refused(ValueError, "batch, query heads, queries, keys", str(shape)):
            convert_mask(torch.ones(5, 7) > 0, "sdpa", "keras", shape)

    @pytest.mark.parametrize(
        "kept, target, words",
        [
            ((1, 6, 1, 7), "torch_padding", ["h, m", "b m"]),
            ((2, 1, 5, 7), "transformers_padding", ["b, n, m", "b m"]),
            ((1, 1, 5, 1), "torch_padding", ["along n;", "b m"]),
        ],
    )
    def test_what_the_target_cannot_say(self, kept, target, words):
        mask = (torch.arange(math.prod(kept)) % 3 == 0).reshape(kept)
        with refused(ValueError, *words):
            convert_mask(mask, "mha_book", target, self.SHAPE)
