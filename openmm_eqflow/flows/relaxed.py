r"""A flow with Hamiltonian Monte Carlo between its steps: exact weights of paths, far less spread.

A field trained by the Liouville residual follows :math:`p_t \propto p_0^{1-t} p_1^t` from prior
to target, so every time of the flow's grid has a density its samples should have there. On each
a trajectory of Hamiltonian Monte Carlo (:class:`~openmm_eqflow.flows.kernels.Trajectory`) takes
off what the field left wrong, and the next step of the field starts from better points: a
*stochastic normalizing flow* (Wu, Köhler, Noé 2020, arXiv:2002.06707), a
:class:`~openmm_eqflow.flows.path.Path` of maps and kernels in turn,

.. math:: \log\hat q = \log p_0(z) - \mathrm{ladj} - \mathrm{log\_volume}
          + \sum_k \bigl[ \log p_{t_k}(b_k) - \log p_{t_k}(a_k) \bigr]

with a_k and b_k before and after the trajectory on level k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.flows.flow import EquivariantFlow
from openmm_eqflow.flows.kernels import (
    Bridge,
    DifferentiablePotential,
    Trajectory,
    tuned,
)
from openmm_eqflow.flows.path import Layer, Path
from openmm_eqflow.flows.streams import RowStreams
from openmm_eqflow.priors.base import Prior
from openmm_eqflow.seeds import child
from openmm_eqflow.targets.target import BoltzmannTarget
from openmm_eqflow.vector_fields.baselines import StillField

__all__ = [
    "AnnealedPath",
    "Levels",
    "Relaxation",
    "RelaxedFlow",
    "anneal",
    "relax",
]

_FIRST_STEP = 0.4
_TUNING_ROUNDS = 8
_TUNING_POINTS = 64


class Relaxation(NamedTuple):
    """Trajectories on the inner times of a grid.

    Leapfrog steps of one trajectory; step sizes, one for each inner time; scale of every chart
    coordinate, (d,): a step is their product, in units of the chart.
    """

    n_leapfrog: int
    step_sizes: tuple[float, ...]
    scales: Tensor


class RelaxedFlow(Path):
    """See the module docstring. Made by :func:`relax`.

    Parameters
    ----------
    flow
        Whose field carries between the levels.
    target
        Whose energies relax on them.
    relaxation
        Leapfrog steps and step sizes.
    """

    kind = "relaxed"

    def __init__(
        self, flow: EquivariantFlow, target: DifferentiablePotential, relaxation: Relaxation
    ) -> None:
        self.flow, self.target, self.relaxation = flow, target, relaxation
        self.bridge = bridge = Bridge(flow.prior, target)
        maps = flow.layers
        layers: list[Layer] = [maps[0]]
        for k, size in enumerate(relaxation.step_sizes, 1):
            step = size * relaxation.scales.to(flow.device)
            layers += [Trajectory(bridge, flow.grid[k], step, relaxation.n_leapfrog), maps[k]]
        super().__init__(flow.prior, layers, chunk_size=min(flow.chunk_size, 256))
        self.audit_report, self.metadata = flow.audit_report, flow.metadata

    @property
    def device(self) -> torch.device:
        """Where the weights of the field live."""
        return self.flow.device

    @property
    def maps(self) -> EquivariantFlow:
        """The maps without the trajectories."""
        return self.flow

    def stored_layers(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Target, leapfrog steps and step sizes; the scales.

        Raises
        ------
        ConfigurationError
            The target is not one of a System.
        """
        words = {
            "target": _record(self.target),
            "n_leapfrog": self.relaxation.n_leapfrog,
            "step_sizes": list(self.relaxation.step_sizes),
        }
        return words, {"scales": self.relaxation.scales}

    @classmethod
    def from_layers(
        cls, flow: EquivariantFlow, words: dict[str, Any], tensors: dict[str, Tensor]
    ) -> RelaxedFlow:
        """Rebuild from the flow and :meth:`stored_layers`."""
        relaxation = Relaxation(
            words["n_leapfrog"], tuple(words["step_sizes"]), tensors["scales"]
        )
        return cls(flow, BoltzmannTarget.from_record(words["target"]), relaxation)

    def describe_layers(self) -> str:
        """Say what the layers are."""
        return (
            f"{self.flow.describe_layers()}, on each inner time a Hamiltonian trajectory of "
            f"{self.relaxation.n_leapfrog} leapfrog steps"
        )


def relax(
    flow: EquivariantFlow, target: DifferentiablePotential, *, n_leapfrog: int = 5, seed: int = 0
) -> RelaxedFlow:
    """Put a trajectory of Hamiltonian Monte Carlo on every inner time of a flow's grid.

    Step sizes are tuned on the way, level by level, to an acceptance of 0.85, and then frozen. The
    ESS of the weights becomes that of paths. A sample costs ``n_leapfrog`` + 1 energies with
    forces for each inner time more.

    Parameters
    ----------
    flow
        In internal coordinates. Weights are exact with any; they are better than before with one
        that was trained by the Liouville residual, whose intermediate densities these are.
    target
        Boltzmann target of the System the flow was trained for; not to be closed before the
        relaxed flow is done.
    n_leapfrog
        Leapfrog steps of a trajectory.
    seed
        Of the points the step sizes are tuned on.

    Raises
    ------
    ConfigurationError
        A flow in Cartesian coordinates, without inner times, or ``n_leapfrog`` below 1.

    Examples
    --------
    >>> from openmm_eqflow import load_flow, load_system
    >>> from openmm_eqflow.runs.stages import build_target
    >>> with build_target(load_system("toluene")) as target:  # doctest: +SKIP
    ...     x, log_q = relax(load_flow("toluene"), target).sample_and_log_prob(1000)
    """
    _check_chart(flow.prior)
    if n_leapfrog < 1 or flow.n_ode_steps < 2:
        raise ConfigurationError(
            f"relaxation needs at least 1 leapfrog step and a field on a grid of 2 steps; got "
            f"{n_leapfrog} and {flow.n_ode_steps}: leave it out"
        )
    generator = child(seed, "tuning")
    with torch.no_grad():
        z = flow.prior.sample_latent(_TUNING_POINTS, generator=generator).to(flow.device)
        streams = RowStreams.drawn(len(z), generator, flow.device)
        bridge = Bridge(flow.prior, target)
        end = bridge.at(flow.forward(z, streams)[0])
        scales = bridge.median_scales(bridge.at(z).score_prior, end.score_target)
        sizes = _tuned(
            bridge, flow.layers[:-1], flow.grid[1:-1], z, scales, n_leapfrog, streams
        )
    return RelaxedFlow(flow, target, Relaxation(n_leapfrog, sizes, scales.cpu()))


def anneal(
    prior: Prior,
    target: DifferentiablePotential,
    *,
    n_levels: int = 20,
    n_leapfrog: int = 5,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> AnnealedPath:
    """Path of trajectories alone, on evenly spaced levels: annealed importance sampling.

    Nothing is trained; step sizes are tuned as :func:`relax` does.

    Parameters
    ----------
    prior, target
        Both ends; the prior in internal coordinates, the closer the better.
    n_levels
        Levels up to 1: more cost more and leave less.
    n_leapfrog, seed
        As for :func:`relax`.
    device
        Where the layers compute.

    Examples
    --------
    >>> from openmm_eqflow import load_flow, load_system
    >>> from openmm_eqflow.runs.stages import build_target
    >>> with build_target(load_system("toluene")) as target:  # doctest: +SKIP
    ...     x, log_q = anneal(load_flow("toluene").prior, target).sample_and_log_prob(1000)
    """
    _check_chart(prior)
    if n_leapfrog < 1 or n_levels < 1:
        raise ConfigurationError(
            f"annealing needs at least 1 leapfrog step and 1 level; got {n_leapfrog} and "
            f"{n_levels}"
        )
    prior, generator = prior.to(device), child(seed, "tuning")
    times = [(k + 1) / n_levels for k in range(n_levels)]
    with torch.no_grad():
        z = prior.sample_latent(_TUNING_POINTS, generator=generator).to(device)
        streams = RowStreams.drawn(len(z), generator, device)
        bridge = Bridge(prior, target)
        start = bridge.at(z)
        scales = bridge.median_scales(start.score_prior, start.score_target)
        sizes = _tuned(bridge, [None] * n_levels, times, z, scales, n_leapfrog, streams)
    steps = torch.tensor(sizes, dtype=torch.float64)[:, None] * scales.cpu()
    return AnnealedPath(prior, target, Levels(n_leapfrog, tuple(times), steps), device)


class Levels(NamedTuple):
    """Trajectories on levels of a bridge.

    Leapfrog steps of one trajectory; levels (K,) up to 1; leapfrog steps of every coordinate on
    each, (K, d), in units of the chart.
    """

    n_leapfrog: int
    times: tuple[float, ...]
    steps: Tensor


class AnnealedPath(Path):
    """Trajectories on levels between a prior and a target, no map: see :func:`anneal`.

    Parameters
    ----------
    prior, target
        Both ends.
    levels
        What is between.
    device
        Where the layers compute.
    """

    kind = "annealed"

    def __init__(
        self,
        prior: Prior,
        target: DifferentiablePotential,
        levels: Levels,
        device: torch.device | str = "cpu",
    ) -> None:
        self.target, self.levels, self._device = target, levels, torch.device(device)
        self.bridge = bridge = Bridge(prior.to(device), target)
        layers = [
            Trajectory(bridge, t, step.to(device), levels.n_leapfrog)
            for t, step in zip(levels.times, levels.steps, strict=True)
        ]
        super().__init__(bridge.prior, layers)

    @property
    def device(self) -> torch.device:
        """Where the layers compute."""
        return self._device

    @property
    def maps(self) -> EquivariantFlow:
        """The path without its trajectories: the identity."""
        still: Any = StillField(n_coordinates=self.prior.event_shape[0]).to(self.device)
        return EquivariantFlow(self.prior, still, grid=(0.0, 1.0), chunk_size=self.chunk_size)

    def stored_layers(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Target, leapfrog steps and levels; the steps of every coordinate.

        Raises
        ------
        ConfigurationError
            The target is not one of a System.
        """
        words = {
            "target": _record(self.target),
            "n_leapfrog": self.levels.n_leapfrog,
            "times": list(self.levels.times),
        }
        return words, {"steps": self.levels.steps}

    @classmethod
    def from_layers(
        cls, flow: EquivariantFlow, words: dict[str, Any], tensors: dict[str, Tensor]
    ) -> AnnealedPath:
        """Rebuild from the identity and :meth:`stored_layers`."""
        levels = Levels(words["n_leapfrog"], tuple(words["times"]), tensors["steps"])
        return cls(flow.prior, BoltzmannTarget.from_record(words["target"]), levels, flow.device)

    def works(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        r"""Log weights of ``n`` new paths, level by level, (K, n).

        :math:`\delta_k = (t_k - t_{k-1})\,[\log p_1(y_{k-1}) - \log p_0(y_{k-1})]`, minus the
        work of the step to level k (Neal 2001): their sum over k is the log weight of the path.
        -inf where a point has no density.
        """
        z = self.prior.sample_latent(n, generator=generator)
        streams, times = RowStreams.drawn(n, generator, self.device), self.levels.times

        def run(rows: slice) -> Tensor:
            y, mine, works = z[rows].to(self.device), streams.rows(rows), []
            for k, t in enumerate(times):
                if k > 0:  # the last trajectory changes no weight
                    y, _ = self.layers[k - 1].forward(y, mine)
                state = self.bridge.at(y)
                step = t - (times[k - 1] if k > 0 else 0.0)
                works.append(step * (state.log_target - state.log_prior))
            return torch.stack(works)

        size = self._chunk()
        parts = [slice(k, min(k + size, n)) for k in range(0, n, size)]
        return torch.cat(self._carried(run, parts, size), 1)

    def describe_layers(self) -> str:
        """Say what the layers are."""
        return (
            f"{len(self.levels.times)} levels, on each a Hamiltonian trajectory of "
            f"{self.levels.n_leapfrog} leapfrog steps"
        )


def _record(target: DifferentiablePotential) -> dict[str, Any]:
    if not isinstance(target, BoltzmannTarget):
        raise ConfigurationError(
            f"trajectories are stored with their target, and a {type(target).__name__} is no "
            "BoltzmannTarget: make the path with one, or keep it in memory"
        )
    return target.record()


def _check_chart(prior: Prior) -> None:
    if len(prior.event_shape) != 1:
        raise ConfigurationError(
            "relaxation needs a flow in internal coordinates (prior: internal), whose densities "
            f"between prior and target are known; this one has a {type(prior).__name__}"
        )




def _tuned(
    bridge: Bridge,
    maps: Sequence[Layer | None],
    times: Sequence[float],
    y: Tensor,
    scales: Tensor,
    n_leapfrog: int,
    streams: RowStreams,
) -> tuple[float, ...]:
    """Step size of every level, from several trajectories of a few points on each."""
    size, sizes = torch.tensor([_FIRST_STEP], dtype=torch.float64), []
    for layer, t in zip(maps, times, strict=True):
        if layer is not None:
            y, _ = layer.forward(y, streams)
        state = bridge.at(y)

        def move(size: Tensor, t: float = t) -> Tensor:
            nonlocal state
            state, acceptance = bridge.move(
                state, t, step=float(size) * scales, n_steps=n_leapfrog, streams=streams
            )
            return acceptance.mean().cpu()[None]

        size = tuned(move, size, n_rounds=_TUNING_ROUNDS, gain=1.0)
        sizes.append(float(size))
        y = state.y
    return tuple(sizes)
