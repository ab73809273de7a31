r"""Moves for when global proposals are refused too often: latent steps and annealed proposals."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, cast

from torch import Tensor

from openmm_eqflow.flow import EquivariantFlow
from openmm_eqflow.flow_move_base import FlowMoveBase
from openmm_eqflow.latent import annealed_step, latent_step
from openmm_eqflow.latent_kernel import KernelKind, LatentKernel
from openmm_eqflow.target import BoltzmannTarget

__all__ = ["AnnealedMove", "LatentMove"]


class LatentMove(FlowMoveBase):
    r"""Walk in the flow's latent space: local in z, often far in x, exactly accepted.

    See :func:`~openmm_eqflow.latent.latent_step`. The centroid, the velocities and the chirality
    are kept, the orientation as far as the shapes allow.

    Parameters
    ----------
    flow, seed
        As for :class:`~openmm_eqflow.moves.FlowMove`.
    step
        Size of a latent step, in (0, 1]: 1 draws the Gaussian coordinates afresh.
    n_repeats
        Steps per move; the inverse flow is paid once.
    kernel
        ``"pcn"``, or ``"langevin"``, which follows the gradient at a higher cost per step.

    Attributes
    ----------
    statistics
        ``n_proposed`` and ``n_accepted`` latent steps; ``n_invalid`` of zero weight.
    """

    def __init__(
        self,
        flow: EquivariantFlow | str | Path,
        step: float = 0.3,
        n_repeats: int = 4,
        kernel: KernelKind = "pcn",
        seed: int | None = None,
    ) -> None:
        if n_repeats < 1:
            raise ValueError(f"n_repeats is {n_repeats}; expected at least 1")
        super().__init__(flow, seed, step=float(step), n_repeats=int(n_repeats), kernel=kernel)

    @classmethod
    def _default_settings(cls) -> dict[str, int | float | str]:
        return {"step": 0.3, "n_repeats": 4, "kernel": "pcn"}

    def _propose(self, x: Tensor, target: BoltzmannTarget, identity: int) -> Tensor | None:
        n_repeats = int(self._settings["n_repeats"])
        kernel = _kernel(self, target)
        new, info = latent_step(kernel, x, n_repeats, self._stream.generator)
        n_accepted = int(info.n_accepted[0])
        self._count(n_proposed=n_repeats, n_accepted=n_accepted, n_invalid=int(info.n_invalid[0]))
        return new if n_accepted else None


class AnnealedMove(FlowMoveBase):
    r"""Offer the ends of short annealed paths from the flow to the target.

    See :func:`~openmm_eqflow.latent.annealed_step`: a path of T latent steps at rising
    :math:`\beta` carries the weight of annealed importance sampling, the current state gets a
    reversed path, and the choice is exact on the space of paths. Worth its T + 1 flow and energy
    evaluations where the weights of plain proposals spread over many kT.

    Parameters
    ----------
    flow, seed
        As for :class:`~openmm_eqflow.moves.FlowMove`.
    n_proposals, n_bridge
        Paths offered per move, and steps T of each.
    step, kernel
        As for :class:`LatentMove`.

    Attributes
    ----------
    statistics
        ``n_proposed`` moves, ``n_accepted`` of them; ``n_draws`` paths, ``n_invalid`` of zero
        weight; ``effective_proposals`` and ``bridge_acceptance``, means over the moves.
    """

    _statistics_zero: ClassVar[dict[str, int | float]] = {
        "n_proposed": 0,
        "n_accepted": 0,
        "n_draws": 0,
        "n_invalid": 0,
        "effective_proposals": 0.0,
        "bridge_acceptance": 0.0,
    }

    def __init__(
        self,
        flow: EquivariantFlow | str | Path,
        n_proposals: int = 8,
        n_bridge: int = 4,
        step: float = 0.3,
        kernel: KernelKind = "pcn",
        seed: int | None = None,
    ) -> None:
        if n_proposals < 1 or n_bridge < 0:
            raise ValueError(
                f"n_proposals = {n_proposals}, n_bridge = {n_bridge}; expected at least 1 and 0"
            )
        super().__init__(
            flow,
            seed,
            n_proposals=int(n_proposals),
            n_bridge=int(n_bridge),
            step=float(step),
            kernel=kernel,
        )

    @classmethod
    def _default_settings(cls) -> dict[str, int | float | str]:
        return {"n_proposals": 8, "n_bridge": 4, "step": 0.3, "kernel": "pcn"}

    def _propose(self, x: Tensor, target: BoltzmannTarget, identity: int) -> Tensor | None:
        n_proposals, n_bridge = (int(self._settings[k]) for k in ("n_proposals", "n_bridge"))
        kernel = _kernel(self, target)
        new, info = annealed_step(kernel, x, n_proposals, n_bridge, self._stream.generator)
        s, n = self._statistics, self._statistics["n_proposed"] + 1
        for name, value in (
            ("effective_proposals", info.effective_proposals),
            ("bridge_acceptance", info.bridge_acceptance),
        ):
            s[name] += (float(value[0]) - s[name]) / n
        accepted = bool(info.accepted[0])
        self._count(
            n_proposed=1,
            n_accepted=int(accepted),
            n_draws=n_proposals,
            n_invalid=int(info.n_invalid[0]),
        )
        return new if accepted else None


def _kernel(move: FlowMoveBase, target: BoltzmannTarget) -> LatentKernel:
    settings = move._settings
    kind = cast(KernelKind, settings["kernel"])
    return LatentKernel(move.flow, target, float(settings["step"]), kind)
