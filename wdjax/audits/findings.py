"""The findings of an audit, the most harmful first: from each parameter (`_checks`), and from all of them together."""

import re
from collections.abc import Callable, Sequence

from ..paths.roles import ADAPTER, EMBEDDING, KERNEL
from ._checks import CHECKS, rate_text
from ._facts import Facts
from ._rows import Finding
from ._states import KEEP_INTEGERS_OUT

_DRIFTS, _NARROW, _NOTHING = "state drifts", "lost beside gradients", "no decay"
_INTEGERS = "moves integers"
_LEFT_OUT, _UNEVEN = "weights left out", "uneven"
NAMES = tuple(
    dict.fromkeys((_DRIFTS, _INTEGERS, _NARROW, *(check.name for check in CHECKS), _LEFT_OUT, _UNEVEN, _NOTHING))
)


def findings_of(
    facts: Sequence[Facts], drift: tuple[str, str], narrow: str, integers: Sequence[str], calls: int
) -> tuple[Finding, ...]:
    """The findings: from each parameter, from all together, and from changes of the state and warnings of a writer."""
    found = []
    if drift[0]:
        remedy = f"So the step compiles again, and scan and checkpoints fail. {drift[1]}"
        found.append(Finding("wrong", _DRIFTS, drift[0], remedy))
    if integers:
        message = "integers or booleans move, although they have no gradient"
        found.append(Finding("wrong", _INTEGERS, message, KEEP_INTEGERS_OUT, tuple(integers)))
    if narrow:
        message, _, remedy = narrow.partition(". ")
        found.append(Finding("wrong", _NARROW, message, remedy))
    for check in CHECKS:
        remedies: dict[str, list[Facts]] = {}
        for each in facts:
            if check.applies(each):
                text = check.remedy if isinstance(check.remedy, str) else check.remedy(each)
                remedies.setdefault(text, []).append(each)
        for remedy, those in remedies.items():
            found.append(_finding(check.harm, check.name, check.message, remedy, those, check.measured))
    found += [*_left_out(facts), *_uneven(facts)]
    # A constraint may hide a decay.
    if facts and not any(each.row.decays or each.is_constrained for each in facts):
        first = "call" if calls == 1 else f"{calls} calls"
        message = f"nothing decays in the first {first} or at the tested counts"
        found.append(Finding("note", _NOTHING, message, "If this is not intended, look at masks and rates."))
    return tuple(sorted(found, key=lambda finding: ("wrong", "suspect", "note").index(finding.harm)))


def _finding(
    harm: str, name: str, message: str, remedy: str, those: Sequence[Facts], measured: Callable[[Facts], str]
) -> Finding:
    return Finding(harm, name, message, remedy, tuple(f.row.path for f in those), tuple(map(measured, those)))


def _is_judged_by_role(facts: Facts) -> bool:
    """Whether the user has not said what decay this parameter should have."""
    return facts.expected is None and facts.should_decay is None


def _left_out(facts: Sequence[Facts]) -> list[Finding]:
    """Weights that gradients move and that do not decay, although others decay. All embeddings may be left out."""
    decaying = {each.row.role for each in facts if each.row.decays}
    usual = (KERNEL, ADAPTER, *({EMBEDDING} & decaying))
    those = [
        each
        for each in facts
        if decaying and each.row.role in usual and each.row.kind == "none" and each.moves and each.is_finite
        if not each.is_frozen and _is_judged_by_role(each)
    ]
    message = "weights do not decay although other parameters do"
    remedy = "Check the mask: is it inverted? If they are left out on purpose, give the audit mask=... or expected=...."
    return [_finding("suspect", _LEFT_OUT, message, remedy, those, lambda _: "")] if those else []


def _uneven(facts: Sequence[Facts]) -> list[Finding]:
    """Layers that are alike and decay at different rates; suspect if just two rates are shared by three or more."""
    layers: dict[object, list[Facts]] = {}
    for each in facts:
        is_rate = each.is_proportional or (each.row.place == "update" and each.row.kind == "L2")
        if each.row.decays and is_rate and _is_judged_by_role(each):
            layers.setdefault((re.sub(r"\d+", "", each.row.path), each.row.shape), []).append(each)
    those: dict[str, list[Facts]] = {}
    for group in layers.values():
        rates = {f"{rate:.3g}" for each in group for rate in (each.row.least, each.row.most)}
        if len(rates) > 1:
            are_two = len(rates) == 2 < len(group) and all(each.is_proportional for each in group)
            those.setdefault("suspect" if are_two else "note", []).extend(group)
    remedy = "If this is not intended, check the table of rates by path. by_depth does this on purpose."
    message = "layers that are alike decay at different rates"
    return [_finding(harm, _UNEVEN, message, remedy, group, rate_text) for harm, group in those.items()]
