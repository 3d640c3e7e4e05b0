"""The ladder on file: what two models lose, and gain in time, when heads go, by some twenty rules and trainings.

What follows from the scores is not in the file: ratios, intervals and verdicts are computed from them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shorter
from typing import Any

import torch

from ..heads.weight_split import HeadLayout
from ..lab.frontier import bootstrap
from .ladder_plan import planned
from .measured import Origin, Row, Table, provenance, read_file
from .stepwise import run_steps, taken_up

# The file


WHOLE = "all heads"
NUMBERS = dict(dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class Rung:
    "A model with fewer heads, and how it does."

    model: str
    name: str
    kept: list[list[list[int]]]  # sets of heads -> layer -> those that stay
    given: list[int]  # which set each text got; none where there is one set
    active: float  # heads of all layers that a token gets, mean over texts
    flops: float  # of the attention layers, mean over texts
    steps: int  # of its tuning
    rate: float  # of Adam
    seconds: float  # CPU time of all of its training
    course: list[float]  # the loss in training, tenth by tenth
    scores: list[float]  # the encoder's, of each line; the language model's loss, of each text
    distances: list[float]  # the encoder's squared distance, of each text


@dataclass(frozen=True)
class Ladder(Origin):
    "A file of rungs: origin, models and texts, what heads are worth, every rung's scores, and times."

    complete: bool  # False where it was broken off
    seconds: float  # CPU time
    sizes: dict[str, int]  # how many texts and steps
    layouts: dict[str, list[list[int]]]  # model -> layer -> h, g, d, dv
    kinds: list[str]  # of the encoder's texts
    lengths: dict[str, list[int]]  # model -> tokens of each text
    importance: dict[str, list[list[float]]]  # by model, or model and lengths -> layer -> heads
    rungs: list[Rung]
    tables: list[Table]

    def __post_init__(self):
        super().__post_init__()
        self._check_least(seconds=0)
        _check_models(self.layouts, self.lengths, self.kinds)
        for name, rows in self.importance.items():
            _check_importance(name, rows, self.layouts)
        for i, rung in enumerate(self.rungs):
            _check_rung(rung, self, f"rungs[{i}]")
        names = [(rung.model, rung.name) for rung in self.rungs]
        for places in names, [(table.suite, table.mode, *table.size) for table in self.tables]:
            if len(set(places)) < len(places):
                raise ValueError("the same was measured twice")

    def rung(self, model: str, name: str) -> Rung | None:
        "If it was measured."
        return next((rung for rung in self.rungs if (rung.model, rung.name) == (model, name)), None)

    def table(self, model: str, mode: str, tokens: int | None = None) -> Table | None:
        "Times of that mode, for inputs of so many tokens, if they were measured."
        found = (one for one in self.tables if (one.suite, one.mode) == (model, mode))
        return next((one for one in found if tokens in (None, one.size[1])), None)

    def heads(self, model: str) -> int:
        "Of all layers."
        return sum(h for h, *_ in self.layouts[model])

    def score(
        self,
        rung: Rung,
        base: Rung | None = None,  # minus this one's; unless told as it is
    ) -> tuple[float, float, float]:  # what it is, and the interval over lines
        "The encoder's mean score; the language model's perplexity as a multiple of the whole model's, or of `base`'s."
        if rung.model == "language":
            base = base or self.rung("language", WHOLE)
            pairs = torch.tensor([rung.scores, base.scores], **NUMBERS).mT
            return bootstrap(pairs, lambda rows: (rows[..., 0] - rows[..., 1]).mean(-1).exp(), self.seed)
        pairs = torch.tensor([rung.scores, base.scores if base else [0.0] * len(rung.scores)], **NUMBERS).mT
        return bootstrap(pairs, lambda rows: (rows[..., 0] - rows[..., 1]).mean(-1), self.seed)

    def error(
        self,
        rung: Rung,
        base: Rung | None = None,  # divided by this one's; unless told as it is
    ) -> tuple[float, float, float]:  # what it is, and the interval over lines and what became of them
        "The encoder's mean squared distance. Texts of one line are drawn together."
        each = self.kinds.index("line", 1) if "line" in self.kinds[1:] else len(self.kinds)
        pairs = torch.tensor([rung.distances, (base or rung).distances], **NUMBERS).unflatten(1, (-1, each)).mean(-1)
        if base is None:
            return bootstrap(pairs.mT, lambda rows: rows[..., 0].mean(-1), self.seed)
        return bootstrap(pairs.mT, lambda rows: rows[..., 0].mean(-1) / rows[..., 1].mean(-1), self.seed)

    def share(self, rung: Rung) -> float:
        "Of the whole model's FLOPs in its attention layers."
        return rung.flops / self.rung(rung.model, WHOLE).flops


def _check_models(layouts: dict, lengths: dict, kinds: list[str]) -> None:
    "ValueError for models that differ, for layers that are not cut into heads, and for texts without length."
    if not layouts or layouts.keys() != lengths.keys():
        raise ValueError(f"models differ: layouts {shorter([*layouts])}, lengths {shorter([*lengths])}")
    for model, layers in layouts.items():
        for sizes in layers:
            try:
                HeadLayout(*sizes)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{shorter(model)}: {shorter(sizes)} is not h, g, d, dv: {error}") from None
        if min(lengths[model], default=0) < 1:
            raise ValueError(f"{shorter(model)}: lengths {shorter(lengths[model])} are not those of texts")
    if "encoder" in lengths and len(kinds) != len(lengths["encoder"]):
        raise ValueError(f"{len(kinds)} kinds of {len(lengths['encoder'])} texts")


def _check_importance(name: str, rows: list[list[float]], layouts: dict) -> None:
    "ValueError for another number of heads than the model has, and for importance below 0."
    model = name.partition(", ")[0]
    if model not in layouts or [*map(len, rows)] != [h for h, *_ in layouts[model]]:
        raise ValueError(f"importance of {shorter(name)} is not that of a model's heads")
    if min(map(min, rows)) < 0:
        raise ValueError(f"importance of {shorter(name)} holds a number below 0")


def _check_rung(rung: Rung, file: Ladder, where: str) -> None:
    "ValueError for numbers that no rung could have."
    if rung.model not in file.layouts:
        raise ValueError(f"{where}: there is no model {shorter(rung.model)}")
    texts, shape = len(file.lengths[rung.model]), [h for h, *_ in file.layouts[rung.model]]
    for heads in rung.kept:
        if len(heads) != len(shape) or any({*row} - {*range(h)} for row, h in zip(heads, shape)):
            raise ValueError(f"{where}: kept holds a layer or a head that there is not")
    if len(rung.given) not in (0, texts) or {*rung.given} - {*range(len(rung.kept))}:
        raise ValueError(f"{where}: given is not one of its sets for each text")
    if not 0 < rung.active <= sum(shape) or rung.flops <= 0 or min(rung.steps, rung.rate, rung.seconds) < 0:
        raise ValueError(f"{where}: active {rung.active}, flops {rung.flops}, or a cost below 0")
    lines = file.kinds.count("line") if rung.model == "encoder" else texts
    if (len(rung.scores), len(rung.distances)) != (lines, texts * (rung.model == "encoder")):
        raise ValueError(f"{where} has {len(rung.scores)} scores and {len(rung.distances)} distances")
    if min([*rung.distances, *rung.course], default=0) < 0 or not all(-1.001 <= s for s in rung.scores):
        raise ValueError(f"{where} holds a number that is too small")


def as_ladder(found: dict[str, Any]) -> Ladder:
    "What `run_ladder` found, as it would be read from its file."
    tables = [Table(**one | dict(rows=[Row(**row) for row in one["rows"]])) for one in found["tables"]]
    return Ladder(**found | dict(command="-", rungs=[Rung(**one) for one in found["rungs"]], tables=tables))


def read_ladder(path: Path | str) -> Ladder:  # a file of `mha-book ladder`
    "The ladder in a file. Raises as `mha_book.bench.measured.read_file` does."
    return read_file(Ladder, path)


# The run


def run_ladder(
    subjects: list,  # `EncoderRungs`, `LanguageRungs`
    sizes: dict[str, int],
    seed: int,
    before: Ladder | None,  # an unfinished file of the same settings
    tell: Callable[[int, int], object],  # told (how much is done, of how much)
    keep: Callable[[dict[str, Any]], object] = lambda found: None,  # gets what is there after each step
) -> tuple[dict[str, Any], BaseException | None]:  # a `Ladder` without its command; what stopped it
    "Measure what heads are worth, climb each rung, time them. Ctrl-C or a failure ends it, and what is done is kept."
    device = subjects[0].device
    found = provenance(device) | _begun(subjects, sizes, seed, before)
    return found, run_steps(found, device, lambda: planned(subjects, found), tell, keep)


def _begun(subjects: list, sizes: dict[str, int], seed: int, before: Ladder | None) -> dict[str, Any]:
    "The fields of a file in which nothing is measured, or what was. ValueError where that is of other settings."
    kinds = next((one.kinds for one in subjects if one.name == "encoder"), [])
    found = dict(dtype="float32", threads=1, seed=seed, complete=False, seconds=0.0, sizes=sizes, kinds=kinds)
    found |= dict(layouts={one.name: one.layouts for one in subjects}, importance={}, rungs=[], tables=[])
    found |= dict(lengths={one.name: one.lengths for one in subjects})
    settings = "seed", "sizes", "layouts", "kinds", "lengths"
    return taken_up(found, before, settings, ("seconds", "importance", "rungs", "tables"))


# What it says


def show_ladder(found: Ladder) -> str:
    "Each rung, in the order in which they were climbed: heads, FLOPs, quality and times."
    lines = []
    for model in found.layouts:
        rungs = [rung for rung in found.rungs if rung.model == model]
        whole = found.rung(model, WHOLE)
        what = {"encoder": "score, squared distance", "language": "perplexity, as a multiple of the whole model's"}
        lines += [f"{model}, {found.heads(model)} heads: heads, FLOPs, {what[model]}"] if whole else []
        for rung in rungs if whole else []:
            value, low, high = found.score(rung)
            error = f"  {found.error(rung)[0]:.4f}" if rung.distances else ""
            numbers = f"{rung.active:6.1f} {found.share(rung):5.2f}  {value:.4f} ({low:.4f} to {high:.4f}){error}"
            lines.append(f"  {rung.name:52}{numbers}")
    for table in found.tables:
        size = " x ".join(map(str, table.size[:2]))
        lines.append(f"{table.suite}, {table.mode}, {size} tokens: time, band ±{table.band:.3f}")
        lines += [f"  {row.name:52}{row.ratio:6.3f} ({row.low:.3f} to {row.high:.3f})" for row in table.rows]
    return "\n".join(lines)
