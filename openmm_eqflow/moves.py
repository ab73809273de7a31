r"""FlowMove: global moves of an openmmtools sampler, proposed by a flow and exactly accepted.

>>> from openmm_eqflow import FlowMove, load_flow                              # doctest: +SKIP
>>> from openmmtools.mcmc import LangevinDynamicsMove, SequenceMove            # doctest: +SKIP
>>> move = SequenceMove([LangevinDynamicsMove(), FlowMove(load_flow("flow"))]) # doctest: +SKIP

Training on the samples of a chain must stop before production: a proposal that depends on the
chain's past loses detailed balance.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from openmm_eqflow.diagnostics import Estimate
from openmm_eqflow.ensemble import FlowStepInfo, ProposalBuffer, StateMemory, flow_step
from openmm_eqflow.flow import EquivariantFlow
from openmm_eqflow.flow_move_base import FlowMoveBase
from openmm_eqflow.local_moves import AnnealedMove, LatentMove
from openmm_eqflow.target import BoltzmannTarget

__all__ = ["AnnealedMove", "FlowMove", "LatentMove"]


class FlowMove(FlowMoveBase):
    r"""Replace the configuration by one of several flow samples, exactly.

    .. math:: \log w(x) = -u(x) - \log q(x), \quad u = U / RT \text{ at the state's temperature};

    the choice among the current state and K fresh samples is the multiple-try Metropolised
    independence sampler (:func:`~openmm_eqflow.metropolis.multiple_try_probabilities`), which
    leaves :math:`e^{-u}` invariant whatever the flow; K = 1 is plain Metropolis. Samples are
    drawn and evaluated ``n_predraw`` at a time and each is used once. The centroid and the
    velocities are kept (momenta are independent of positions), and so is the chirality of the
    current state: mirror images have zero weight. For a planar flow z stays as it is.

    Parameters
    ----------
    flow
        A saved and audited :class:`~openmm_eqflow.flow.EquivariantFlow`, or the path of one.
    n_proposals
        K, samples offered per move.
    n_predraw
        Samples drawn together.
    seed
        Seed of the move's own random stream; None draws one.

    Raises
    ------
    AuditError
        The flow's log q is estimated or was not found accurate.
    ConfigurationError
        The flow is not on disk.

    Attributes
    ----------
    statistics
        ``n_proposed`` moves tried, ``n_accepted`` of them accepted; ``n_draws`` samples offered,
        ``n_invalid`` of them of zero weight (failed energy, wrong chirality, outside the chart);
        ``mean_log_weight`` of the valid ones; ``effective_proposals``, the mean Kish count among
        the K of a move; ``log_weight_scale``, ``sum_weight`` and ``sum_square_weight``, the sums
        of :math:`w e^{-c}` and its square with c the scale, for :meth:`log_z`.
    """

    _statistics_zero: ClassVar[dict[str, int | float]] = {
        "n_proposed": 0,
        "n_accepted": 0,
        "n_draws": 0,
        "n_invalid": 0,
        "mean_log_weight": 0.0,
        "effective_proposals": 0.0,
        "log_weight_scale": 0.0,
        "sum_weight": 0.0,
        "sum_square_weight": 0.0,
    }

    def __init__(
        self,
        flow: EquivariantFlow | str | Path,
        n_proposals: int = 8,
        n_predraw: int = 512,
        seed: int | None = None,
    ) -> None:
        if n_proposals < 1 or n_predraw < 1:
            raise ValueError(
                f"n_proposals = {n_proposals} and n_predraw = {n_predraw}; both must be at least 1"
            )
        super().__init__(flow, seed, n_proposals=int(n_proposals), n_predraw=int(n_predraw))

    @classmethod
    def _default_settings(cls) -> dict[str, int | float | str]:
        return {"n_proposals": 8, "n_predraw": 512}

    @property
    def n_proposals(self) -> int:
        """Samples offered per move."""
        return int(self._settings["n_proposals"])

    def _propose(self, x: Tensor, target: BoltzmannTarget, identity: int) -> Tensor | None:
        stream, n_predraw = self._stream, int(self._settings["n_predraw"])
        key = (identity, self.n_proposals, n_predraw)
        if key not in stream.buffers:
            stream.buffers[key] = ProposalBuffer(
                self._flow,
                target,
                n_proposals=self.n_proposals,
                n_predraw=n_predraw,
                generator=stream.generator,
            )
        memory = stream.memories.setdefault(identity, StateMemory())
        new, info = flow_step(
            self._flow, target, x, stream.buffers[key], stream.generator, memory=memory
        )
        self._record(info)
        return new if bool(info.accepted[0]) else None

    def _record(self, info: FlowStepInfo) -> None:
        s = self._statistics
        log_w = info.log_weight_proposals[0]
        valid = log_w[torch.isfinite(log_w)]
        n_valid = int(s["n_draws"] - s["n_invalid"])
        if valid.numel():
            total = n_valid + valid.numel()
            change = float(valid.sum()) - valid.numel() * s["mean_log_weight"]
            s["mean_log_weight"] += change / total
            top = float(valid.max())
            if n_valid == 0 or top > s["log_weight_scale"]:
                factor = math.exp(s["log_weight_scale"] - top) if n_valid else 0.0
                s["sum_weight"] *= factor
                s["sum_square_weight"] *= factor**2
                s["log_weight_scale"] = top
            w = torch.exp(valid - s["log_weight_scale"])
            s["sum_weight"] += float(w.sum())
            s["sum_square_weight"] += float(w.square().sum())
        effective = float(info.effective_proposals[0])
        s["effective_proposals"] += (effective - s["effective_proposals"]) / (s["n_proposed"] + 1)
        self._count(
            n_proposed=1,
            n_accepted=int(info.accepted[0]),
            n_draws=log_w.numel(),
            n_invalid=int(info.n_invalid[0]),
        )

    def log_z(self) -> Estimate:
        r"""Log Z of the state this move served, with its error, from the samples it was offered.

        :math:`\hat Z` is the mean weight of all ``n_draws`` samples, which are independent draws
        of the flow; Z is the integral of :math:`e^{-u}` over the mean-free subspace (nm), in the
        chirality sector of the chain. Only for a move that served one thermodynamic state.
        """
        return log_z_from_statistics(self._statistics)


def log_z_from_statistics(statistics: dict[str, int | float]) -> Estimate:
    """Log Z and its delta-method error from the statistics of a ``FlowMove``."""
    n, total = statistics["n_draws"], statistics["sum_weight"]
    if n < 2 or total <= 0.0:
        return Estimate(-math.inf, math.inf)
    inverse_ess = statistics["sum_square_weight"] / total**2
    error = math.sqrt(max(inverse_ess - 1.0 / n, 0.0) * n / (n - 1))
    return Estimate(statistics["log_weight_scale"] + math.log(total / n), error)
