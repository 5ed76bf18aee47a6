"""Penalties: a value, its gradient, and its proximal map, each in closed form.

A penalty does not depend on the place where it acts. The same object serves in the loss (its `value`), in the gradient
(its `gradient`), and on the weights after the step (its `prox`). The place sets the strength. All three methods get one
array and compute in its dtype. `gradient` and `prox` keep its shape.

| penalty | value(w) | gradient(w) | prox(w, k) |
|---|---|---|---|
| `L2()` | sum w^2 / 2 | w | w / (1 + k) |
| `L1()` | sum \\|w\\| | sign(w) | sign(w) max(\\|w\\| - k, 0) |
| `ElasticNet(r)` | r L1 + (1 - r) L2 | r sign(w) + (1 - r) w | prox of L1 at k r, divided by 1 + k (1 - r) |
| `GroupLasso(per=-1)` | sum over groups of \\|\\|w\\|\\| | w / \\|\\|w\\|\\| | w max(1 - k / \\|\\|w\\|\\|, 0) |
| `SparseGroupLasso(l1_ratio=r)` | r L1 + (1 - r) GroupLasso | the same of gradients | prox of L1 at k r, then that of \
GroupLasso at k (1 - r) |
| `Huber(delta)` | w^2 / 2, linear beyond delta | w clipped to +-delta | that of L2; for large w, w - k delta sign(w) |
| `Lp(p)` | sum \\|w\\|^p / p | sign(w) \\|w\\|^(p - 1) | sign(w) v with v + k v^(p - 1) = \\|w\\|, or 0 |
| `NuclearNorm()` | sum of singular values s | U V^T | U diag(max(s - k, 0)) V^T |
| `SpectralNorm()` | s^2 / 2 of the largest one | s u v^T | singular values capped |
| `Orthogonality()` | \\|\\|W^T W - I\\|\\|^2 / 4 | W (W^T W - I) | – |

Complex weights: |w| is the modulus, sign(w) is w / |w|.
"""

from .groups import GroupLasso as GroupLasso
from .groups import SparseGroupLasso as SparseGroupLasso
from .kinds import L1 as L1
from .kinds import L2 as L2
from .kinds import ElasticNet as ElasticNet
from .kinds import Huber as Huber
from .matrices import NuclearNorm as NuclearNorm
from .matrices import Orthogonality as Orthogonality
from .matrices import SpectralNorm as SpectralNorm
from .powers import Lp as Lp
from .protocol import Penalty as Penalty
from .protocol import ProximalPenalty as ProximalPenalty
from .protocol import check_kind as check_kind
from .protocol import check_strength as check_strength
from .protocol import gradient as gradient
from .protocol import is_elementwise as is_elementwise
from .protocol import is_ours as is_ours
from .protocol import prox as prox
from .protocol import rule_of as rule_of
from .protocol import value as value
from .protocol import weighted_value as weighted_value
