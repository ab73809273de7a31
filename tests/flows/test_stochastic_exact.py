"""Stochastic flows: Monte Carlo layers, weights and chains are exact, and lies are found out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.integrate import quad
from stand_ins.stochastic import END, PAIR, batch_of, gas, make_pair_flow
from torch import Tensor

from openmm_eqflow.analysis.weights import log_z
from openmm_eqflow.flows.kernels import hamiltonian_step
from openmm_eqflow.flows.softcore import Batch
from openmm_eqflow.flows.stochastic import StochasticFlow
from openmm_eqflow.moves.steps import StateMemory, flow_step


@pytest.fixture(scope="module")
def pair_flow() -> StochasticFlow:
    return make_pair_flow()


# -- Monte Carlo layers ------------------------------------------------------------------------


@pytest.mark.statistical
def test_trajectories_leave_the_level_invariant() -> None:
    exact = quad(PAIR.weight, 0.3, 1.1)[0] / quad(PAIR.weight, 0.3, 15, limit=200)[0]

    def share_of_close_pairs(accept_all: bool) -> tuple[float, float]:
        batch = batch_of(PAIR.draw(8192, 0).numpy())
        if accept_all:

            class Zeros:
                standard_normal = staticmethod(batch.rng.standard_normal)

                @staticmethod
                def random(n: int, dtype: object) -> NDArray[np.float32]:
                    return np.zeros(n, np.float32)

            batch.rng = Zeros()  # type: ignore[assignment]
        batch.set_level(END)
        shares = [batch.relax(END, 0.07, 4) for _ in range(40)]
        assert accept_all or 0.5 < np.mean(shares) < 0.99  # the rejections matter
        x = batch.positions()
        close = np.linalg.norm(x[:, 0] - x[:, 1], axis=1) < 1.1
        return float(close.mean()), float(close.std() / np.sqrt(len(close)))

    mean, error = share_of_close_pairs(False)
    assert abs(mean - exact) < 5 * error
    mean, error = share_of_close_pairs(True)
    assert abs(mean - exact) > 5 * error


def test_overflow_is_rejected() -> None:
    x = gas(16, 5)
    batch = batch_of(x)
    batch.set_level(END)
    before = batch.x.copy()
    assert batch.relax(END, 1e6, 3) == 0.0
    np.testing.assert_array_equal(batch.x, before)
    again = np.empty_like(batch.u)
    again[:] = batch.u
    batch.set_level(END)
    np.testing.assert_array_equal(batch.u, again)


# -- weights -----------------------------------------------------------------------------------


@pytest.mark.statistical
def test_weights_forwards_and_backwards_give_log_z(pair_flow: StochasticFlow) -> None:
    exact = PAIR.log_z()
    x, log_q = pair_flow.sample_and_log_prob(5000, generator=torch.Generator().manual_seed(1))
    u = PAIR.reduced_potential(x)
    ours = log_z((-u - log_q).numpy())
    assert abs(ours.value - exact) < 4 * ours.error
    # Backwards from exact samples: E[1 / w] = 1 / Z.
    y = PAIR.draw(5000, 2)
    inverse = (PAIR.reduced_potential(y) + pair_flow.log_prob(y)).numpy()
    back = log_z(inverse)
    assert abs(-back.value - exact) < 4 * back.error
    # Power: log q dropped, its sign turned.
    for lie in (-u, -u + log_q):
        wrong = log_z(lie.numpy())
        assert abs(wrong.value - exact) > 4 * wrong.error


@pytest.mark.statistical
def test_log_z_without_the_determinants_is_wrong(
    pair_flow: StochasticFlow, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Batch.transport
    monkeypatch.setattr(Batch, "transport", lambda self, *rest: 0.0 * honest(self, *rest))
    x, log_q = pair_flow.sample_and_log_prob(5000, generator=torch.Generator().manual_seed(1))
    wrong = log_z((-PAIR.reduced_potential(x) - log_q).numpy())
    assert abs(wrong.value - PAIR.log_z()) > 4 * wrong.error


@pytest.mark.statistical
@pytest.mark.parametrize("factor", [1.0, 0.0, -1.0])
def test_chains_that_accept_by_paths_are_exact(pair_flow: StochasticFlow, factor: float) -> None:
    """Metropolis over (x, path), local moves in between; power control: log q times 0 or -1."""

    class Altered:
        def sample_and_log_prob(
            self, n: int, *, generator: torch.Generator | None = None
        ) -> tuple[Tensor, Tensor]:
            x, log_q = pair_flow.sample_and_log_prob(n, generator=generator)
            return x, factor * log_q

        def log_prob(self, x: Tensor) -> Tensor:
            return factor * pair_flow.log_prob(x)

    generator = torch.Generator().manual_seed(5)
    x = PAIR.draw(2000, 6)
    memory = StateMemory()
    means, moved = [], []
    for step in range(24):
        if step % 3 == 2:  # new states: their paths are drawn backwards
            x, _ = hamiltonian_step(PAIR, x, step_size=0.1, n_steps=3, generator=generator)
        x, info = flow_step(Altered(), PAIR, x, 1, generator, memory=memory)
        moved.append(float(info.accepted.double().mean()))
        if step >= 8:
            means.append((x[:, 0] - x[:, 1]).norm(dim=-1).numpy())
    per_chain = np.mean(means, axis=0)
    error = per_chain.std(ddof=1) / np.sqrt(len(per_chain))
    gap = abs(per_chain.mean() - PAIR.mean(lambda d: d))
    if factor == 1.0:
        assert np.mean(moved) > 0.3
        assert gap < 5 * error
    else:
        assert gap > 5 * error


def test_same_seed_same_paths(pair_flow: StochasticFlow) -> None:
    one, two, other = (
        pair_flow.sample_and_log_prob(300, generator=torch.Generator().manual_seed(seed))
        for seed in (3, 3, 4)
    )
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert not torch.equal(one[1], other[1])
    x = one[0][:20]
    assert torch.equal(pair_flow.log_prob(x), pair_flow.log_prob(x))
    assert float(x.mean(1).abs().max()) < 1e-12
    # log q-hat has the mean of its density's logarithm from below, not log q of the sample's path.
    assert not torch.equal(pair_flow.log_prob(x), one[1][:20])
