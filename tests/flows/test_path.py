"""Every kind of path through one body: exact weights and chains, rows alone, lies found out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from stand_ins.flows import stream
from stand_ins.stochastic import PAIR, make_pair_flow
from stand_ins.water import TARGET, VARIANCE, bond, water_flow
from torch import Tensor

from openmm_eqflow.analysis.weights import log_z
from openmm_eqflow.flows import path as module
from openmm_eqflow.flows.kernels import Bridge, Trajectory
from openmm_eqflow.flows.path import Layer, Path
from openmm_eqflow.flows.relaxed import relax
from openmm_eqflow.flows.streams import RowStreams, philox
from openmm_eqflow.moves.metropolis import multiple_try
from openmm_eqflow.moves.steps import StateMemory, flow_step


@dataclass
class Case:
    """A path to a target whose density is known."""

    path: Path
    target: Any
    log_z: float
    observable: Callable[[Tensor], Tensor]
    mean: float
    #: Whether leaving the work of one layer out shows in log Z.
    works: bool = True


def distance(x: Tensor) -> Tensor:
    return (x[:, 0] - x[:, 1]).norm(dim=-1)


def annealed() -> Path:
    """Kernels only: annealed importance sampling from the water's prior to its target."""
    flow = water_flow()
    bridge, n = Bridge(flow.prior, TARGET), 12
    step = torch.full((3,), 0.5, dtype=torch.float64)
    layers = [Trajectory(bridge, (k + 1) / n, step, 3) for k in range(n)]
    return Path(flow.prior, layers, chunk_size=512)


@pytest.fixture(scope="module")
def pair_flow() -> Any:
    return make_pair_flow()


NAMES = ["maps", "annealed", "relaxed", "stochastic", "stochastic, few levels"]


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest, pair_flow: Any) -> Case:
    water = (TARGET, 0.0, bond, VARIANCE)
    pair = (PAIR, PAIR.log_z(), distance, PAIR.mean(lambda d: d))
    if request.param == "maps":
        return Case(water_flow(), *water)
    if request.param == "annealed":
        return Case(annealed(), *water)
    if request.param == "relaxed":
        return Case(relax(water_flow(), TARGET, n_leapfrog=3, seed=1), *water)
    path = pair_flow if request.param == "stochastic" else pair_flow.on_levels(16)
    return Case(path, *pair)


def log_weights(case: Case, path: Path, n: int, seed: int) -> Tensor:
    x, log_q = path.sample_and_log_prob(n, generator=stream(seed))
    return -case.target.reduced_potential(x) - log_q


def log_inverse_weights(case: Case, path: Path, n: int, seed: int) -> Tensor:
    y = case.target.draw(n, seed)
    return case.target.reduced_potential(y) + path.log_prob(y)


def off(estimate: Any, exact: float) -> float:
    """How many standard errors an estimate is away."""
    return abs(estimate.value - exact) / estimate.error


@pytest.mark.statistical
def test_weights_forwards_and_backwards_give_log_z(case: Case) -> None:
    x, log_q = case.path.sample_and_log_prob(5000, generator=stream(1))
    u = case.target.reduced_potential(x)
    ours = log_z((-u - log_q).numpy())
    assert off(ours, case.log_z) < 4
    assert ours.error < 0.1
    back = log_z(log_inverse_weights(case, case.path, 5000, 2).numpy())
    assert off(back, -case.log_z) < 4  # E[1 / w] = 1 / Z
    assert back.error < 0.1
    for lie in (-u, -u + log_q):  # power: log q-hat dropped, its sign turned
        assert off(log_z(lie.numpy()), case.log_z) > 4


def test_no_samples(case: Case) -> None:
    x, log_q = case.path.sample_and_log_prob(0)
    assert x.shape == (0, case.path.n_particles, case.path.n_dims)
    assert log_q.shape == (0,)
    assert x.dtype == log_q.dtype == torch.float64


class Silent:
    """A layer that does not say what it did."""

    n_energies = 0

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    def forward(self, y: Tensor, streams: RowStreams) -> tuple[Tensor, Tensor]:
        y, change = self.layer.forward(y, streams)
        return y, torch.zeros_like(change)

    def backward(self, y: Tensor, streams: RowStreams) -> tuple[Tensor, Tensor]:
        y, change = self.layer.backward(y, streams)
        return y, torch.zeros_like(change)


def layers_of_a_kind(path: Path) -> dict[type, list[Layer]]:
    kinds: dict[type, list[Layer]] = {}
    for layer in path.layers:
        kinds.setdefault(type(layer), []).append(layer)
    return kinds


@pytest.mark.statistical
def test_without_the_work_of_its_layers_log_z_is_wrong(case: Case) -> None:
    """Power control: maps without determinants, kernels without heat, both ways along the path."""
    for kind in layers_of_a_kind(case.path):
        lying = Path(
            case.path.prior,
            [Silent(v) if type(v) is kind else v for v in case.path.layers],
        )
        for weights, exact in (
            (log_weights(case, lying, 5000, 1), case.log_z),
            (log_inverse_weights(case, lying, 5000, 2), -case.log_z),
        ):
            assert off(log_z(weights.numpy()), exact) > 4, kind


@pytest.mark.statistical
@pytest.mark.parametrize("factor", [1.0, 0.0, -1.0])
def test_chains_that_accept_by_paths_are_exact(case: Case, factor: float) -> None:
    """Metropolis over (x, path), fresh exact states in between; power: log q-hat times 0 or -1."""

    class Altered:
        def sample_and_log_prob(
            self, n: int, *, generator: torch.Generator | None = None
        ) -> tuple[Tensor, Tensor]:
            x, log_q = case.path.sample_and_log_prob(n, generator=generator)
            return x, factor * log_q

        def log_prob(self, x: Tensor) -> Tensor:
            return factor * case.path.log_prob(x)

    generator, memory = stream(5), StateMemory()
    x = case.target.draw(1000, 6)
    means, moved = [], []
    for step in range(12):
        if step % 4 == 3:  # half of the chains: their paths are drawn backwards
            x = torch.cat([x[:500], case.target.draw(500, 100 + step)])
        x, info = flow_step(Altered(), case.target, x, 1, generator, memory=memory)
        moved.append(float(info.accepted.double().mean()))
        if step >= 4:
            means.append(case.observable(x).numpy())
    per_chain = np.mean(means, axis=0)
    error = per_chain.std(ddof=1) / math.sqrt(len(per_chain))
    gap = abs(per_chain.mean() - case.mean)
    if factor == 1.0:
        assert np.mean(moved) > 0.2
        assert gap < 5 * error
    else:
        assert gap > 5 * error


@pytest.mark.statistical
def test_kernels_leave_their_level_invariant(case: Case) -> None:
    """From the target's exact samples the last kernel, where it is on the target, draws more."""
    last = case.path.layers[-1]
    if not hasattr(last, "timestep") and getattr(last, "t", None) != 1.0:
        pytest.skip("no kernel on the target itself")
    x = case.target.draw(4000, 8)

    def after(kernel: Layer) -> tuple[Tensor, float]:
        y, _ = case.path.prior.from_cartesian(x)
        for k in range(20):
            y, _ = kernel.forward(y, RowStreams(torch.arange(len(y)) + 10_000 * k))
        values = case.observable(case.path.prior.to_cartesian(y.double())[0])
        return values, float(values.std()) / math.sqrt(len(values))

    values, error = after(last)
    assert float((values - case.observable(x)).abs().mean()) > error  # it moves
    assert abs(float(values.mean()) - case.mean) < 4 * error
    # Power: the kernel of another level draws from another density.
    other, error = after(next(v for v in case.path.layers if type(v) is type(last)))
    assert abs(float(other.mean()) - case.mean) > 4 * error


def test_maps_invert(case: Case) -> None:
    y = case.path.prior.sample_latent(64, generator=stream(3))
    streams = RowStreams(torch.arange(64))
    for layer in case.path.layers:
        image, change = layer.forward(y, streams)
        if layer is case.path.layers[-1] or "Trajectory" not in type(layer).__name__:
            back, same = layer.backward(image, streams)
            if "Trajectory" in type(layer).__name__:
                assert not torch.equal(back, y)  # a reversal draws its own numbers
            else:
                torch.testing.assert_close(back.double(), y.double(), atol=2e-6, rtol=0)
                torch.testing.assert_close(same, change, atol=2e-4, rtol=0)
        y = image


def test_rows_do_not_depend_on_their_batch(case: Case) -> None:
    x, log_q = case.path.sample_and_log_prob(70, generator=stream(3))
    whole = case.path.log_prob(x)
    for rows in (slice(0, 1), slice(3, 20), slice(69, 70), [5, 3, 40]):
        torch.testing.assert_close(case.path.log_prob(x[rows]), whole[rows], atol=1e-9, rtol=0)
    again = case.path.log_prob(torch.cat([x[30:], 1.01 * x[:5]]))
    torch.testing.assert_close(again[:40], whole[30:], atol=1e-9, rtol=0)
    # Power: other positions have other paths.
    if not case.path.has_density:
        assert not torch.allclose(log_q, whole)


def test_same_seed_same_paths(case: Case) -> None:
    one, two, other = (
        case.path.sample_and_log_prob(600, generator=stream(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert not torch.equal(one[1], other[1])
    assert float(one[0].mean(1).abs().max()) < 1e-12
    assert one[0].dtype == one[1].dtype == torch.float64


class Failing:
    """A layer that fails on every other row."""

    def forward(self, y: Tensor, streams: RowStreams) -> tuple[Tensor, Tensor]:
        change = torch.zeros(len(y), dtype=torch.float64)
        change[::2] = torch.nan
        return y, change

    backward = forward


def test_a_state_whose_path_fails_is_never_left(case: Case) -> None:
    """Of a draw it means no weight, of a state an infinite one: +inf for both left such states."""
    path = Path(case.path.prior, [*case.path.layers, Failing()])
    x = case.target.draw(4, 5)
    assert torch.isfinite(case.path.log_prob(x)).all()
    log_q = path.log_prob(x)
    assert (log_q[::2] == -torch.inf).all()
    assert torch.isfinite(log_q[1::2]).all()
    _, drawn = path.sample_and_log_prob(4, generator=stream(6))
    assert (drawn[::2] == torch.inf).all()
    # Offered the best of draws, a chain leaves its state only where the path did not fail.
    offered = torch.full((4, 1), 1e4, dtype=torch.float64)
    _, info = multiple_try(-log_q, offered, stream(7))
    assert info.accepted.tolist() == [False, True, False, True]


# -- random streams -----------------------------------------------------------------------------


def test_philox_gives_the_published_words() -> None:
    """Known answers of Random123, philox4x32 with 10 rounds."""
    ones = 0xFFFFFFFF
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    for counter, key, words in (
        ((0,) * 4, (0,) * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((ones,) * 4, (ones,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (*pi, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ):
        found = philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))  # type: ignore[arg-type]
        assert " ".join(f"{int(word):08x}" for word in found) == words


@pytest.mark.statistical
def test_streams_are_normal_and_uniform_and_apart() -> None:
    streams = RowStreams.drawn(2000, stream(1))
    z = streams.normal(31)
    flat = z.flatten()
    n = len(flat)
    for power, moment in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
        values = flat**power
        assert abs(float(values.mean()) - moment) < 4 * float(values.std()) / math.sqrt(n)
    u = torch.cat([streams.uniform() for _ in range(20)])
    counts = torch.histc(u, 20, 0, 1)
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 45  # 19 degrees of freedom, p 0.0007
    correlation = torch.corrcoef(torch.cat([z.T[:8], RowStreams(streams.keys + 1).normal(8).T]))
    apart = correlation - torch.diag(torch.diag(correlation))
    assert float(apart.abs().max()) < 5 / math.sqrt(2000)
    assert len(torch.unique(RowStreams.of(z).keys)) == 2000
    assert not torch.equal(RowStreams.of(z).keys, RowStreams.of(z.flip(1)).keys)


def test_streams_of_some_rows_are_those_of_all() -> None:
    streams = RowStreams(torch.arange(9))
    first, second = streams.normal(2, 3), streams.uniform()
    some = RowStreams(torch.tensor([7, 2]))
    assert torch.equal(some.normal(2, 3), first[[7, 2]])
    assert torch.equal(some.uniform(), second[[7, 2]])
    assert not torch.equal(some.normal(2, 3), first[[7, 2]])  # the next draw is another


@pytest.mark.parametrize("name", ["annealed", "relaxed"])
def test_energies_of_a_sample_are_counted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 0
    honest = type(TARGET).reduced_potential_and_gradient

    def counted(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal rows
        rows += len(x)
        return honest(self, x)

    path = annealed() if name == "annealed" else relax(water_flow(), TARGET, n_leapfrog=3, seed=1)
    monkeypatch.setattr(type(TARGET), "reduced_potential_and_gradient", counted)
    path.sample_and_log_prob(10, generator=stream(1))
    assert 10 * (path.n_energies - 1) == rows  # the last one is that of the weight
    assert water_flow().n_energies == 1


def test_draws_carried_together_are_those_carried_alone(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of draws, however many the cores make, give what every draw gives by itself."""
    path, size = case.path, case.path.chunk_size
    monkeypatch.setattr(path, "chunk_size", 50)
    x, log_q = path.sample_and_log_prob(230, generator=stream(21))
    if not path.has_density:
        assert path._together(5, 50) > 1  # power: they are carried together
    monkeypatch.setattr(module, "_CARRIED", 1)
    y, alone = path.sample_and_log_prob(230, generator=stream(21))
    assert path._together(5, 50) == 1
    torch.testing.assert_close(y, x, atol=1e-9, rtol=0)
    torch.testing.assert_close(alone, log_q, atol=1e-7, rtol=0)
    monkeypatch.setattr(path, "chunk_size", size)
    z, _ = path.sample_and_log_prob(230, generator=stream(22))
    assert not torch.allclose(z, x)  # power: other numbers are other paths
