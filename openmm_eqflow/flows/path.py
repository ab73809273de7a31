r"""A flow is a path: a prior and layers, each a map or a reversible kernel, with an exact weight.

Layers carry a sample of the prior to the target in the prior's chart. With
:math:`\log\hat q = \log p_0(y_0)` at the start,

* a **map** T gives :math:`y' = T(y)` and adds :math:`-\log|\det DT(y)|`;
* a **kernel** reversible with respect to :math:`e^{l}` adds :math:`l(y') - l(y)`,

and :math:`\log\hat q(x) = \log\hat q(y_K) - \mathrm{log\_volume}(y_K)` at the end. Then
:math:`\log w = -u(x) - \log\hat q` has E[w] = Z on the space of paths whatever the layers, and
:math:`E[\hat q(x)] = q(x)` over the paths backwards from x (annealed importance sampling, Neal
2001; stochastic normalizing flows, Wu, Köhler, Noé 2020, arXiv:2002.06707). With maps only the
path of x is one, and :math:`\hat q = q` is its density.

All that follows is exact by it: a Metropolis chain that accepts by w is a chain over pairs of x
and path with the marginal p, whether the path of the present state is kept or drawn anew backwards
(both leave p R invariant). Densities are with respect to Lebesgue measure on the mean-free
subspace, in nm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from openmm_eqflow.errors import ConfigurationError, EqFlowError
from openmm_eqflow.flows.streams import RowStreams
from openmm_eqflow.geometry import random_rotations, rotate
from openmm_eqflow.parallel import available_threads, map_chunks
from openmm_eqflow.priors.base import Prior

__all__ = [
    "Layer",
    "Path",
    "rows_that_fit",
]

_CARRIED = 1024  # rows
_LARGEST_CHUNK = 65_536
_PILOT = 256
_SHARE_OF_MEMORY = 0.6


class Layer(Protocol):
    r"""A map or a reversible kernel in the chart.

    Both directions return the new points and by how much :math:`\log\hat q` of the *forward*
    step changes, (n,). A row never depends on the others, nor on how many there are.
    """

    @property
    def n_energies(self) -> int:
        """Energies with forces of every row, that of the start not counted."""
        ...

    def forward(self, y: Tensor, streams: RowStreams) -> tuple[Tensor, Tensor]:
        """From the start of the layer to its end."""
        ...

    def backward(self, y: Tensor, streams: RowStreams) -> tuple[Tensor, Tensor]:
        """From the end of the layer to its start: a map's inverse, a kernel's reversal."""
        ...


class Path:
    """A prior and layers; see the module docstring.

    Parameters
    ----------
    prior
        Where paths begin; its chart is the layers'.
    layers
        In the order of sampling.
    chunk_size
        Configurations carried at once on the CPU, which bounds memory; on a GPU as many as fit.

    Attributes
    ----------
    kind
        Name under which :func:`~openmm_eqflow.flows.storage.save_flow` stores the class.
    has_density
        Whether the layers are maps only: then log q is the density of a configuration, otherwise
        of a path.
    audit_report, metadata, source
        Of :func:`~openmm_eqflow.flows.audit.audit`; words kept with the files; path and SHA-256
        once saved or loaded.
    gpu_chunk_size
        Configurations carried at once on a GPU; by default as many as fit into its free memory.
    """

    kind = ""
    has_density = False

    def __init__(self, prior: Prior, layers: Sequence[Layer], *, chunk_size: int = 256) -> None:
        self.prior, self._layers, self.chunk_size = prior, tuple(layers), chunk_size
        self.audit_report: dict[str, Any] | None = None
        self.metadata: dict[str, Any] = {}
        self.source: tuple[str, str] | None = None
        self.gpu_chunk_size: int | None = None

    n_particles = property(lambda self: self.prior.n_particles)
    n_dims = property(lambda self: self.prior.n_dims)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Maps and kernels in the order of sampling."""
        return self._layers

    @property
    def n_energies(self) -> int:
        """Energies, with forces but for the last, behind one sample and its weight."""
        steps = [layer.n_energies for layer in self.layers]
        # A kernel starts where the one before it ended, whose energy is known; after a map it
        # is not.
        starts = sum(
            one > 0 and before == 0 for before, one in zip([0, *steps[:-1]], steps, strict=True)
        )
        return 1 + starts + sum(steps)

    @property
    def device(self) -> torch.device:
        """Where the layers compute."""
        return torch.device("cpu")

    @property
    def prior_on_cpu(self) -> Prior:
        """Return the prior, on the CPU; one of one's own need not know of devices."""
        return self.prior if self.device.type == "cpu" else self.prior.to("cpu")

    # -- in the chart, one chunk ------------------------------------------------------------------

    def forward(self, y: Tensor, streams: RowStreams) -> tuple[Tensor, Tensor]:
        r"""Carry points of the prior (n, ...) to the end; also the sum of the changes (n,)."""
        total = torch.zeros(len(y), dtype=torch.float64, device=y.device)
        for layer in self.layers:
            y, change = layer.forward(y, streams)
            total = total + change
        return y, total

    def backward(self, y: Tensor, streams: RowStreams) -> tuple[Tensor, Tensor]:
        """Carry points (n, ...) back to the prior; also the same sum (n,)."""
        total = torch.zeros(len(y), dtype=torch.float64, device=y.device)
        for layer in reversed(self.layers):
            y, change = layer.backward(y, streams)
            total = total + change
        return y, total

    def ends(self, z: Tensor, streams: RowStreams) -> tuple[Tensor, Tensor]:
        r"""Mean-free positions (n, N, D) of the paths from points of the prior, and log q-hat.

        Positions are in the chart's own frame; log q does not depend on the frame.
        """
        y, change = self.forward(z, streams)
        x, log_volume = self.prior.to_cartesian(y)
        log_q = self.prior.latent_log_prob(z) + change - log_volume
        # Outside the chart there is no configuration: log q = +inf makes the weight zero.
        return x, torch.where(torch.isfinite(log_q), log_q, torch.inf)

    def starts(self, x: Tensor, streams: RowStreams) -> tuple[Tensor, Tensor]:
        """Points of the prior of the paths that end at positions (n, N, D), and log q-hat."""
        y, log_volume = self.prior.from_cartesian(x)
        z, change = self.backward(y, streams)
        return z, self.prior.latent_log_prob(z) + change - log_volume

    # -- chunked, without gradients ---------------------------------------------------------------

    def sample_and_log_prob(
        self, n: int, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        r"""Draw (n, N, D) positions, Haar-oriented, and :math:`\log\hat q` of their paths, (n,).

        Float64, on :attr:`device`. Drawn where ``generator`` lives, so that a seed of the CPU
        means the same everywhere. A sample that leaves the chart has log q = +inf: weight zero.
        """
        if n < 1:
            x = torch.zeros(0, self.n_particles, self.n_dims).to(self.device, torch.float64)
            return x, x[:, 0, 0]
        draws, size = [], self._chunk()
        for start in range(0, n, size):
            m = min(size, n - start)
            z = self.prior.sample_latent(m, generator=generator)
            turn = random_rotations(m, self.n_dims, generator=generator)
            # Maps draw nothing.
            streams = (
                RowStreams.none(z.to(self.device))
                if self.has_density
                else RowStreams.drawn(m, generator, self.device)
            )
            draws.append((z, turn, streams))

        def run(some: list[tuple[Tensor, Tensor, RowStreams]]) -> tuple[Tensor, Tensor]:
            z, turn = (torch.cat(column) for column in list(zip(*some, strict=True))[:2])
            x, log_q = self.ends(z.to(self.device), RowStreams.joined([s for *_, s in some]))
            return rotate(x, turn.to(x)), log_q

        together = self._together(len(draws), size)
        groups = [draws[k : k + together] for k in range(0, len(draws), together)]
        xs, log_qs = zip(*self._carried(run, groups, together * size), strict=True)
        return torch.cat(xs), torch.cat(log_qs)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw (n, N, D) mean-free positions."""
        return self.sample_and_log_prob(n, generator=generator)[0]

    def log_prob(self, x: Tensor) -> Tensor:
        r"""Estimate :math:`\log\hat q` of positions (n, N, D) by one path backwards each, (n,).

        Unbiased for q, not for log q: its mean is a lower bound. A path that fails gives -inf: the
        weight of the state is then infinite, and a chain stays there until another path is drawn.
        Each row's random numbers follow from its positions: the same configuration gives the same
        number in any batch.
        """

        def run(part: Tensor) -> Tensor:
            streams = RowStreams.none(part) if self.has_density else RowStreams.of(part)
            _, log_q = self.starts(part, streams)
            return torch.where(torch.isfinite(log_q), log_q, -torch.inf)

        x, size = x.detach().to(device=self.device, dtype=torch.float64), self._chunk()
        return torch.cat(self._carried(run, x.split(size), size))

    # -- what a class of paths says of itself -----------------------------------------------------

    def _chunk(self) -> int:
        if self.device.type != "cuda":
            return self.chunk_size

        def pilot(n: int) -> None:
            stream = torch.Generator(self.device).manual_seed(0)
            z = self.prior.sample_latent(n, generator=stream).to(self.device)
            y, _ = self.forward(z, RowStreams.drawn(n, stream, self.device))
            self.prior.to_cartesian(y)

        if self.gpu_chunk_size is None:
            self.gpu_chunk_size = rows_that_fit(pilot, self.device)
        return self.gpu_chunk_size

    def _together(self, n_draws: int, size: int) -> int:
        """How many draws are carried as one: fewer calls where layers are kernels."""
        if self.has_density or self.device.type != "cpu":
            return 1
        return max(1, min(_CARRIED // size, -(-n_draws // available_threads())))

    def _carried(self, run: Callable[[Any], Any], parts: Iterable[Any], size: int) -> list[Any]:
        if self.device.type == "cpu":
            return map_chunks(run, parts)
        try:
            with torch.no_grad():
                return [run(part) for part in parts]
        except torch.cuda.OutOfMemoryError as error:
            raise EqFlowError(
                f"the GPU's memory does not hold {size} configurations at once: set "
                f"flow.gpu_chunk_size = {max(1, size // 4)}, or free memory there"
            ) from error

    @property
    def maps(self) -> Any:
        """What stands in the files as prior, field and grid.

        Raises
        ------
        ConfigurationError
            The path is put together from layers of which the files know nothing.
        """
        raise ConfigurationError(
            f"a {type(self).__name__} is not among the flows that are saved, audited or moved by: "
            "take an EquivariantFlow, what relax returns, or a StochasticFlow"
        )

    def stored_layers(self) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
        """JSON-able words and tensors that, with prior, field and grid, define the path."""
        return None, {}

    def describe_layers(self) -> str:
        """Say in a few words what the layers are, for cards and reports."""
        return f"{len(self.layers)} layers"


def rows_that_fit(pilot: Callable[[int], object], device: torch.device) -> int:
    """Rows that a GPU's free memory holds, from what ``pilot(n)`` takes for a few."""
    with torch.no_grad():
        pilot(_PILOT)  # what is made once, however many the rows
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        # More than before, so that what replays a recording is recorded, and that counted, too.
        pilot(2 * _PILOT)
    per_row = (torch.cuda.max_memory_allocated(device) - before) / (2 * _PILOT)
    free, _ = torch.cuda.mem_get_info(device)
    rows = int(_SHARE_OF_MEMORY * free / max(per_row, 1.0))
    return max(1, min(_LARGEST_CHUNK, rows))
