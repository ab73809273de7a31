"""Cartesian fields: which permutations they keep, blocks of a batch, statistics, refusals."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from stand_ins.fields import cartesian_field, data
from torch import nn

from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.geometry import remove_mean
from openmm_eqflow.vector_fields import leave_one_out
from openmm_eqflow.vector_fields.baselines import EGNNField, MLPField
from openmm_eqflow.vector_fields.features import fit_pair_statistics, pair_classes
from openmm_eqflow.vector_fields.kernel import KernelField
from openmm_eqflow.vector_fields.leave_one_out import LeaveOneOutField


def test_declared_permutations_only() -> None:
    x = data(100, 3)
    classes = [0, 1, 1, 1, 2, 3]  # like a methyl: 1, 2, 3 exchangeable
    bonds = [
        [0, 1, 1, 1, 1, 2],
        [1, 0, 2, 2, 2, 3],
        [1, 2, 0, 2, 2, 3],
        [1, 2, 2, 0, 2, 3],
        [1, 2, 2, 2, 0, 1],
        [2, 3, 3, 3, 1, 0],
    ]
    t = torch.tensor(0.3, dtype=torch.float64)
    for cls in (KernelField, EGNNField, LeaveOneOutField):
        torch.manual_seed(1)
        field = cls.fit(x, classes=classes, bond_distances=bonds).double()
        for parameter in field.parameters():
            nn.init.normal_(parameter, std=0.2)
        field.requires_grad_(False)
        y = data(2, 3, seed=5)
        velocity = field(t, y)
        cycle, swap = [0, 2, 3, 1, 4, 5], [4, 1, 2, 3, 0, 5]
        torch.testing.assert_close(field(t, y[:, cycle]), velocity[:, cycle])
        assert float((field(t, y[:, swap]) - velocity[:, swap]).abs().max()) > 1e-4


@pytest.mark.parametrize("single_time", [True, False])
def test_blocks_of_a_batch_change_nothing(
    single_time: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    field = cartesian_field("leave_one_out", 3)
    y = data(7, 3, seed=3)
    t = torch.tensor(0.3, dtype=y.dtype) if single_time else torch.linspace(0, 1, 7).to(y)
    whole, divergence = field.with_divergence(t, y)
    sizes: list[int] = []
    trunk = field.trunk.forward
    monkeypatch.setattr(leave_one_out, "_BLOCK_PAIRS", 2 * 6**2)
    monkeypatch.setattr(field.trunk, "forward", lambda x, *a: sizes.append(len(x)) or trunk(x, *a))
    parts, divergence_of_parts = field.with_divergence(t, y)
    assert sizes == [2, 2, 2, 1]
    torch.testing.assert_close(parts, whole, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(divergence_of_parts, divergence, atol=1e-10, rtol=1e-12)
    torch.testing.assert_close(field(t, y), whole, atol=1e-12, rtol=1e-12)


def test_contacts_are_resolved_whatever_the_size_of_the_cluster() -> None:
    """On a cubic lattice of spacing 2 every nearest neighbour is at 2, in 8 sites and in 64."""
    grids = [torch.cartesian_prod(*[2.0 * torch.arange(k).double()] * 3) for k in (2, 4)]
    made = [
        fit_pair_statistics(torch.stack([x, x]), [0] * len(x), resolve="contacts") for x in grids
    ]
    assert made[0] == made[1]
    assert made[0]["pair_mean"] == [pytest.approx(2.0)]
    assert 0.0 < made[0]["pair_spread"][0] < made[0]["length"] < 1.0
    spreads = [
        fit_pair_statistics(torch.stack([x, x]), [0] * len(x))["pair_spread"][0] for x in grids
    ]
    assert spreads[1] > 1.5 * spreads[0]
    field = LeaveOneOutField.fit(torch.stack([grids[0]] * 2), classes=[0] * 8, resolve="contacts")
    assert field.config["pair_mean"] == made[0]["pair_mean"]
    assert "resolve" not in field.config


def test_divergence_on_several_threads() -> None:
    x = remove_mean(torch.randn(64, 4, 2, generator=torch.Generator().manual_seed(3)))
    field = MLPField.fit(x.double(), width=16).eval()
    t = torch.tensor(0.3)
    expected = field.with_divergence(t, x)[1]
    with ThreadPoolExecutor(4) as executor:
        parts = list(executor.map(lambda part: field.with_divergence(t, part)[1], x.split(1)))
    torch.testing.assert_close(torch.cat(parts), expected)


def test_bad_configurations_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="6 x 6"):
        pair_classes([0] * 6, [[0]])
    with pytest.raises(ConfigurationError, match="at least two"):
        fit_pair_statistics(torch.zeros(1, 6, 3), [0] * 6)
    with pytest.raises(ConfigurationError, match="resolve is 'contact'"):
        fit_pair_statistics(data(3, 3), [0] * 6, resolve="contact")
    with pytest.raises(ConfigurationError, match="for clusters"):
        fit_pair_statistics(data(3, 3), [0] * 6, [[1] * 6] * 6, resolve="contacts")
    with pytest.raises(ConfigurationError, match="pair classes"):
        EGNNField(classes=[0, 1, 2], n_dims=3, pair_mean=[1.0], pair_spread=[1.0], length=1.0)
    with pytest.raises(ConfigurationError, match="reach"):
        KernelField(classes=[0, 0], n_dims=3, reach=0.0)
    with pytest.raises(ConfigurationError, match="n_layers"):
        MLPField(n_particles=2, n_dims=3, length=1.0, n_layers=0)
