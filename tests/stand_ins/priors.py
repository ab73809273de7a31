"""Priors of molecules by name, those that ship and small ones, and when two densities agree."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor

from openmm_eqflow.flows.storage import load_flow
from openmm_eqflow.priors.fit import fit_internal_prior
from openmm_eqflow.targets.constraints import Constraints
from stand_ins.flows import chain_prior, coupled_torsions, methanol_prior, stream, water_prior


def held_water() -> Any:
    """Both bonds held, heavy ends: the metric follows the angle."""
    held = Constraints({(0, 1): 0.1, (0, 2): 0.1}, [2.0, 12.0, 12.0])
    x = water_prior().sample(300, generator=stream(6))
    return fit_internal_prior(x, [(0, 1), (0, 2)], held.masses, constraints=held)


@cache
def prior_of(name: str) -> Any:
    made = {
        "water": water_prior,
        "methanol": methanol_prior,
        "held water": held_water,
        "conformers": lambda: chain_prior(torsions=coupled_torsions()),
    }
    return made[name]() if name in made else load_flow(name).prior


def agree(a: Tensor, b: Tensor) -> bool:
    return bool(((a - b).abs() <= 1e-9 * (1 + b.abs())).all())
