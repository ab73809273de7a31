"""The prior from chemistry: what turns, what does not, and the conformers of rings."""

from __future__ import annotations

import math

import pytest
import torch
from openmm import app, unit
from stand_ins import TESTS
from stand_ins.flows import mixed_water, stream, water_prior

from openmm_eqflow import BoltzmannTarget, load_system
from openmm_eqflow.analysis.observables import torsion_angles
from openmm_eqflow.priors.chemistry import chemical_prior
from openmm_eqflow.priors.internal import InternalCoordinatePrior
from openmm_eqflow.runs.stages import build_target


def test_a_mixture_integrates_to_one_and_its_samples_have_its_shares() -> None:
    prior, n = mixed_water(), 200_000
    z = 2 * torch.randn(n, 3, generator=stream(0), dtype=torch.float64)
    log_r = -0.5 * (z / 2).square().sum(1) - 3 * math.log(2 * math.sqrt(2 * math.pi))
    ratio = torch.exp(prior.latent_log_prob(z) - log_r)
    error = float(ratio.std()) / math.sqrt(n)
    assert error < 0.02
    assert abs(float(ratio.mean()) - 1) < 4.5 * error
    second = (prior.components(z) == 1).double() * ratio
    drawn = (prior.components(prior.sample_latent(n, generator=stream(1))) == 1).double().mean()
    assert abs(float(second.mean() - drawn)) < 5 * error
    one = prior.copy()
    one.mixture = None  # power: another density
    assert (one.latent_log_prob(z) - prior.latent_log_prob(z)).abs().max() > 1


def test_a_mixture_is_stored() -> None:
    prior = mixed_water()
    again = InternalCoordinatePrior.from_state(*prior.state())
    z = prior.sample_latent(20, generator=stream(2))
    assert torch.equal(z, again.sample_latent(20, generator=stream(2)))
    assert torch.equal(prior.latent_log_prob(z), again.latent_log_prob(z))
    assert not any(k.startswith("components") for k in water_prior().state()[1])


@pytest.mark.slow
def test_alanine_dipeptide_turns_about_seven_bonds() -> None:
    """Two of them amides in two basins of shares 0.95 and 0.05; a methyl is threefold."""
    with build_target(load_system("alanine-dipeptide")) as target:
        prior = chemical_prior(target, seed=0)
    assert prior.n_soft == 7
    assert prior.mixture is None
    assert sorted(prior.fold) == [1, 1, 1, 1, 3, 3, 3]
    tau = prior.split(prior.sample_latent(20_000, generator=stream(0)))[1]
    order = torch.polar(torch.ones_like(tau), 2 * tau).mean(0).abs()
    assert int((order > 0.8).sum()) == 2  # amides, whichever basin
    assert int((order < 0.03).sum()) == 5
    amides = tau[:, order > 0.8]
    turned = (amides - amides[:1]).cos() < 0
    share = torch.minimum(turned.double().mean(0), 1 - turned.double().mean(0))
    assert bool(((share - 0.05).abs() < 5 * math.sqrt(0.05 * 0.95 / 20_000)).all())


@pytest.mark.slow
@pytest.mark.parametrize("isomer", ["pro-dipeptide", "pro-dipeptide-cis"])
def test_proline_has_both_puckers_and_both_isomers_from_either(isomer: str) -> None:
    pdb = app.PDBFile(str(TESTS / "data" / f"{isomer}.pdb"))
    system = app.ForceField("amber14-all.xml").createSystem(pdb.topology, constraints=None)
    with BoltzmannTarget(system, pdb.topology, 300 * unit.kelvin, pdb.positions) as target:
        prior = chemical_prior(target, seed=0)
        assert prior.mixture is not None
        assert len(prior.mixture.weights) >= 2
        y = prior.sample_latent(4000, generator=stream(0))
        x, log_volume = prior.to_cartesian(y)
        x = x[torch.isfinite(log_volume)]
        index = {(a.residue.name, a.name): a.index for a in pdb.topology.atoms()}
        keys = (("ACE", "CH3"), ("ACE", "C"), ("PRO", "N"), ("PRO", "CA"))
        a, b, c, d = (index[k] for k in keys)
        omega = torsion_angles(x.numpy(), [(a, b, c, d)])[:, 0]
    cis = float((abs(omega) < math.pi / 2).mean())
    assert abs(cis - 0.5) < 5 * math.sqrt(0.25 / 4000)
