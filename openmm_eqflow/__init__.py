r"""Boltzmann samples of OpenMM systems from equivariant continuous normalizing flows.

Where each equation lives, and which test checks it:

==========================================  ===============  ============================================  ========================================================================================
equation                                    symbol           dotted path                                   test
==========================================  ===============  ============================================  ========================================================================================
ladj = int_0^1 div v dt                     ladj             flows.flow.rk4                                flows/test_integrate::test_fourth_order
y <- y + psi(x) - psi(phi(y))               y                flows.flow.rk4_inverse                        flows/test_integrate::test_the_corrected_inverse_is_that_of_the_discrete_map
log q(x) = log p0(z) - ladj - log volume    log q            flows.flow.EquivariantFlow                    flows/test_flow::test_integral_of_q_is_one_for_two_particles
tr dv/dx, D tangents of the readout         div v            vector_fields.leave_one_out.LeaveOneOutField  vector_fields/test_contract::test_divergence_is_the_trace
tr dv/dy = d1^T [W1 * (W0 W2)^T] d0         div v            vector_fields.chart.ChartField                vector_fields/test_contract::test_divergence_is_the_trace
m sigma' . (sum_k U phi') (d_z d_p . W)     div v            vector_fields.contact.ContactField            vector_fields/test_contract::test_divergence_is_the_trace
v_p + omega x (x_i - x_p) + dx/dq dq        dx/dy            vector_fields.chart_geometry.ChartGeometry    vector_fields/test_contact::test_derivative_of_the_positions
sum_ij D phi + d phi'                       div v            vector_fields.kernel.KernelField              vector_fields/test_contract::test_divergence_is_the_trace
sum_ij D phi + d phi', phi = sum c_m B_m    div v            vector_fields.radial.RadialSplineField        vector_fields/test_contract::test_divergence_is_the_trace
-sum u_k+1(M x) - u_k(x) - log|det DM|      log w            flows.path.Path                               flows/test_path::test_weights_forwards_and_backwards_give_log_z
log q + sum_k log p_k(b_k) - log p_k(a_k)   log q-hat        flows.relaxed.relax                           flows/test_path::test_weights_forwards_and_backwards_give_log_z
(sum W e^d)^2 / sum W e^2d = share          t_k              flows.adapt.carry                             flows/test_adapt::test_a_mode_that_the_prior_lost_shows_in_the_weight_of_the_floor
Z / E_p[w], 1 / E_p[1/w]                    ESS, Z           runs.annealing.backwards                      runs/test_annealing::test_paths_backwards_find_what_those_forwards_hardly_meet
log w += (s_k-1 - s_k) u                    log Z(T)         flows.temperatures.continued                  flows/test_temperatures::test_log_z_and_energies_at_other_temperatures
du/dt - E[du/dt] = div v - v . grad u       c_m(t)           flows.softcore_fit.fit_path                   flows/test_stochastic::test_fit_leaves_less_to_do
h div v = log|det d(x + h v)/dx|            ladj             flows.softcore.SoftCoreMap                    flows/test_stochastic::test_determinants_are_those_of_the_jacobian_by_autograd
sum_k e_k . J e_k                           div v            vector_fields.divergence.exact_divergence     vector_fields/test_contract::test_divergence_is_the_trace
-|x|^2/2s^2 - (N-1)D/2 log 2 pi s^2         log p0           priors.gaussian.MeanFreeGaussian              priors/test_gaussian::test_normalised_on_the_mean_free_subspace
log p(y) - log volume                       log p0           priors.internal.InternalCoordinatePrior       priors/test_internal::test_triatomic_density_integrates_to_one_and_matches_samples
sum_c W_c |C_c|^-1 rho(C_c^-1 (z - m_c))    log rho(z)       priors.internal.InternalCoordinatePrior        priors/test_chemistry::test_a_mixture_integrates_to_one_and_its_samples_have_its_shares
eta prod p_g + (1-eta) sum W_c prod p_g|c   log p(tau)       priors.torsions.Conformers                    priors/test_torsions::test_mixture_is_normalised_by_quadrature
8 pi^2 N^(-3/2) prod b^2 sin theta          log volume       priors.zmatrix.ZMatrix.log_volume             priors/test_zmatrix::test_volume_element_is_the_jacobian_determinant
sqrt(det H), H = C M^-1 C^T                 log volume       targets.constraints.Constraints               targets/test_constraints::test_paths_give_the_angle_of_constrained_dynamics
E[s + Sigma g] = E[s]                       Sigma            priors.fit.fit_internal_prior                 priors/test_internal::test_forces_make_the_fit_data_efficient
div v + v . grad log p_t + log w - E[..]    r_t              training.liouville.LiouvilleLoss              training/test_liouville::test_exact_field_has_no_residual
w^t / sum_l alpha_l exp(t_l log w - F_l)    omega_t          analysis.balance.path_weights                 training/test_pool::test_weights_give_moments_of_every_time
exp(-Delta H) for p_0^(1-t) p_1^t           acceptance       flows.kernels.Trajectory                      flows/test_path::test_kernels_leave_their_level_invariant
|v(t, x_t) - (x_1 - x_0)|^2                 loss             training.flow_matching.FlowMatchingLoss       training/test_flow_matching::test_the_loss_is_least_at_the_exact_field
-E_data[log q]                              NLL              training.divergences.LikelihoodLoss           training/test_divergences::test_likelihood_is_the_flows_own
E_q[log q + u]                              KL(q|p)          training.divergences.ReverseKLLoss            training/test_divergences::test_reverse_kl_takes_forces_from_openmm
grad_y (log q - log p) . dT/dtheta          grad KL(q|p)     training.divergences.ReversePathLoss          training/test_path_gradients::test_reverse_path_gradient_is_unbiased
grad_z (log p_theta0 - log p0) . dz/dtheta  grad KL(p|q)     training.divergences.ForwardPathLoss          training/test_path_gradients::test_forward_path_gradient_is_unbiased
sum_k w_k(s) L_k                            w_k              training.schedule.Schedule                    training/test_schedule::test_weights_are_piecewise_linear
g = sum over shards of all processes        gradient         parallel.sum_over_processes                   test_parallel::test_the_loss_curve_is_that_of_one_process
ds/dt = -grad_y (v . s + div v)             s_t              training.solve.transport_score                training/test_divergences::test_score_of_the_flow
u_h + log(u - u_h + 1)                      u_reg            training.divergences.bound_energy             training/test_divergences::test_energy_is_bounded_and_its_slope_follows
u = U / kT, +inf off the sector             u                targets.target.BoltzmannTarget                targets/test_target::test_wrong_hand_and_failures_are_infinite_and_counted
log w = -u - log q                          log_weight       runs.evaluation.draw_weighted                 runs/test_evaluation::test_weights_are_those_of_the_densities
min(1, w(x') / w(x))                        log_acceptance   moves.metropolis.log_acceptance_ratio         moves/test_metropolis::test_one_proposal_is_the_metropolis_rule
multiple-try Metropolis                     P(choice)        moves.metropolis.multiple_try_probabilities   moves/test_metropolis::test_detailed_balance_is_exact
exp(-Delta H)                               acceptance       flows.kernels.hamiltonian_step                flows/test_kernels::test_stationary
(sum w)^2 / n sum w^2                       relative_ess     analysis.weights.relative_ess                 analysis/test_weights_and_chains::test_gaussian_log_weights_reproduce_their_relative_ess
log mean w                                  log Z            analysis.weights.log_z                        analysis/test_weights_and_chains::test_log_z_covers_the_truth_at_the_stated_rate
|log q - log q(fine, float64)|              log_q_error_p99  flows.audit.audit                             flows/test_audit::test_coarse_grid_fails_in_every_measure
==========================================  ===============  ============================================  ========================================================================================

The names below load on first use, so that importing the package costs nothing.
"""  # noqa: E501

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openmm_eqflow.flows.flow import EquivariantFlow
    from openmm_eqflow.flows.storage import load_flow, save_flow
    from openmm_eqflow.moves.flow_moves import AnnealedMove, FlowMove, LatentMove
    from openmm_eqflow.moves.replica_exchange import FlowReplicaExchangeSampler
    from openmm_eqflow.priors.gaussian import MeanFreeGaussian
    from openmm_eqflow.priors.internal import InternalCoordinatePrior
    from openmm_eqflow.runs.stages import run
    from openmm_eqflow.targets.library import load_system
    from openmm_eqflow.targets.own_system import init_system
    from openmm_eqflow.targets.target import BoltzmannTarget
    from openmm_eqflow.vector_fields import ChartField, LeaveOneOutField

__all__ = [
    "AnnealedMove",
    "BoltzmannTarget",
    "ChartField",
    "EquivariantFlow",
    "FlowMove",
    "FlowReplicaExchangeSampler",
    "InternalCoordinatePrior",
    "LatentMove",
    "LeaveOneOutField",
    "MeanFreeGaussian",
    "init_system",
    "load_flow",
    "load_system",
    "run",
    "save_flow",
]

_HOMES = {
    "AnnealedMove": "moves.flow_moves",
    "BoltzmannTarget": "targets.target",
    "ChartField": "vector_fields",
    "EquivariantFlow": "flows.flow",
    "FlowMove": "moves.flow_moves",
    "FlowReplicaExchangeSampler": "moves.replica_exchange",
    "InternalCoordinatePrior": "priors.internal",
    "LatentMove": "moves.flow_moves",
    "LeaveOneOutField": "vector_fields",
    "MeanFreeGaussian": "priors.gaussian",
    "init_system": "targets.own_system",
    "load_flow": "flows.storage",
    "load_system": "targets.library",
    "run": "runs.stages",
    "save_flow": "flows.storage",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
