"""Data files are read strictly: whatever is wrong with one is a ValueError that begins with its name."""

import copy
import json
import math
import os

import pytest
import torch

from mha_book.bench.ablations import Ablations, read_ablations
from mha_book.bench.ladder import read_ladder
from mha_book.bench.measured import memory, provenance, read_measurement, side_by_side, write_file
from mha_book.bench.precision import read_precision
from mha_book.bench.trials import Trials, read_trials
from mha_book.models.encoder import EncoderConfig, check_pooling, load_state, load_tokenizer, read_json
from mha_book.models.language_model import read_gguf
from support.refusals import refused

pytestmark = pytest.mark.usefixtures("own_messages")
ORIGIN = provenance(torch.device("cpu")) | dict(command="mha-book", dtype="float32", threads=1, seed=0)
ROW = dict(name="a", ratio=1.0, low=0.9, high=1.1, seconds=1e-3, peak_bytes=1, share=0.5, compile_seconds=None, note="")
TRAINING = dict(vocab=7, tokens=10, width=12, heads=3, blocks=2, batch=2, steps=20, warm_up=5, record=5)
POINT = dict(model="m", rule="uniform", budget=4.5, exact_first=0, way="rounded", bits=4.5, scores=[0.1, 0.2])
RUNG = dict(model="m", name="one", kept=[[[0]]], given=[], active=1.0, flops=9.0, steps=0, rate=0.0, seconds=0.0)
RUNG |= dict(course=[], scores=[0.1, 0.2], distances=[])
GOOD = {
    "measurement": ORIGIN
    | dict(rounds=15, machine=dict(flops=1e9, bandwidth=1e9))
    | dict(tables=[dict(suite="layers", mode="forward", size=[1, 2, 6, 3], rows=[ROW, ROW | dict(name="b")])]),
    "trials": ORIGIN
    | dict(complete=True, seconds=1.5, training=TRAINING | dict(weight_decay=0.1, max_norm=1.0))
    | dict(treatments={"plain": "nothing is held"}, rates=[0.1, 0.2], seeds=1)
    | dict(runs=[dict(treatment="plain", rate=r, seed=0, losses=[3.0, 2.0], largest=[1.0, 1.0]) for r in (0.1, 0.2)]),
    "ablations": ORIGIN
    | dict(seconds=1.0, tokens={"one": 5}, base={"one": 2.0}, losses={"one": [[2.5, 2.0], [2.0, 3.0]]}),
    "precision": ORIGIN
    | dict(
        complete=False, seconds=1.5, sizes=dict(texts=2), layouts={"m": {"a": [2, 1, 4, 4]}}, formats={"m": ["int4"]}
    )
    | dict(traits={"m": {"entropy": {"a": [0.5]}}})
    | dict(effects=[dict(model="m", exact_first=0, layer="a", effects=[[[0.1]], [[0.2]]])])
    | dict(points=[POINT, POINT | dict(rule="other")]),
    "ladder": ORIGIN
    | dict(complete=False, seconds=1.5, sizes=dict(texts=2), layouts={"m": [[2, 1, 4, 4]]}, kinds=[])
    | dict(lengths={"m": [5, 6]}, importance={"m": [[0.1, 0.2]]}, tables=[])
    | dict(rungs=[RUNG, RUNG | dict(name="other")]),
}
READ = {"measurement": read_measurement, "trials": read_trials, "ablations": read_ablations}
READ |= {"precision": read_precision, "ladder": read_ladder}


def test_the_files_that_are_broken_below_are_good_ones(tmp_path):
    for name, data in GOOD.items():
        (tmp_path / "m.json").write_text(json.dumps(data))
        READ[name](tmp_path / "m.json")


# The text of a file


def odd_texts(good):
    "Texts that are nearly `good`, or nothing like it."
    return {
        "twice": good.replace('"seed": 0', '"seed": 0, "seed": 7', 1),
        "twice, the same": good.replace('"seed": 0', '"seed": 0, "seed": 0', 1),
        "twice, further in": good.replace('"torch":', '"python": "3", "torch":', 1),
        "cut off": good[: len(good) // 2],
        "more": good + good,
        "empty": "",
        "deep": "[" * 100_000,
        "deep objects": '{"a":' * 100_000,
        "a list": f"[{good}]",
        "a text": json.dumps(good),
        "null": "null",
        "a number": "1",
        "NaN": good.replace('"seed": 0', '"seed": NaN', 1),
        "infinite": good.replace('"seed": 0', '"seed": -Infinity', 1),
        "beyond floats": good.replace('"seed": 0', '"seed": 1e999', 1),
        "beyond 64 bits": good.replace('"seed": 0', f'"seed": {2**63}', 1),
        "5000 digits": good.replace('"seed": 0', f'"seed": {"9" * 5000}', 1),
        "a comment": good + "// end",
        "a mark of order": "\ufeff" + good,
        "a strange name": good.replace('"seed"', '"s\\u001b[31m"', 1),
        "half a letter": good.replace('"float32"', '"\\ud800"', 1),
        "single quotes": good.replace('"', "'"),
        "a name too many": good.replace('"seed": 0', '"seed": 0, "surprise": 1', 1),
    }


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize("way", odd_texts(""))
def test_a_text_that_is_wrong_is_refused_by_the_files_name(tmp_path, kind, way):
    file, text = tmp_path / "m.json", odd_texts(json.dumps(GOOD[kind]))[way]
    assert text != json.dumps(GOOD[kind])
    file.write_text(text, encoding="utf8")
    with pytest.raises(ValueError) as error:
        READ[kind](file)
    assert str(error.value).startswith("m.json: ") and len(str(error.value)) < 500
    assert str(error.value).isprintable()


def test_the_name_that_stands_twice_is_said(tmp_path):
    (tmp_path / "m.json").write_text('{"a": [{"b": 1, "c": 2, "b": 1}]}')
    with refused(ValueError, "m.json: says 'b' twice"):
        read_json(tmp_path / "m.json")


@pytest.mark.parametrize("code", ["utf-16", "utf-8-sig", "latin-1"])
def test_another_encoding_is_refused(tmp_path, code):
    data = GOOD["measurement"] | dict(command="mha-book √ é".replace("√", "" if code == "latin-1" else "√"))
    (tmp_path / "m.json").write_text(json.dumps(data, ensure_ascii=False), encoding=code)
    with refused(ValueError, "m.json: "):
        read_measurement(tmp_path / "m.json")


def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    for path, name in ((tmp_path / "pipe", "pipe"), (tmp_path, tmp_path.name), (".", ".")):
        with refused(ValueError, f"{name}: a folder, a pipe or a device, no regular file"):
            read_measurement(path)
    with pytest.raises(FileNotFoundError):
        read_measurement(tmp_path / "none.json")
    with refused(ValueError, ": embedded null"):
        read_measurement(tmp_path / "a\0b")
    with (tmp_path / "vast.json").open("wb") as file:
        file.truncate(2**40)  # a file with a hole: it takes no room
    with refused(ValueError, "vast.json: 1099511627776 bytes; at most 67108864"):
        read_measurement(tmp_path / "vast.json")


# What stands in it


ODD = [
    None,
    True,
    False,
    0,
    -1,
    1.5,
    2**63,
    10**400,
    math.nan,
    -math.inf,
    "",
    "x",
    "\x1b[31m",
    "7",
    [],
    {},
    [[]],
    {"a": []},
]
ODD += [-0.5, 2**62, [None], ["x" * 5000], {"x": 1}, "2026-01-01T00:00:00+05:00"]


def places(data, place=()):
    "The way to everything inside."
    yield place
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, item in items:
        yield from places(item, (*place, key))


def changed(data, place, value):
    "A copy with another value in one place."
    if not place:
        return value
    data = copy.deepcopy(data)
    inner = data
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return data


@pytest.mark.parametrize("kind", GOOD)
def test_anything_in_any_place_is_read_or_refused_by_name(tmp_path, kind):
    "What is read can be shown and written again; everything else is a ValueError."
    file, read = tmp_path / "m.json", 0
    for place in places(GOOD[kind]):
        for value in ODD:
            file.write_text(json.dumps(changed(GOOD[kind], place, value)))
            try:
                found = READ[kind](file)
            except ValueError as error:
                assert str(error).startswith("m.json: ") and len(str(error)) < 1000, (place, value)
                assert str(error).isprintable(), (place, value)
                continue
            read += 1
            assert found.head.isprintable()
            if kind == "measurement":
                for table in found.tables:
                    side_by_side({"m": found}, table.suite, table.mode, table.size, memory)
            write_file(type(found), file, json.loads(file.read_text()))
            assert READ[kind](file) == found
    assert read > 5, "names and numbers that are merely others"


@pytest.mark.parametrize("kind", GOOD)
def test_a_truth_is_no_number(tmp_path, kind):
    "Where a number may stand, True and False may not."
    for place in places(GOOD[kind]):
        value = GOOD[kind]
        for key in place:
            value = value[key]
        if type(value) in (int, float):
            (tmp_path / "m.json").write_text(json.dumps(changed(GOOD[kind], place, True)))
            with refused(ValueError, "m.json: ", "True"):
                READ[kind](tmp_path / "m.json")


def test_what_a_reader_would_refuse_is_not_written(tmp_path):
    for kind, which in (("trials", Trials), ("ablations", Ablations)):
        with refused(ValueError, "seed is True"):
            write_file(which, tmp_path / "m.json", GOOD[kind] | dict(seed=True))
    assert [*tmp_path.iterdir()] == []


def write(path, data):
    path.write_text(json.dumps(data))
    return path


# Files of a model


BERT = dict(model_type="bert", hidden_act="gelu", position_embedding_type="absolute", vocab_size=11, hidden_size=6)
BERT |= dict(num_attention_heads=2, num_hidden_layers=1, intermediate_size=10, max_position_embeddings=7)
BERT |= dict(type_vocab_size=3, layer_norm_eps=1e-12)


def test_the_sizes_of_a_model_are_read_as_strictly(tmp_path):
    file = tmp_path / "config.json"
    assert EncoderConfig.from_json(write(file, BERT)).embed_dim == 6
    for name in BERT:
        for value in (None, True, -1, 0, math.nan, math.inf, "12", [], {}, 0.5 if name != "layer_norm_eps" else "x"):
            with refused(ValueError, f"config.json: {name} is "):
                EncoderConfig.from_json(write(file, BERT | {name: value}))
    texts = odd_texts(json.dumps(BERT | dict(seed=0)))  # it has many names that we do not need, and one more
    for way in (
        "twice",
        "cut off",
        "more",
        "empty",
        "deep",
        "a list",
        "null",
        "5000 digits",
        "a comment",
        "single quotes",
    ):
        file.write_text(texts[way])
        with refused(ValueError, "config.json: "):
            EncoderConfig.from_json(file)
    with refused(ValueError, "config.json: hidden_size 6 is no multiple of num_attention_heads 4"):
        EncoderConfig.from_json(write(file, BERT | dict(num_attention_heads=4)))


def test_the_other_files_of_a_model_name_themselves(tmp_path):
    (tmp_path / "1_Pooling").mkdir()
    write(tmp_path / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": True})
    for modules in ([1], [{}], [{"type": 3}], []):
        write(tmp_path / "modules.json", modules)
        with refused(ValueError, "the model pools by"):
            check_pooling(tmp_path)
    write(tmp_path / "modules.json", {})
    with refused(ValueError, "modules.json: holds a dict at the top, not a list"):
        check_pooling(tmp_path)
    for length in (None, True, 0, "128", 1.5):
        write(tmp_path / "sentence_bert_config.json", {"max_seq_length": length})
        with refused(ValueError, "sentence_bert_config.json: max_seq_length is"):
            load_tokenizer(tmp_path)
    write(tmp_path / "sentence_bert_config.json", {"max_seq_length": 128})
    (tmp_path / "tokenizer.json").write_text("{")
    pytest.importorskip("tokenizers")
    with refused(ValueError, "tokenizer.json: "):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"\xff" * 100, b"GGUF", b"GGUF" + b"\3\0\0\0" + b"\xff" * 16, b"GGUF" + bytes(8)]
)
def test_weights_that_are_cut_off_name_their_file(tmp_path, data):
    for name, read in (("m.safetensors", lambda path: load_state(path, {})), ("m.gguf", read_gguf)):
        pytest.importorskip(name.split(".")[1])
        (tmp_path / name).write_bytes(data)
        with refused(ValueError, f"{name}: "):
            read(tmp_path / name)
