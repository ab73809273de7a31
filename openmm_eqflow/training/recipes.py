"""How long each stage takes and which flow it trains, by kind of system and budget.

A recipe is data: it is written into the run's config.yaml, where every number can be read, and a
system's ``settings`` (system.yaml) override single entries.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.training.schedule import schedule_misfit

__all__ = [
    "BUDGETS",
    "STOCHASTIC_OPTIONS",
    "Budget",
    "Recipe",
    "make_recipe",
]

Budget = Literal["quick", "standard", "thorough"]
BUDGETS: tuple[Budget, ...] = ("quick", "standard", "thorough")

#: Of a stochastic flow: levels of one sample and leapfrog steps on each; configurations and
#: stride (kT) of the fit; reach (nm) and splines of the field.
STOCHASTIC_OPTIONS: Mapping[str, float] = {
    "n_levels": 1000,
    "n_leapfrog": 16,
    "n_fit": 2048,
    "stride": 0.04,
    "reach": 5.0,
    "n_splines": 50,
}


@dataclass(frozen=True)
class Recipe:
    """Resolved settings of a run.

    Attributes
    ----------
    reference_seconds, train_seconds
        Wall clock of the two long stages.
    min_frames
        Below this many reference frames the stage goes on, up to four times its seconds.
    max_frames
        Reference frames after which the stage stops early.
    method
        Of the stage reference: ``tempering``, or ``annealing``, which :func:`make_recipe` gives
        bonded molecules up to 50 atoms and which needs no dynamics: points of a prior from
        chemistry are annealed to the target with exact weights
        (:func:`~openmm_eqflow.flows.adapt.path_from_chemistry`), and no barrier of a torsion is in
        their way. Its levels are a flow of their own; ``train_seconds`` is then the time of a
        field on its points, which is taken instead where it pays.
    ess, n_points
        Of an annealed path: relative ESS asked for, from which the number of levels follows, and
        points of an adaptive round.
    density
        What an annealed run samples with: ``paths`` the cheapest per effective sample of levels,
        field and both; ``pointwise`` the field alone, which has a log q of every configuration.
    check_with_md
        1 for parallel tempering beside an annealed path, as an independent answer in the report.
    prior, objective
        ``internal`` + ``liouville`` for bonded molecules, ``gaussian`` + ``flow-matching`` else.
        ``objective`` may combine several: ``{name: [[fraction, weight], ...]}``, weights piecewise
        linear in the fraction of training done (:mod:`~openmm_eqflow.training.schedule`).
    field
        Keyword arguments of the vector field; for molecules ``contacts`` (hidden units) adds
        distances between atoms, which costs two to three times the time and pays in ESS.
    prior_rounds, prior_samples
        Refinement of the internal-coordinate prior on its own samples.
    n_pool, chunk, n_chunks, grow_every
        Liouville pool: initial prior points, points and number of later chunks, steps between.
    max_pool
        Points the Liouville pool keeps at most, the newest ones; 0 for all.
    annealed
        With a mapping, later chunks hold points of the whole path between prior and target, moved
        by Hamiltonian Monte Carlo, and so does the held-out pool: for molecules whose prior is so
        poor that the pool's few points near the target would be learnt by heart. Its entries are
        keyword arguments of :class:`~openmm_eqflow.training.pool.PathSampler`.
    ode_steps
        RK4 steps of objectives that simulate the flow (nll, reverse-kl, path-forward,
        path-reverse).
    max_steps
        Training steps at most, 0 for as many as ``train_seconds`` allow: a training that is the
        same on every machine needs a number of steps.
    patience
        Evaluations without a better validation loss that end the training; 0 for never.
    finetune
        A second training, with a fresh optimiser, that starts from the averaged weights of the
        first: the entries in which it differs, ``objective`` and ``train_seconds`` at least. Flow
        matching, then path gradients, is what it is for (Vaitl, Klein 2025, arXiv:2505.10139).
    stochastic
        With a mapping, the flow is a :class:`~openmm_eqflow.flows.stochastic.StochasticFlow`,
        fitted along a path without data; entries differ from :data:`STOCHASTIC_OPTIONS`. Fields,
        batches and training times of this recipe are then not used.
    precision
        Of the network in the training loss: float32, or on a GPU tf32 or bfloat16.
    n_shards
        Parts a batch is worked on in, which fixes the random stream; 0 for one per core.
    n_evaluate
        Independent flow samples behind the reported ESS.
    n_samples, n_chains, n_proposals, n_local_steps
        MCMC: samples kept, chains, flow proposals per step, Hamiltonian steps in between (0 for
        none).
    """

    reference_seconds: float
    train_seconds: float
    min_frames: int = 400
    max_frames: int = 40_000
    method: str = "tempering"
    ess: float = 0.9
    n_points: int = 1000
    density: str = "paths"
    check_with_md: int = 0
    prior: str = "internal"
    objective: str | Mapping[str, Any] = "liouville"
    field: Mapping[str, Any] | None = None
    batch_size: int = 512
    learning_rate: float = 2e-3
    average: float = 0.999
    gradient_clip: float = 2.0
    prior_rounds: int = 3
    prior_samples: int = 40_000
    n_pool: int = 100_000
    chunk: int = 30_000
    n_chunks: int = 30
    grow_every: int = 100
    max_pool: int = 0
    annealed: Mapping[str, Any] | None = None
    grid_tolerance: float = 5e-5
    ode_steps: int = 8
    max_steps: int = 0
    patience: int = 0
    finetune: Mapping[str, Any] | None = None
    stochastic: Mapping[str, Any] | None = None
    precision: str = "float32"
    n_shards: int = 0
    n_evaluate: int = 10_000
    n_samples: int = 10_000
    n_chains: int = 50
    n_proposals: int = 4
    n_local_steps: int = 20

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    def stochastic_options(self) -> dict[str, float]:
        """Return the entries of ``stochastic`` with their defaults."""
        return {**STOCHASTIC_OPTIONS, **(self.stochastic or {})}

    def trainings(self) -> tuple[Recipe, ...]:
        """Return the recipe of each training in turn, one or two."""
        first = replace(self, finetune=None)
        return (first, replace(first, **self.finetune)) if self.finetune else (first,)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Recipe:
        """Rebuild; unknown keys are errors."""
        check_keys(content, "recipe")
        return cls(**content)


def check_keys(content: Mapping[str, Any], where: str) -> None:
    """Raise ConfigurationError for a key that is no recipe entry, or a value of a wrong type."""
    known = [f.name for f in fields(Recipe)]
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected one of {known}"
            raise ConfigurationError(f"{where}: unknown key {key!r}; {hint}")
        value, wanted = content[key], _misfit(key, content[key])
        if wanted is not None:
            raise ConfigurationError(f"{where}: key {key!r} is {value!r}, expected {wanted}")


def _finetune_misfit(value: Mapping[str, Any]) -> str | None:
    for key in value:
        if key not in _FINETUNE:
            near = difflib.get_close_matches(key, _FINETUNE, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(_FINETUNE)}"
            return f"entries of a training in it (not {key!r}; {hint})"
        if (wanted := _misfit(key, value[key])) is not None:
            return f"{wanted} as its {key!r}"
    missing = [key for key in ("objective", "train_seconds") if key not in value]
    return f"a mapping with {' and '.join(map(repr, missing))}" if missing else None


def _stochastic_misfit(value: Mapping[str, Any]) -> str | None:
    for key, number in value.items():
        if key not in STOCHASTIC_OPTIONS:
            near = difflib.get_close_matches(key, STOCHASTIC_OPTIONS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {list(STOCHASTIC_OPTIONS)}"
            return f"entries of a stochastic flow in it (not {key!r}; {hint})"
        kinds = (int,) if isinstance(STOCHASTIC_OPTIONS[key], int) else (int, float)
        if isinstance(number, bool) or not isinstance(number, kinds) or not 0 < number < math.inf:
            whole = "a whole number" if kinds == (int,) else "a number"
            return f"{whole} above 0 as its {key!r}"
        if key == "n_levels" and number < 2:
            return "at least 2 as its 'n_levels'"
    return None


def _misfit(key: str, value: Any) -> str | None:
    """Say what the entry should be, or None if ``value`` is that."""
    example = getattr(_EXAMPLE, key)
    if key == "objective":
        return schedule_misfit(value)
    if key == "precision":
        return None if value in _PRECISIONS else f"one of {', '.join(_PRECISIONS)}"
    if key in _CHOICES:
        return None if value in _CHOICES[key] else f"one of {', '.join(_CHOICES[key])}"
    if key == "ess" and not (isinstance(value, (int, float)) and 0 < value < 1):
        return "a number above 0 and below 1"
    if key == "ode_steps" and value == 0:
        return "at least 1"
    if example is None:
        if key == "finetune" and isinstance(value, Mapping):
            return _finetune_misfit(value)
        if key == "stochastic" and isinstance(value, Mapping):
            return _stochastic_misfit(value)
        return None if value is None or isinstance(value, Mapping) else "a mapping"
    if isinstance(example, str):
        return None if isinstance(value, str) else "text"
    kinds = (int,) if isinstance(example, int) else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 <= value < math.inf:
        return "a whole number" if isinstance(example, int) else "a number that is not negative"
    return "more than 0" if key.endswith("_seconds") and value == 0 else None


_EXAMPLE = Recipe(1.0, 1.0)
_CHOICES = {"method": ("tempering", "annealing"), "density": ("paths", "pointwise")}
#: Of an annealed path, whose levels do most of the work. Its chains take stored independent
#: samples, one a step: after a local move the state would need a path of its own.
_CHAINS_OF_PATHS = {"method": "annealing", "n_proposals": 1, "n_local_steps": 0}
_ANNEALED: dict[Budget, dict[str, Any]] = {
    "quick": {
        "ess": 0.88, "n_points": 1_000, "train_seconds": 10, "max_frames": 1_000,
        "n_pool": 20_000, "chunk": 10_000, "n_chunks": 4, "n_samples": 5_000, **_CHAINS_OF_PATHS,
    },
    "standard": {
        "ess": 0.96, "n_points": 2_000, "train_seconds": 30, "max_frames": 3_000,
        "n_pool": 40_000, "n_samples": 7_000, **_CHAINS_OF_PATHS,
    },
    "thorough": {
        "ess": 0.98, "n_points": 4_000, "train_seconds": 1200, "max_frames": 20_000,
        "n_samples": 16_000, **_CHAINS_OF_PATHS,
    },
}  # fmt: skip
#: Atoms up to which a molecule is annealed unless something else is asked for.
_ANNEALED_ATOMS = 50
#: Above so many atoms levels are dear, and a round needs more points: less is asked for.
_DEAR_ATOMS = 40
_DEAR: dict[Budget, dict[str, Any]] = {
    "quick": {"ess": 0.4, "n_points": 2_000},
    "standard": {"ess": 0.7, "n_points": 4_000},
    "thorough": {"ess": 0.85, "n_points": 8_000},
}
#: Entries that mean something to reference dynamics alone: who sets them wants those.
_OF_DYNAMICS = ("reference_seconds", "min_frames")
_PRECISIONS = ("float32", "tf32", "bfloat16")  # as in precision.py, which loads torch
#: Entries a second training may differ in.
_FINETUNE = (
    "objective",
    "train_seconds",
    "max_steps",
    "batch_size",
    "n_shards",
    "learning_rate",
    "average",
    "gradient_clip",
    "ode_steps",
    "patience",
)
_SECTIONS = ("recipe", "reference", *BUDGETS)
_MOLECULE: dict[Budget, Recipe] = {
    "quick": Recipe(45, 90, n_pool=60_000, n_chunks=8, n_evaluate=10_000, n_samples=5_000),
    "standard": Recipe(180, 450),
    "thorough": Recipe(
        900,
        2100,
        field={"contacts": 64},
        n_pool=200_000,
        chunk=60_000,
        n_chunks=50,
        grow_every=200,
        n_evaluate=20_000,
        n_samples=20_000,
    ),
}
_CLUSTER = Recipe(
    60,
    480,
    prior="gaussian",
    objective="flow-matching",
    field={
        "width": 32,
        "n_layers": 2,
        "n_vectors": 8,
        "readout_width": 32,
        "n_steps": 3,
        "n_nodes": 32,
        "n_rbf": 16,
    },
    batch_size=256,
    gradient_clip=10.0,
    grid_tolerance=3e-3,
    n_evaluate=10_000,
    n_samples=2_000,
)


#: Atoms up to which a quick run of a molecule counts its points in full, and the fewest it counts.
_QUICK_ATOMS = 28
_QUICK_LEAST = {
    "prior_samples": 4000,
    "n_pool": 6000,
    "chunk": 3000,
    "n_evaluate": 1000,
    "n_samples": 1000,
}


def make_recipe(
    kind: str,
    budget: Budget,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    n_particles: int = 0,
    method: str | None = None,
    ess: float | None = None,
    check_with_md: int | None = None,
) -> Recipe:
    """Recipe of a kind of system at a budget.

    Parameters
    ----------
    kind
        ``molecule``, ``cluster`` or ``harmonic``.
    budget
        One of :data:`BUDGETS`.
    overrides
        ``settings`` of system.yaml: its ``recipe`` section holds for every budget, its sections
        ``quick``, ``standard`` and ``thorough`` for one.
    n_particles
        A point of a large molecule costs more time and memory: of a quick run, which is to end in
        minutes, points get fewer in proportion to the number of atoms to the power -3/2.
    method, ess, check_with_md
        Instead of the recipe's. A bonded molecule of 50 atoms or fewer is annealed, unless
        ``overrides`` have a section ``reference`` or entries of dynamics (``reference_seconds``,
        ``min_frames``): they mean tempering, as do larger molecules and whatever is no molecule.

    Raises
    ------
    ConfigurationError
        An unknown or impossible entry, or a path asked for where there is none.
    """
    if budget not in BUDGETS:
        raise ConfigurationError(f"budget is {budget!r}, expected one of {', '.join(BUDGETS)}")
    for section in overrides or {}:
        if section not in _SECTIONS:
            near = difflib.get_close_matches(section, _SECTIONS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected one of {_SECTIONS}"
            raise ConfigurationError(f"settings: unknown section {section!r}; {hint}")
    if kind == "molecule":
        recipe = _MOLECULE[budget]
        if budget == "quick" and n_particles > _QUICK_ATOMS:
            share = (_QUICK_ATOMS / n_particles) ** 1.5
            recipe = replace(
                recipe,
                **{k: max(n, round(share * getattr(recipe, k))) for k, n in _QUICK_LEAST.items()},
            )
    else:
        scale = {"quick": 0.2, "standard": 1.0, "thorough": 4.0}[budget]
        n = {"quick": 1_000, "standard": 10_000, "thorough": 20_000}[budget]
        recipe = replace(
            _CLUSTER,
            reference_seconds=scale * _CLUSTER.reference_seconds,
            train_seconds=scale * _CLUSTER.train_seconds,
            n_evaluate=n,
            n_samples=n // 5,
        )
    changes: dict[str, Any] = {}
    for section in ("recipe", budget):
        own = dict((overrides or {}).get(section, {}))
        check_keys(own, f"settings.{section}")
        changes |= own
    given = {"method": method, "ess": ess, "check_with_md": check_with_md}
    asked = {key: value for key, value in given.items() if value is not None}
    check_keys(asked, "options")
    changes |= asked
    dynamics = _wants_dynamics(kind, n_particles, overrides, changes)
    annealing = changes.get("method", "tempering" if dynamics else "annealing") == "annealing"
    if annealing:
        # A large molecule's quick run counts fewer samples already.
        fewer = {"n_samples": min(recipe.n_samples, _ANNEALED[budget]["n_samples"])}
        dear = _DEAR[budget] if n_particles > _DEAR_ATOMS else {}
        changes = {**_ANNEALED[budget], **fewer, **dear, **changes}
    recipe = replace(recipe, **changes)
    if annealing and (recipe.prior != "internal" or recipe.stochastic is not None):
        raise ConfigurationError(
            "only bonded molecules have a prior from chemistry: take method: tempering"
        )
    for name, value in (("ess", ess), ("check_with_md", check_with_md)):
        if value is not None and not annealing:
            raise ConfigurationError(f"{name} is for annealed paths: add --method annealing")
    return recipe


def _wants_dynamics(
    kind: str,
    n_particles: int,
    overrides: Mapping[str, Mapping[str, Any]] | None,
    changes: Mapping[str, Any],
) -> bool:
    """Whether a system is tempered unless annealing is asked for."""
    return (
        kind != "molecule"
        or n_particles > _ANNEALED_ATOMS
        or "reference" in (overrides or {})
        or any(key in changes for key in _OF_DYNAMICS)
        or changes.get("prior", "internal") != "internal"
        or changes.get("stochastic") is not None
    )
