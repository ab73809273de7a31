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

import threading
from typing import Any, NamedTuple

import numpy as np
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
from openmm_eqflow.targets.target import BoltzmannTarget

__all__ = [
    "Relaxation",
    "RelaxedFlow",
    "relax",
]

_FIRST_STEP = 0.4
_TUNING_ROUNDS = 8
_TUNING_POINTS = 64
_MEDIAN_OF_CHI_SQUARE = 0.455
_TUNING_STREAM = (0x72656C61,)  # names the child of a seed that tunes


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
        bridge = Bridge(flow.prior, _OneAtATime(target))
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

    vector_field = property(lambda self: self.flow.vector_field)
    module = property(lambda self: self.flow.module)
    n_ode_steps = property(lambda self: self.flow.n_ode_steps)

    def map_errors(
        self, n: int, x: Tensor | None, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """Those of the flow: the trajectories are reversible, whatever the flow."""
        return self.flow.map_errors(n, x, generator)

    def stored_layers(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Target, leapfrog steps and step sizes; the scales.

        Raises
        ------
        ConfigurationError
            The target is not one of a System.
        """
        if not isinstance(self.target, BoltzmannTarget):
            raise ConfigurationError(
                f"a relaxed flow is stored with its target, and a {type(self.target).__name__} is "
                "no BoltzmannTarget: relax the flow with one, or keep it in memory"
            )
        words = {
            "target": self.target.record(),
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
    if len(flow.prior.event_shape) != 1:
        raise ConfigurationError(
            "relaxation needs a flow in internal coordinates (prior: internal), whose densities "
            f"between prior and target are known; this one has a {type(flow.prior).__name__}"
        )
    if n_leapfrog < 1 or flow.n_ode_steps < 2:
        raise ConfigurationError(
            f"relaxation needs at least 1 leapfrog step and a grid of 2 steps; got {n_leapfrog} "
            f"and {flow.n_ode_steps}"
        )
    # A stream of its own: manual_seed(seed) would tune on the very latents that an evaluation with
    # the same seed draws.
    entropy = np.random.SeedSequence(seed, spawn_key=_TUNING_STREAM)
    generator = torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
    with torch.no_grad():
        z = flow.prior.sample_latent(_TUNING_POINTS, generator=generator).to(flow.device)
        streams = RowStreams.drawn(len(z), generator, flow.device)
        bridge = Bridge(flow.prior, target)
        scales = _scales(flow, bridge, z)
        sizes = _tuned(flow, bridge, z, scales, n_leapfrog, streams)
    return RelaxedFlow(flow, target, Relaxation(n_leapfrog, sizes, scales.cpu()))


def _scales(flow: EquivariantFlow, bridge: Bridge, z: Tensor) -> Tensor:
    """Scales of the coordinates from the scores at both ends, (d,); medians bear clashes."""
    y, _ = flow.forward(z, RowStreams(torch.zeros_like(z[:, 0], dtype=torch.int64)))
    scores = bridge.at(z).score_prior, bridge.at(y).score_target
    squares = torch.stack([s.square().median(0).values for s in scores]).amax(0)
    return bridge.scales(squares / _MEDIAN_OF_CHI_SQUARE)


def _tuned(
    flow: EquivariantFlow,
    bridge: Bridge,
    y: Tensor,
    scales: Tensor,
    n_leapfrog: int,
    streams: RowStreams,
) -> tuple[float, ...]:
    """Step size of every inner time, from several trajectories of a few points on each."""
    size, sizes = torch.tensor([_FIRST_STEP], dtype=torch.float64), []
    for layer, t in zip(flow.layers[:-1], flow.grid[1:-1], strict=True):
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


class _OneAtATime:
    """A target for several threads: an evaluator need not bear callers side by side."""

    def __init__(self, target: DifferentiablePotential) -> None:
        self.target, self.lock = target, threading.Lock()

    def reduced_potential_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """U (n,) and du/dx (n, N, D)."""
        with self.lock:
            return self.target.reduced_potential_and_gradient(x)
