"""Which objectives and schedules a comparison has, by name; imports nothing heavy."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.losses.schedule import OBJECTIVES, schedule_misfit
from openmm_eqflow.recipes import Recipe

__all__ = ["RECIPE", "choose", "parse_schedules", "suited"]

#: Name of the recipe's own objective where that is a schedule.
RECIPE = "recipe"
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*", re.ASCII)


def suited(recipe: Recipe) -> tuple[str, ...]:
    """Objectives that make sense with the prior of a recipe, each alone.

    The Liouville residual needs a prior that overlaps the target, flow matching moves Cartesian
    coordinates; the others train any flow.
    """
    other = "flow-matching" if recipe.prior == "internal" else "liouville"
    return tuple(name for name in OBJECTIVES if name != other)


def parse_schedules(given: Iterable[str]) -> dict[str, Any]:
    """Schedules given as ``NAME=JSON``.

    Examples
    --------
    >>> parse_schedules(['both={"nll": [[0, 1], [1, 0.5]], "reverse-kl": [[0, 0], [1, 0.5]]}'])
    {'both': {'nll': [[0, 1], [1, 0.5]], 'reverse-kl': [[0, 0], [1, 0.5]]}}

    Raises
    ------
    ConfigurationError
        Not of that form, a name that is taken or no file name, or no schedule.
    """
    found: dict[str, Any] = {}
    for text in given:
        name, equals, words = text.partition("=")
        if not equals or not _NAME.fullmatch(name):
            raise ConfigurationError(
                f"schedule is {text!r}, expected NAME=JSON with a name of letters, digits, '-' "
                "and '_'"
            )
        if name in (*OBJECTIVES, RECIPE, *found):
            raise ConfigurationError(f"schedule {name!r}: the name is taken, choose another")
        try:
            found[name] = json.loads(words)
        except json.JSONDecodeError as error:
            raise ConfigurationError(
                f"schedule {name!r} is not valid JSON ({error}), expected "
                '{"OBJECTIVE": [[fraction, weight], ...], ...}'
            ) from None
        if (wanted := schedule_misfit(found[name])) is not None:
            raise ConfigurationError(f"schedule {name!r}: expected {wanted}")
    return found


def choose(
    recipe: Recipe, names: Sequence[str] | None = None, schedules: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return what is compared, {name: objective}.

    Parameters
    ----------
    recipe
        Of the run; its own objective is called ``recipe`` if it is a schedule.
    names
        Objectives alone, or ``recipe``; all that make sense by default.
    schedules
        Further ones, by name.

    Raises
    ------
    ConfigurationError
        An unknown objective (with near matches), or one that does not suit the prior.
    """
    alone = suited(recipe)
    known: dict[str, Any] = {name: name for name in alone}
    if not isinstance(recipe.objective, str):
        known[RECIPE] = recipe.objective
    for name in names or ():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
            hint = " or ".join(map(repr, near)) if near else f"one of {', '.join(known)}"
            why = f"does not suit the {recipe.prior} prior" if name in OBJECTIVES else "is unknown"
            raise ConfigurationError(f"objective {name!r} {why}; did you mean {hint}?")
    chosen = {name: known[name] for name in dict.fromkeys(names or known)}
    for name, schedule in (schedules or {}).items():
        for part in schedule:
            if part not in alone:
                raise ConfigurationError(
                    f"schedule {name!r}: objective {part!r} does not suit the {recipe.prior} "
                    f"prior, expected names out of {', '.join(alone)}"
                )
        chosen[name] = schedule
    return chosen
