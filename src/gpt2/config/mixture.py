"""The corpora of a run, their weights and the phases of these, from what is typed. Pure.

`--data_root web=data/web:0.7 code=data/code:0.3` names corpora, folders and weights; `--mixture`
has weights that change. A phase begins at a step of the sampler, so nothing changes when the run
becomes longer. What a checkpoint holds of phases that have begun is never computed again.
"""

import hashlib
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from gpt2.base.errors import ConfigError
from gpt2.base.validation import require, suggestion
from gpt2.data.batch_ramp import BatchRamp
from gpt2.data.mixture import Mixture, Phase, corpus_name

Weights = Mapping[str, Fraction]
"""by name of corpus; any numbers: their ratios count"""
NUMBER = r"\d{0,15}\.?\d{1,15}(?:[eE][+-]?\d{1,2})?"
CORPUS = re.compile(rf"(?:(?P<name>\w+)=)?(?P<root>.*?)(?::(?P<weight>{NUMBER}))?", re.DOTALL)
HOST = re.compile(r"[\w.+-]+://[^/]*")
"""a URL without a path: what follows its colon is a port"""
SETTING = re.compile(rf"(?P<name>\w+)=(?P<value>{NUMBER})")
UNTIL = "until"
SMALLEST_SHARE = Fraction(1, 10**6)


@dataclass(frozen=True)
class CorpusRoot:
    """One corpus of a run, as it is typed."""

    name: str
    """"" for the only one of a run"""
    root: str
    """folder, glob or URL of its shards"""
    weight: Fraction | None
    """None: by its size, or as --mixture says"""

    @property
    def text(self) -> str:
        """As it is typed without a weight."""
        return f"{self.name}={self.root}"


@dataclass(frozen=True)
class TypedPhase:
    """Weights up to a share of the run."""

    until: Fraction | None
    """None: to the end of the run"""
    weights: Weights


@dataclass(frozen=True)
class StepPhase:
    """Weights from a step of the sampler on."""

    first_step: int
    weights: dict[str, int]

    @classmethod
    def of(cls, first_step: int, weights: Weights) -> "StepPhase":
        """With whole numbers in the same ratios, as small as possible."""
        factor = math.lcm(*(weight.denominator for weight in weights.values()))
        whole = {name: int(weight * factor) for name, weight in sorted(weights.items())}
        common = math.gcd(*whole.values())
        return cls(first_step, {name: weight // common for name, weight in whole.items()})

    @property
    def shares(self) -> dict[str, float]:
        """Of the rows, by name of corpus."""
        total = sum(self.weights.values())
        return {name: weight / total for name, weight in self.weights.items()}

    def has_weights_of(self, other: "StepPhase") -> bool:
        return _positive(self.weights) == _positive(other.weights)


def is_named(root: str) -> bool:
    """Whether a text begins with a name of a corpus."""
    found = CORPUS.fullmatch(root)
    return found is not None and bool(found["name"])


def corpora(roots: Sequence[str]) -> tuple[CorpusRoot, ...]:
    """The corpora that --data_root names, in the order of their names.

    A single one that is not NAME=FOLDER:WEIGHT has no name: its whole text is a folder, glob or
    URL. Raises ConfigError if a name is missing or not unique, or if some have a weight and others
    have none.
    """
    require(bool(roots), "--data_root has no value; use --data_root FOLDER")
    if len(roots) == 1 and not _is_named_with_weight(roots[0]):
        return (CorpusRoot("", roots[0], None),)
    found = [_corpus(text) for text in roots]
    names = [corpus.name for corpus in found]
    for name in names:
        require(
            names.count(name) == 1,
            f"--data_root has two corpora with the name {name}; use NAME=FOLDER for each of them",
        )
    weighted = [corpus.name for corpus in found if corpus.weight is not None]
    require(
        len(weighted) in (0, len(found)),
        f"--data_root has a weight for {', '.join(weighted)}, but not for "
        f"{', '.join(item.text for item in found if item.weight is None)}; expected "
        "NAME=FOLDER:WEIGHT with a number of 0 or more for each, or no weights, which is by sizes",
    )
    if weighted:
        _require_weights({item.name: item.weight or Fraction(0) for item in found}, "--data_root")
    return tuple(sorted(found, key=lambda corpus: corpus.name))


def root_of(text: str) -> str:
    """The folder, glob or URL of a corpus that --data_root may name beside others; of a text
    without a name the whole. Raises ConfigError for a name without a folder."""
    return _corpus(text).root if is_named(text) else text


def phases(settings: Sequence[str], names: Iterable[str]) -> tuple[TypedPhase, ...]:
    """The phases that --mixture describes, such as `until=0.8 web=0.7 code=0.3`.

    A corpus that a phase does not name has no rows in it. Raises ConfigError for a corpus that is
    not one of `names`, and if the phases do not follow each other up to the end of the run.
    """
    found = [_phase(text, names) for text in settings]
    ends = [phase.until for phase in found]
    for number, (before, end) in enumerate(itertools.pairwise((Fraction(0), *ends)), 1):
        is_last = number == len(ends)
        require(
            (end is None) == is_last and (end is None or (before or 0) < end < 1),
            f"--mixture: phase {number} of {len(ends)} has until={_shown(end)}; expected "
            + ("none: the last one is to the end of the run" if is_last else _between(before)),
        )
    return tuple(found)


@dataclass(frozen=True)
class TypedMixture:
    """What is typed of a mixture: the same at a resume, if its phases are to stay as they are. The
    folders may have moved."""

    weights: tuple[tuple[str, Fraction | None], ...]
    """by name of corpus; None for one without a weight"""
    phases: tuple[TypedPhase, ...]


def typed(roots: Sequence[str], settings: Sequence[str]) -> TypedMixture:
    """The mixture that --data_root and --mixture describe.

    Raises ConfigError as `corpora` and `phases` do, and if weights are in both options.
    """
    found = corpora(roots)
    require(
        not settings or all(corpus.weight is None for corpus in found),
        "--data_root and --mixture both have weights; use one of them (--mixture without a value "
        "has none)",
    )
    weights = tuple((corpus.name, corpus.weight) for corpus in found)
    return TypedMixture(weights, phases(settings, [corpus.name for corpus in found]))


def without_weights(roots: Sequence[str]) -> tuple[str, ...]:
    """Several corpora as they are typed without weights; one stays as it is."""
    if len(roots) < 2:
        return tuple(roots)
    return tuple(_corpus(root).text for root in roots)


def has_weights(roots: Sequence[str]) -> bool:
    """Whether --data_root has the weights of the corpora."""
    return any(corpus.weight is not None for corpus in corpora(roots)) if roots else False


def planned(
    named: Sequence[CorpusRoot],
    settings: Sequence[str],
    sizes: Mapping[str, int],
    total_steps: int,
) -> tuple[StepPhase, ...]:
    """The phases of a run of `total_steps` that begins now. `sizes` are the training rows of each
    corpus, which are its weights if none are typed.

    Raises ConfigError as `phases` does, and for a corpus that is too small beside the others.
    """
    if settings:
        found, first_step = [], 0
        for phase in phases(settings, [corpus.name for corpus in named]):
            found.append(StepPhase.of(first_step, phase.weights))
            first_step = round((phase.until or 1) * total_steps)
        # Of phases that begin at the same step, as in a short run, the last one counts.
        return tuple({phase.first_step: phase for phase in found}.values())
    weights = {item.name: item.weight for item in named if item.weight is not None}
    if not weights:
        weights = {name: Fraction(rows) for name, rows in sizes.items()}
        _require_weights(weights, "--data_root, by sizes")
    return (StepPhase.of(0, weights),)


def continued(
    begun: Sequence[StepPhase], wanted: Sequence[StepPhase], step: int
) -> tuple[StepPhase, ...]:
    """The phases of a run that has trained `step` steps of the sampler by the phases `begun`, and
    goes on by those that are `wanted`: phases that have begun stay."""
    past = [phase for phase in begun if phase.first_step < step]
    now = [phase for phase in wanted if phase.first_step <= step][-1]
    future = [phase for phase in wanted if phase.first_step > step]
    if past and past[-1].has_weights_of(now):
        return (*past, *future)
    return (*past, StepPhase(step, now.weights), *future)


def phases_from(found: Sequence[StepPhase], step: int) -> list[StepPhase]:
    """The phase of a step of the sampler, and those that follow it."""
    ends = [*(phase.first_step for phase in found[1:]), math.inf]
    return [phase for phase, end in zip(found, ends, strict=True) if step < end]


def mixture_of(
    found: Sequence[StepPhase], names: Sequence[str], ramp: BatchRamp, seed: int
) -> Mixture:
    """What the sampler takes from the corpora with these names, in their order."""
    return Mixture(
        tuple(
            Phase(
                ramp.rows_before(phase.first_step),
                tuple(phase.weights.get(name, 0) for name in names),
            )
            for phase in found
        ),
        seed,
        tuple(_seed_of(name, seed) for name in names),
    )


def to_plain(found: Sequence[StepPhase]) -> list[dict[str, Any]]:
    """As `from_plain` takes it out of a checkpoint."""
    return [{"first_step": phase.first_step, "weights": dict(phase.weights)} for phase in found]


def from_plain(values: Iterable[Mapping[str, Any]]) -> tuple[StepPhase, ...]:
    """The phases that a checkpoint holds."""
    return tuple(
        StepPhase(int(value["first_step"]), {str(k): int(v) for k, v in value["weights"].items()})
        for value in values
    )


def text_of(phase: Mapping[str, Any]) -> str:
    """A table of [[mixture]] in a TOML file as --mixture takes it."""
    return " ".join(f"{name}={value}" for name, value in phase.items())


def _seed_of(name: str, seed: int) -> int:
    """Of the order of a corpus: it stays the same if other corpora are added."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8])


def _is_named_with_weight(root: str) -> bool:
    found = CORPUS.fullmatch(root)
    return found is not None and bool(found["name"] and found["weight"])


def _corpus(text: str) -> CorpusRoot:
    found = CORPUS.fullmatch(text)
    assert found is not None  # `root` matches every text of one line
    root, weight = found["root"], found["weight"]
    if weight is not None and weight.isdigit() and HOST.fullmatch(root):
        root, weight = f"{root}:{weight}", None
    name = found["name"] or corpus_name(root)
    is_misspelt = found["name"] is None and "=" in text.partition("/")[0]
    require(
        bool(name) and bool(root) and name != UNTIL and not is_misspelt,
        f"expected a corpus as NAME=FOLDER:WEIGHT, with a name of letters and digits other than "
        f"{UNTIL}, got {text!r}",
    )
    return CorpusRoot(name, root, None if weight is None else Fraction(weight))


def _phase(text: str, names: Iterable[str]) -> TypedPhase:
    known, weights, until = [*names], dict[str, Fraction](), None
    for item in text.split():
        found = SETTING.fullmatch(item)
        if found is None:
            raise ConfigError(
                f"--mixture: expected NAME=WEIGHT or until=SHARE, got {item}; use for example "
                "'until=0.8 web=0.7 code=0.3' 'web=0.2 code=0.8'"
            )
        name, value = found["name"], Fraction(found["value"])
        if name == UNTIL:
            require(until is None, f"--mixture {text!r} has two values of {UNTIL}")
            until = value
            continue
        require(
            name in known,
            f"--mixture: {name} is no corpus of --data_root{suggestion(name, known)}; expected one "
            f"of {', '.join(filter(None, known)) or 'several, or of one with NAME=FOLDER:1'}",
        )
        require(name not in weights, f"--mixture has two weights for {name} in one phase")
        weights[name] = value
    _require_weights(weights, f"--mixture {text!r}")
    return TypedPhase(until, weights)


def _require_weights(weights: Weights, source: str) -> None:
    total = sum(weights.values())
    require(total > 0, f"{source} has no weight above 0")
    for name, weight in weights.items():
        require(
            not weight or weight >= SMALLEST_SHARE * total,
            f"{source}: the weight of {name} is {float(weight / total):.2g} of all; expected 0, or "
            f"at least {float(SMALLEST_SHARE):g}",
        )


def _positive(weights: Mapping[str, int]) -> dict[str, int]:
    return {name: weight for name, weight in weights.items() if weight}


def _shown(until: Fraction | None) -> str:
    return "none" if until is None else f"{float(until):g}"


def _between(before: Fraction | None) -> str:
    return f"a share of the run, more than {float(before or 0):g} and less than 1"
