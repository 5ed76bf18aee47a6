"""On the weights: last in the chain, where the update is rewritten so that the rule decides `params + update`.

A proximal step does not follow the penalty's gradient. It minimizes the penalty plus half the squared distance from
where the optimizer arrived. It never overshoots, however large the strength is. Where the penalty has a corner (L1,
group lasso), weights land on it: they become exactly zero. Weights may miss a nonzero anchor by about the last bit:
they are set through a difference, which is always exact only if the weight becomes zero.

A constraint has a radius instead of a strength: `constrain` moves weights to the nearest ones that obey it. A bound of
`cpr` holds in the limit: its decay grows while a penalty is above the bound.

`shrink_and_perturb` shrinks the weights and adds noise to them, once before training goes on or in every step.
"""

from .bounds import AtInit as AtInit
from .bounds import InflectionPoint as InflectionPoint
from .bounds import WarmStart as WarmStart
from .constraining import constrain as constrain
from .cpr import cpr as cpr
from .perturbing import shrink_and_perturb as shrink_and_perturb
from .proximal import proximal_step as proximal_step
