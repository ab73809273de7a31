r"""What a run will cost, before it is started: minutes, memory, and whether the size is sensible.

Stages that last as long as the recipe says are taken from there; what the recipe counts in points
is multiplied by the cost of a point, measured here and now: energy and forces of the molecule, and
its chart (:class:`~openmm_eqflow.priors.zmatrix.ZMatrix`) with its gradient. How many evaluations
of either a sample, a level of tempering or a round of refinement takes was read off profiles of
molecules of 22 to 72 atoms; expect a factor of two. How many levels a path takes follows from the
molecule's torsions and rings less surely: expect a factor of three.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass

import torch

from openmm_eqflow.errors import UnsupportedSystemError
from openmm_eqflow.parallel import available_threads
from openmm_eqflow.priors.zmatrix import ZMatrix
from openmm_eqflow.runs.stages import EXTENSIONS, build_target
from openmm_eqflow.targets.isomers import Isomers, find_isomers
from openmm_eqflow.targets.library import MolecularSystem
from openmm_eqflow.training.recipes import BUDGETS, Recipe, make_recipe
from openmm_eqflow.units import masses_in_dalton, positions_in_nm

__all__ = [
    "Forecast",
    "describe_system",
    "forecast",
    "measure",
    "pool_bytes",
]

_BATCH = 128
_STEPS_PER_FRAME = 250
#: Energies a step of dynamics costs, of the batched evaluator's on one core.
_DYNAMICS = 2.5
_LARGE, _MEDIUM = 50, 30  # atoms
#: Of a path: levels that a torsion or a ring takes, times -log of the ESS asked for; the compiled
#: chart's share of the time that the other takes; leapfrog steps on a level.
_LEVELS_A_TORSION, _LEVELS_A_RING, _COMPILED, _LEAPFROG = 1.5, 8.0, 0.3, 5


@dataclass(frozen=True)
class Forecast:
    """Minutes and gigabytes of a run, and reference frames of the target temperature."""

    minutes: float
    gigabytes: float
    n_frames: int


def measure(system: MolecularSystem) -> tuple[float, float]:
    """Seconds of one energy with forces in a batch, and of one chart with its gradient."""
    start = positions_in_nm(system.positions)[:, : system.n_dims]
    x = torch.from_numpy(start).expand(_BATCH, *start.shape)
    with build_target(system) as target:
        target.reduced_potential_and_gradient(x)  # compiles
        started = time.perf_counter()
        target.reduced_potential_and_gradient(x)
        energy = (time.perf_counter() - started) / _BATCH
    bonds = [(bond[0].index, bond[1].index) for bond in system.topology.bonds()]
    try:
        chart = ZMatrix.from_bonds(
            system.n_particles, bonds, masses=[float(m) for m in masses_in_dalton(system.system)]
        )
    except UnsupportedSystemError:
        return energy, energy
    for _ in range(2):
        started = time.perf_counter()
        internal = chart.to_internal(x)
        parts = [v.detach().requires_grad_(True) for v in internal]
        y, log_volume = chart.from_internal(type(internal)(*parts))
        torch.autograd.grad(y.sum() + log_volume.sum(), parts, allow_unused=True)
        seconds = (time.perf_counter() - started) / _BATCH
    return energy, seconds


def pool_bytes(n_points: int, n_particles: int) -> int:
    """Memory of a training pool: latent point, two scores (float32), log weight and level."""
    return n_points * (3 * 4 * (3 * n_particles - 6) + 16)


def forecast(
    system: MolecularSystem,
    recipe: Recipe,
    budget: str,
    costs: tuple[float, float],
    isomers: Isomers | None = None,
) -> Forecast:
    """Predict a run of a bonded molecule.

    ``costs`` are those of :func:`measure`; ``isomers`` are needed for an annealed run.
    """
    if recipe.method == "annealing":
        return _annealed(system, recipe, costs, isomers or Isomers((), (), ()))
    energy, chart = costs
    n = system.n_particles
    ratio = float(system.settings.get("reference", {}).get("max_temperature_ratio", 2.2))
    n_temperatures = 1 if ratio == 1.0 else max(3, round(0.85 * math.sqrt(n)))
    rate = 2.0 / (_STEPS_PER_FRAME * n_temperatures * _DYNAMICS * energy)  # frames per second
    enough = min(recipe.min_frames, recipe.max_frames)
    lasting = [k * recipe.reference_seconds for k in EXTENSIONS[budget]]
    reference = next((s for s in lasting if rate * s >= enough), lasting[-1])
    reference = min(reference, recipe.max_frames / rate)
    n_frames = int(min(rate * reference, recipe.max_frames))
    # Hessians at five places, then 2,500 to 8,500 steps at five temperatures.
    reference += (30 * n + 30_000) * _DYNAMICS * energy

    point = energy + chart
    n_pool = recipe.n_pool + recipe.n_chunks * recipe.chunk
    prior = 1.7 * point * recipe.prior_rounds * recipe.prior_samples
    # Chunks are made beside the training, on another core.
    flow = 12.0 * chart + energy
    checks = flow * (1000 + 2 * min(4096, recipe.n_evaluate))  # against the prior, grid, audit
    train = prior + recipe.n_pool * point + recipe.train_seconds + checks
    step = recipe.n_local_steps * energy + recipe.n_proposals * flow
    sample = recipe.n_evaluate * (flow + point) + recipe.n_samples * step
    if recipe.max_pool:
        n_pool = min(n_pool, recipe.max_pool)
    memory = (
        0.5  # libraries
        + 0.02 * min(n, 28)  # chunks of points with their graphs
        + 10 * 8e-9 * 3 * n * recipe.prior_samples  # coordinates, forces, scores and their fit
        + 2e-9 * pool_bytes(n_pool, n)  # old and new pool while it grows
    )
    return Forecast((reference + train + sample + 20.0) / 60.0, memory, n_frames)


def _annealed(
    system: MolecularSystem, recipe: Recipe, costs: tuple[float, float], isomers: Isomers
) -> Forecast:
    """Predict a run whose frames come from a path."""
    n, threads = system.n_particles, available_threads()
    turning = sum(t.kind in ("single", "ester", "amide") and t.fold == 1 for t in isomers.torsions)
    levels = _LEVELS_A_TORSION * turning + _LEVELS_A_RING * len(isomers.rings)
    levels = max(2.0, levels / -math.log(recipe.ess))
    energy = costs[0] + _COMPILED * costs[1]
    sample = _LEAPFROG * levels * energy / threads
    rounds = 6 * recipe.n_points * _LEAPFROG * 15 * energy / threads
    pool = recipe.n_pool + recipe.n_chunks * recipe.chunk
    n_samples = 3 * recipe.n_points + recipe.max_frames + 1000 + recipe.n_evaluate
    seconds = rounds + n_samples * sample + recipe.n_pool * energy + recipe.train_seconds + 35.0
    if recipe.check_with_md:
        seconds += recipe.reference_seconds
    memory = 0.5 + 0.02 * min(n, 28) + 2e-9 * pool_bytes(min(pool, recipe.max_pool or pool), n)
    return Forecast(seconds / 60.0, memory, recipe.max_frames)


def describe_system(system: MolecularSystem) -> tuple[list[str], list[str]]:
    """Lines and warnings for whoever is about to run a molecule.

    Returns
    -------
    lines, warnings
        Isomers, minutes and memory of every budget; what speaks against a run.
    """
    if system.kind != "molecule":
        return [], []
    start = positions_in_nm(system.positions)
    found = find_isomers(system.system, system.topology, start)
    n = system.n_particles
    recipes = {b: make_recipe("molecule", b, system.settings, n) for b in BUDGETS}
    annealed = all(recipe.method == "annealing" for recipe in recipes.values())
    lines = found.lines(system.topology, start, annealed=annealed)
    costs = measure(system)
    cast = {b: forecast(system, recipe, b, costs, found) for b, recipe in recipes.items()}
    text = ", ".join(
        f"{budget} {c.minutes:.0f} min and {c.gigabytes:.1f} GB" for budget, c in cast.items()
    )
    lines.append(
        f"Expected on this machine as busy as it is: {text} (within a factor of "
        f"{'three' if annealed else 'two'})."
    )
    turning = sum(t.kind in ("single", "ester") and t.fold == 1 for t in found.torsions)
    turns = "1 torsion that turns" if turning == 1 else f"{turning} torsions that turn"
    size = "small" if n <= _MEDIUM else "medium" if n <= _LARGE else "large"
    means = {
        "small": "any budget will do",
        "medium": "quick shows that everything works; for results take standard or thorough",
        "large": "beyond what flows of this package have been shown to cover",
    }
    lines.append(f"Size: {size} ({n} atoms, {turns}): {means[size]}.")
    warnings = []
    if size == "large":
        warnings.append(
            f"{n} atoms with {turning} torsions that turn are many: expect few effective samples, "
            "whatever the budget; a smaller model of the same question is the better start"
        )
    few = [b for b, c in cast.items() if c.n_frames < 400]
    if few:
        warnings.append(
            f"{', '.join(few)}: about {cast[few[-1]].n_frames} reference frames at most, too few "
            "for a good prior; raise reference_seconds in system.yaml (settings: recipe)"
        )
    half = 0.5e-9 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    heavy = {b: c for b, c in cast.items() if c.gigabytes > half}
    if heavy:
        most = max(c.gigabytes for c in heavy.values())
        warnings.append(
            f"{', '.join(heavy)} may need {most:.1f} GB, more than half of this machine's: "
            "max_pool in system.yaml (settings: recipe) bounds the largest part"
        )
    return lines, warnings
