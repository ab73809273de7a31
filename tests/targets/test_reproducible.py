"""Same input, same bits: energies however a batch is cut, and the fit of the prior."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stand_ins.flows import CHAIN, chain_prior, stream

from openmm_eqflow.priors.fit import fit_internal_prior, refine_internal_prior
from openmm_eqflow.targets.energies.torch_energy import TorchEnergy
from openmm_eqflow.targets.library import load_system
from openmm_eqflow.units import positions_in_nm


@pytest.fixture(scope="module")
def batch() -> np.ndarray:
    system = load_system("alanine-dipeptide")
    noise = np.random.default_rng(0).normal(size=(1000, system.n_particles, 3))
    return positions_in_nm(system.positions) + 0.005 * noise


@pytest.mark.parametrize("name", ["alanine-dipeptide", "alanine-dipeptide-vacuum"])
@pytest.mark.parametrize("compiled", [True, False])
def test_energies_do_not_depend_on_threads_place_or_memory(batch, name, compiled):
    energy = TorchEnergy(load_system(name).system, compiled=compiled, n_threads=1)
    u, f = energy.energies_and_forces(batch)
    for n_threads in (1, 2, 3, 5):
        energy.n_threads = n_threads
        for shift in range(3):
            # Another address modulo the 64 bytes that vector units and BLAS care about.
            room = np.empty(batch.size + 8)
            x = room[shift : shift + batch.size].reshape(batch.shape)
            x[:] = batch
            again_u, again_f = energy.energies_and_forces(x)
            np.testing.assert_array_equal(again_u, u)
            np.testing.assert_array_equal(again_f, f)
            np.testing.assert_array_equal(energy.energies(x), u)
    if compiled:  # a configuration does not see its neighbours
        part_u, part_f = energy.energies_and_forces(batch[117:390])
        np.testing.assert_array_equal(part_u, u[117:390])
        np.testing.assert_array_equal(part_f, f[117:390])
    energy.close()


def test_refined_prior_is_the_same_every_time():
    truth = chain_prior()
    x = truth.sample(200, generator=stream(1))
    prior = fit_internal_prior(x, *CHAIN, gradient=-truth.gradient(x))
    random = np.random.default_rng(0)
    found = []
    for _ in range(8):
        # Freed memory with other numbers in it: nothing may be read before it is written.
        for n in (8, 16, 40, 100, 400):
            torch.from_numpy(random.integers(0, 2, 4 * n).astype(np.int32)).clone()
        new = refine_internal_prior(
            prior,
            x,
            lambda y: (-truth.log_prob(y), -truth.gradient(y)),
            rounds=1,
            n_samples=500,
            generator=stream(2),
        )
        found.append(torch.cat([new.coefficients.ravel(), new.cholesky.ravel()]))
    assert all(torch.equal(found[0], other) for other in found)
