"""Flow steps with the flows that ship for dw4 and lj13, against long independent MCMC.

Chains start in equilibrium, far from each other (every one comes from its own Hamiltonian chain),
and each gives one average: standard errors need no autocorrelation time. The virial is known
exactly: the mean of sum_i x_i . grad_i u is (N - 1) D.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from stand_ins.lies import LyingFlow
from torch import Tensor

from openmm_eqflow.flows.flow import EquivariantFlow
from openmm_eqflow.flows.kernels import hamiltonian_step, tune_step_size
from openmm_eqflow.flows.storage import load_flow
from openmm_eqflow.moves.steps import ProposalBuffer, StateMemory, flow_step
from openmm_eqflow.runs.stages import build_target
from openmm_eqflow.targets.library import load_system
from openmm_eqflow.targets.target import BoltzmannTarget
from openmm_eqflow.units import positions_in_nm

pytestmark = [pytest.mark.slow, pytest.mark.statistical]

EDGES = {"dw4": np.linspace(1.5, 8.0, 11), "lj13": np.linspace(0.7, 2.7, 11)}
N_CHAINS = {"dw4": 100, "lj13": 32}
N_FLOW_STEPS = {"dw4": 6, "lj13": 5}


class Case(NamedTuple):
    name: str
    flow: EquivariantFlow
    target: BoltzmannTarget
    equilibrium: Tensor
    known: np.ndarray
    known_error: np.ndarray


def observables(case_name: str, target: BoltzmannTarget, x: Tensor) -> np.ndarray:
    """u, virial and ten fractions of the pair distances, (n, 12)."""
    u, gradient = target.reduced_potential_and_gradient(x)
    virial = (x * gradient).sum((1, 2))
    i, j = np.triu_indices(x.shape[1], 1)
    d = (x[:, i] - x[:, j]).norm(dim=-1).numpy()
    bins = np.digitize(d, EDGES[case_name])
    fractions = [(bins == k).mean(1) for k in range(1, len(EDGES[case_name]))]
    return np.column_stack([u.numpy(), virial.numpy(), *fractions])


def long_independent_chains(case_name: str, target: BoltzmannTarget, start: Tensor):
    """Hamiltonian Monte Carlo: last states, mean and standard error of every observable."""
    generator = torch.Generator().manual_seed(1)
    x = start.repeat(400, 1, 1)
    x = x + 0.02 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    size, x = tune_step_size(
        partial(hamiltonian_step, target, n_steps=20, generator=generator), x
    )
    seen = []
    for k in range(250):
        x, _ = hamiltonian_step(target, x, step_size=size, n_steps=20, generator=generator)
        if k >= 100 and k % 5 == 0:
            seen.append(observables(case_name, target, x))
    chains = np.mean(seen, axis=0)
    return x, chains.mean(0), chains.std(0, ddof=1) / np.sqrt(len(chains))


@pytest.fixture(scope="module", params=["dw4", "lj13"])
def case(request):
    system = load_system(request.param)
    flow = load_flow(system.directory / "flow")
    with build_target(system) as target:
        start = torch.from_numpy(positions_in_nm(system.positions))[:, : system.n_dims]
        yield Case(
            request.param, flow, target, *long_independent_chains(request.param, target, start)
        )


class Recorded:
    """The flow's own draws, made once and dealt out again to every sampler under test."""

    def __init__(self, flow: EquivariantFlow, n: int) -> None:
        self.flow, self.dealt = flow, 0
        self.draws = flow.sample_and_log_prob(n, generator=torch.Generator().manual_seed(2))

    def sample_and_log_prob(self, n: int, *, generator: torch.Generator | None = None):
        rows = slice(self.dealt, self.dealt + n)
        self.dealt += n
        assert self.dealt <= len(self.draws[0])
        return tuple(values[rows] for values in self.draws)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.flow.log_prob(x)


@pytest.fixture(scope="module")
def recorded(case: Case) -> Recorded:
    return Recorded(case.flow, N_CHAINS[case.name] * N_FLOW_STEPS[case.name])


def z_scores(case: Case, recorded: Recorded, density: object) -> np.ndarray:
    """Chains that start in equilibrium: flow steps, a short local move half way."""
    recorded.dealt = 0
    generator = torch.Generator().manual_seed(3)
    n = N_CHAINS[case.name]
    x = case.equilibrium[:n]
    buffer = ProposalBuffer(density, case.target, n_proposals=1, n_predraw=n)
    memory = StateMemory()
    seen = []
    for k in range(N_FLOW_STEPS[case.name]):
        if k == N_FLOW_STEPS[case.name] // 2:
            x, _ = hamiltonian_step(case.target, x, step_size=0.02, n_steps=4, generator=generator)
        x, _ = flow_step(density, case.target, x, buffer, generator, memory=memory)
        seen.append(observables(case.name, case.target, x))
    chains = np.mean(seen[1:], axis=0)
    error = np.hypot(chains.std(0, ddof=1) / np.sqrt(n), case.known_error)
    z = (chains.mean(0) - case.known) / np.maximum(error, 1e-12)
    # Nearly empty bins have no Gaussian errors and say nothing.
    return z[np.concatenate([[True, True], case.known[2:] > 0.005])]


def agrees(z: np.ndarray) -> bool:
    # Ten bins together get a wider gate than the two averages.
    return bool(np.abs(z[:2]).max() < 3.0 and np.abs(z[2:]).max() < 4.0)


def test_the_reference_has_the_exact_virial(case: Case) -> None:
    exact = (case.flow.n_particles - 1) * case.flow.n_dims
    assert abs(case.known[1] - exact) < 3 * case.known_error[1]
    assert case.known_error[1] < 0.1 * exact


def test_flow_moves_keep_the_distribution(case: Case, recorded: Recorded) -> None:
    assert agrees(z_scores(case, recorded, recorded))


@pytest.mark.parametrize("lie", ["dropped", "turned"])
def test_power_without_log_q_or_with_its_sign_wrong(
    case: Case, recorded: Recorded, lie: str
) -> None:
    assert not agrees(z_scores(case, recorded, LyingFlow(recorded, lie)))
