"""Detailed balance of the acceptance rules, by enumeration; what flow steps keep in memory."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from stand_ins.moves import GaussianFlow, TwoBasins
from torch import Tensor

from openmm_eqflow.analysis.weights import log_z
from openmm_eqflow.moves.metropolis import (
    log_acceptance_ratio,
    metropolis_accept,
    multiple_try,
    multiple_try_probabilities,
)
from openmm_eqflow.moves.steps import ProposalBuffer, StateMemory, flow_step

INF, NAN = torch.inf, torch.nan
# Four states: ordinary, ordinary, without target mass, heavy where the flow is thin.
TARGET = torch.tensor([0.3, 0.2, 0.0, 0.5], dtype=torch.float64)
FLOW = torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64)


def transition_matrix(log_w: Tensor, n_proposals: int, q: Tensor = FLOW) -> Tensor:
    """Sum over every tuple of proposals, weighted by its probability under q."""
    n = q.shape[0]
    tuples = torch.tensor(list(itertools.product(range(n), repeat=n_proposals)))
    matrix = torch.zeros(n, n, dtype=torch.float64)
    for start in range(n):
        chosen = multiple_try_probabilities(log_w[start].expand(tuples.shape[0]), log_w[tuples])
        chosen = chosen * q[tuples].prod(dim=1, keepdim=True)
        matrix[start, start] += chosen[:, 0].sum()
        matrix[start].index_add_(0, tuples.flatten(), chosen[:, 1:].flatten())
    return matrix


def balance_defect(matrix: Tensor, target: Tensor = TARGET) -> float:
    flux = target[:, None] * matrix
    return float((flux - flux.T).abs().max())


@pytest.mark.parametrize("n_proposals", [1, 2, 4])
def test_detailed_balance_is_exact(n_proposals: int) -> None:
    matrix = transition_matrix(torch.log(TARGET / FLOW), n_proposals)
    torch.testing.assert_close(matrix.sum(dim=1), torch.ones(4, dtype=torch.float64))
    assert balance_defect(matrix) < 1e-15


@pytest.mark.parametrize("sign", [0.0, -1.0])
def test_detailed_balance_fails_without_log_q_or_with_its_sign_wrong(sign: float) -> None:
    wrong = torch.log(TARGET) - sign * torch.log(FLOW)
    assert balance_defect(transition_matrix(wrong, 2)) > 1e-3


def test_states_outside_the_flow_are_left_alone() -> None:
    q = torch.tensor([0.6, 0.4, 0.0, 0.0], dtype=torch.float64)
    log_w = torch.tensor([0.2, -0.4, INF, NAN], dtype=torch.float64)
    matrix = transition_matrix(log_w, 2, q)
    assert matrix[2].tolist() == [0, 0, 1, 0]
    assert matrix[3].tolist() == [0, 0, 0, 1]
    target = torch.tensor([0.6 * 0.2, 0.4 * -0.4, 0.0, 0.0], dtype=torch.float64)
    target = torch.where(q > 0, q * torch.exp(log_w.nan_to_num(0, 0)), 0.7)
    assert balance_defect(matrix, target) < 1e-15


def test_one_proposal_is_the_metropolis_rule() -> None:
    old = torch.tensor([0.0, 1.0, 5.0, -INF, INF, NAN, 0.0], dtype=torch.float64)
    new = torch.tensor([1.0, 0.0, -900.0, 2.0, 2.0, 2.0, NAN], dtype=torch.float64)
    ratio = log_acceptance_ratio(old, new)
    expected = torch.tensor([1.0, -1.0, -905.0, INF, -INF, -INF, -INF], dtype=torch.float64)
    torch.testing.assert_close(ratio, expected)
    moved = multiple_try_probabilities(old, new[:, None])[:, 1]
    torch.testing.assert_close(moved, ratio.exp().clamp(max=1.0))


def test_invalid_proposals_are_never_chosen_and_counted() -> None:
    bad = torch.tensor([[NAN, INF, -INF]] * 1000, dtype=torch.float64)
    for current in (0.0, -INF):
        start = torch.full((1000,), current, dtype=torch.float64)
        index, info = multiple_try(start, bad)
        assert not index.any()
        assert (info.n_invalid == 3).all()
        assert (info.effective_proposals == 0).all()
    mixed = torch.cat([bad, torch.full((1000, 1), -1e4, dtype=torch.float64)], dim=1)
    index, _ = multiple_try(torch.full((1000,), -INF, dtype=torch.float64), mixed)
    assert (index == 4).all()
    assert not metropolis_accept(torch.full((10,), NAN)).any()


def test_sampled_choices_follow_the_probabilities() -> None:
    n = 200_000
    log_w = torch.tensor([0.3, -1.0, 0.8, -INF, 0.1], dtype=torch.float64).expand(n, 5)
    generator = torch.Generator().manual_seed(1)
    index, info = multiple_try(log_w[:, 0], log_w[:, 1:], generator)
    expected = multiple_try_probabilities(log_w[:1, 0], log_w[:1, 1:])[0]
    frequency = torch.bincount(index, minlength=5) / n
    assert (frequency - expected).abs().max() < 5 * 0.5 / n**0.5
    torch.testing.assert_close(info.move_probability[0], 1 - expected[0])


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"expected \(n_chains,\)"):
        multiple_try(torch.zeros(2), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="equal shapes"):
        log_acceptance_ratio(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="n_proposals = 0"):
        ProposalBuffer(GaussianFlow(1.0, 2, 1), TwoBasins(), n_proposals=0)


def test_proposals_of_a_chain_give_log_z() -> None:
    target, flow = TwoBasins(), GaussianFlow(1.4, 2, 1)
    generator = torch.Generator().manual_seed(3)
    x = torch.zeros(4000, 2, 1, dtype=torch.float64)
    _, info = flow_step(flow, target, x, 8, generator)
    value, error = log_z(info.log_weight_proposals.flatten().numpy())
    assert error < 0.01
    assert abs(value - target.log_z) < 4 * error


def test_rejected_states_are_bit_identical_and_remembered() -> None:
    target, flow = TwoBasins(), GaussianFlow(1.4, 2, 1)
    generator = torch.Generator().manual_seed(4)
    memory = StateMemory()
    x = torch.randn(64, 2, 1, generator=generator, dtype=torch.float64)
    n_inverse = []
    for _ in range(5):
        before = target.n_evaluated
        new, info = flow_step(flow, target, x, 1, generator, memory=memory)
        n_inverse.append(target.n_evaluated - before - 64)
        assert (new[~info.accepted] == x[~info.accepted]).all()
        assert (new[info.accepted] != x[info.accepted]).any(dim=(1, 2)).all()
        recomputed = -target.reduced_potential(new) - flow.log_prob(new)
        torch.testing.assert_close(info.log_weight, recomputed)
        x = new
    assert n_inverse == [64, 0, 0, 0, 0]
    assert memory.get(x[0] + 1e-16 * (x[0] == 0) + 1e-15) is None


def test_memory_forgets_the_oldest() -> None:
    memory = StateMemory(capacity=2)
    states = torch.arange(3, dtype=torch.float64).reshape(3, 1, 1)
    for state in states:
        memory.put(state, float(state), 0.0)
    assert memory.get(states[0]) is None
    assert memory.get(states[2]) == (2.0, 0.0)


def test_every_draw_is_handed_out_once_even_to_copies() -> None:
    flow = GaussianFlow(1.0, 2, 1)
    buffer = ProposalBuffer(flow, TwoBasins(), n_predraw=10)
    taken = torch.cat(
        [source.take(n).log_q for source in (buffer, copy.deepcopy(buffer)) for n in (3, 4, 25)]
    )
    assert taken.unique().numel() == 64
    assert buffer.n_used == 64
    assert buffer.n_drawn == sum(flow.n_calls)
    assert flow.n_calls[0] == 10
