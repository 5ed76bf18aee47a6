"""What an update of one parameter computes from what all parameters share, parted from what is the parameter's own.

Bias corrections and values of schedules depend on the step alone. Where the update is a function that is called for
each parameter, they stand in each call, and XLA, which inlines the calls, has to find out for a thousand of them that
they are all the same. Parted from the rest they are computed once.
"""

import dataclasses
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Var, jaxpr_as_fun

# By the program that was parted, for as long as it is in JAX's own caches.
_parted: weakref.WeakKeyDictionary[ClosedJaxpr, "Parted"] = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True, eq=False)
class Parted:
    """An update in two functions.

    Attributes:
        for_all: from the program's constants and what is shared to the outputs that are shared, and what is known then.
        for_each: from what is known, and the inputs of several parameters by column (those of a tree in the last), to
            their outputs by column.
    """

    for_all: Callable[..., Sequence[Any]]
    for_each: Callable[[Sequence[Any], Sequence[Sequence[Any]], Sequence[Any]], Sequence[Sequence[Any]]]


def parted(program: ClosedJaxpr, inputs: int, outputs: int) -> Parted | None:
    """Parts a program of which the first inputs and outputs are of one parameter, and the others shared.

    Returns:
        None if it has effects, such as printing.
    """
    if program.effects:
        return None
    if program not in _parted:
        _parted[program] = _part(program.jaxpr, inputs, outputs)
    return _parted[program]


def _part(jaxpr: Any, inputs: int, outputs: int) -> Parted:
    given = [*jaxpr.constvars, *jaxpr.invars[inputs:]]
    own = set(jaxpr.invars[:inputs])
    for equation in jaxpr.eqns:
        if not own.isdisjoint(_variables(equation.invars)):
            own.update(equation.outvars)

    def is_known(variable: Var) -> bool:
        # No arrays, such as zeros of the parameter's shape, which would be in memory.
        return variable not in own and (variable in given or getattr(variable.aval, "shape", None) == ())

    for_each, needed = _needed(jaxpr.eqns, jaxpr.outvars[:outputs], is_known)
    known = [variable for variable in needed if variable not in own]
    shared = [*jaxpr.outvars[outputs:], *known]
    for_all, _ = _needed(jaxpr.eqns, shared, given.__contains__)

    each = _function(jaxpr, [*jaxpr.invars[:inputs], *known], for_each, jaxpr.outvars[:outputs])

    def update_several(known: Sequence[Any], columns: Any, trees: Sequence[Any]) -> Sequence[Sequence[Any]]:
        leaves = map(jax.tree.leaves, zip(zip(*columns, strict=True), trees, strict=True))
        return list(zip(*[each(*leaf, *known) for leaf in leaves], strict=True))

    return Parted(_function(jaxpr, given, for_all, shared), jax.jit(update_several))


def _needed(
    equations: Sequence[Any], outputs: Iterable[Any], is_given: Callable[[Var], bool]
) -> tuple[list[Any], Collection[Var]]:
    """The equations that it takes to compute the outputs, and the variables among those given that they begin with."""
    wanted = dict.fromkeys(_variables(outputs))
    chosen = []
    for equation in reversed(equations):
        if any(variable in wanted and not is_given(variable) for variable in equation.outvars):
            chosen.append(equation)
            wanted |= dict.fromkeys(_variables(equation.invars))
    made = {variable for equation in chosen for variable in equation.outvars}
    return chosen[::-1], [variable for variable in wanted if variable not in made]


def _variables(atoms: Iterable[Any]) -> list[Var]:
    return [atom for atom in atoms if isinstance(atom, Var)]


def _function(jaxpr: Any, inputs: Sequence[Var], equations: Sequence[Any], outputs: Sequence[Any]) -> Any:
    part = jaxpr.replace(constvars=[], invars=inputs, eqns=equations, outvars=outputs)
    return jax.jit(jaxpr_as_fun(ClosedJaxpr(part, ())))
