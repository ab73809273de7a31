"""Every kind of move on alanine dipeptide against parallel tempering, at 300 K and 330 K."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from openmm import unit
from openmmtools.mcmc import LangevinDynamicsMove, MCMCSampler, SequenceMove
from openmmtools.states import SamplerState, ThermodynamicState
from stand_ins import DATA
from stand_ins.lies import LyingFlow
from torch import Tensor

from openmm_eqflow.analysis.chains import autocorrelation_ess, mean_with_error
from openmm_eqflow.analysis.observables import torsion_angles
from openmm_eqflow.analysis.weights import Estimate
from openmm_eqflow.flows.flow import EquivariantFlow
from openmm_eqflow.flows.kernels import hamiltonian_step, tune_step_size
from openmm_eqflow.flows.storage import load_flow
from openmm_eqflow.moves.flow_moves import FlowMove
from openmm_eqflow.moves.steps import (
    LatentKernel,
    ProposalBuffer,
    StateMemory,
    annealed_step,
    flow_step,
    latent_step,
)
from openmm_eqflow.targets.library import load_system
from openmm_eqflow.targets.target import BoltzmannTarget

REFERENCE = json.loads((DATA / "alanine-dipeptide-reference.json").read_text())
TORSIONS = [tuple(t) for t in REFERENCE["torsions"]]
N_CHAINS = 100
pytestmark = [pytest.mark.slow, pytest.mark.statistical]

Step = Callable[[Tensor], Tensor]


class Averages(NamedTuple):
    mean_u: Estimate
    phi_positive: Estimate
    histogram: list[Estimate]


@pytest.fixture(scope="module")
def flow() -> EquivariantFlow:
    return load_flow(DATA / "alanine-dipeptide-flow")


@pytest.fixture(scope="module")
def target():
    system = load_system("alanine-dipeptide")
    with BoltzmannTarget(
        system.system, system.topology, system.temperature, system.positions
    ) as result:
        yield result


def make_step(kind: str, flow: object, target: BoltzmannTarget, seed: int) -> Step:
    generator = torch.Generator().manual_seed(seed)
    if kind in ("independence", "multiple-try"):
        buffer = ProposalBuffer(
            flow,
            target,
            n_proposals=1 if kind == "independence" else 4,
            n_predraw=4096,
            generator=generator,
        )
        memory = StateMemory()
        return lambda x: flow_step(flow, target, x, buffer, generator, memory=memory)[0]
    kernel = LatentKernel(flow, target, 0.4)
    if kind == "latent":
        return lambda x: latent_step(kernel, x, 4, generator)[0]
    return lambda x: annealed_step(kernel, x, 2, 2, generator)[0]


def indicators(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether phi > 0, and the 4 x 4 bin of (phi, psi)."""
    phi, psi = torsion_angles(x, TORSIONS).T
    edges = np.linspace(-np.pi, np.pi, 5)[1:-1]
    return phi > 0.0, np.digitize(phi, edges) * 4 + np.digitize(psi, edges)


def run(
    kind: str,
    flow: object,
    start: EquivariantFlow,
    target: BoltzmannTarget,
    n_steps: int,
    floor: int = 500,
) -> Averages:
    """Many chains of Hamiltonian moves and the move under test, from the flow's own samples."""
    generator = torch.Generator().manual_seed(1)
    samples, log_q = start.sample_and_log_prob(4000, generator=generator)
    log_w = -target.reduced_potential(samples) - log_q
    weights = torch.softmax(torch.nan_to_num(log_w, nan=-torch.inf), 0)
    x = samples[torch.multinomial(weights, N_CHAINS, generator=generator)]
    size, x = tune_step_size(
        partial(hamiltonian_step, target, n_steps=4, generator=generator), x
    )
    step = make_step(kind, flow, target, 2)
    u, positive, bins = [], [], []
    for i in range(n_steps):
        x, _ = hamiltonian_step(target, x, step_size=size, n_steps=4, generator=generator)
        x = step(x)
        if i >= 10:
            u.append(target.reduced_potential(x).numpy())
            a, b = indicators(x.numpy())
            positive.append(a)
            bins.append(b)
    energies, phi = np.stack(u, axis=1), np.stack(positive, axis=1)
    assert min(autocorrelation_ess(energies), autocorrelation_ess(phi)) > floor
    one_hot = np.stack(bins, axis=1)[..., None] == np.arange(16)
    return Averages(
        mean_with_error(energies),
        mean_with_error(phi),
        [mean_with_error(one_hot[..., k]) for k in range(16)],
    )


def z_score(ours: Estimate, reference: list[float]) -> float:
    return (ours.value - reference[0]) / float(np.hypot(ours.error, reference[1]))


def agrees(ours: Averages, reference: dict) -> bool:
    single = [
        z_score(ours.mean_u, reference["mean_u"]),
        z_score(ours.phi_positive, reference["phi_positive"]),
    ]
    # Sixteen bins together get a wider gate; empty and nearly empty ones say nothing.
    many = [
        z_score(bin_, known)
        for bin_, known in zip(ours.histogram, reference.get("histogram", []), strict=False)
        if known[0] > 0.003
    ]
    return max(map(abs, single)) < 3.0 and max(map(abs, many), default=0.0) < 4.0


@pytest.mark.parametrize(
    ("kind", "n_steps"),
    [("independence", 80), ("multiple-try", 60), ("latent", 60), ("annealed", 60)],
)
def test_moves_reproduce_parallel_tempering(
    flow: EquivariantFlow, target: BoltzmannTarget, kind: str, n_steps: int
) -> None:
    assert agrees(run(kind, flow, flow, target, n_steps), REFERENCE["300"])
    for lie in ("dropped", "turned"):
        wrong = LyingFlow(flow, lie)
        # A wrong density may also mix worse: it needs no more samples than show the error.
        assert not agrees(run(kind, wrong, flow, target, 40, floor=100), REFERENCE["300"])


def test_a_flow_trained_at_300_serves_330_kelvin(
    flow: EquivariantFlow, target: BoltzmannTarget
) -> None:
    warm = target.at_temperature(330 * unit.kelvin)
    ours = run("multiple-try", flow, flow, warm, 80)
    assert agrees(ours, REFERENCE["330"])
    assert not agrees(ours, REFERENCE["300"])
    for lie in ("dropped", "turned"):
        wrong = run("multiple-try", LyingFlow(flow, lie), flow, warm, 40, floor=100)
        assert not agrees(wrong, REFERENCE["330"])


def test_flow_move_after_langevin_dynamics(flow: EquivariantFlow) -> None:
    """The same averages from one openmmtools chain."""
    system = load_system("alanine-dipeptide")
    move = FlowMove(flow, n_proposals=16, seed=3)
    langevin = LangevinDynamicsMove(timestep=1 * unit.femtosecond, n_steps=10)
    sampler = MCMCSampler(
        ThermodynamicState(system.system, system.temperature),
        SamplerState(system.positions),
        SequenceMove([langevin, move]),
    )
    u, x = np.empty(700), np.empty((700, 22, 3))
    for i in range(700):
        sampler.run(1)
        x[i] = sampler.sampler_state.positions.value_in_unit(unit.nanometer)
    with BoltzmannTarget(
        system.system, system.topology, system.temperature, system.positions
    ) as target:
        u = target.reduced_potential(torch.from_numpy(x)).numpy()
    mean, positive = mean_with_error(u[10:]), mean_with_error(indicators(x[10:])[0])
    assert mean.error < 0.4
    assert abs(z_score(mean, REFERENCE["300"]["mean_u"])) < 3.0
    assert positive.error < 0.02
    assert abs(z_score(positive, REFERENCE["300"]["phi_positive"])) < 3.0
    assert move.statistics["n_accepted"] > 0.7 * move.statistics["n_proposed"]
    log_z = move.log_z()
    assert abs(log_z.value - -195.593) < 4 * log_z.error
