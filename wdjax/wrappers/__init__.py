"""Wrappers around a finished optimizer: `with_decoupled_decay` adds weight decay, and `freeze` freezes parameters.
`with_sparse_decay` and `with_lazy_decay` decay only the rows that have a gradient. `with_stable_decay` divides its
decay by the size of the gradients. `with_selective_decay` holds an array back if its
negative gradient points back.

Around a finished optimizer, there is only one right place for a decay: after it, with the factor of the learning rate
and the right sign. Two kinds of optimizers need more than that:

- Some do not step at every update: `optax.MultiSteps` while it accumulates or skips, `optax.apply_if_finite` at a
  NaN. The decay waits with them, and so does its step count.
- Schedule-free holds the iterate that it really steps in its state. The decay goes into that iterate, and through its
  averaging into the weights, as if it were in the base optimizer.
- `optax.inject_hyperparams` keeps the learning rate in its state, where a training loop may set it, and
  `reduce_on_plateau` a factor of it. The decay takes both from there.

Optimizers that rewrite the weights from their own state, that step only in part, or that estimate the size of their
steps raise an error. Only their own code can put a decay into such a step.
"""

from .decay import WithDecoupledDecayState as WithDecoupledDecayState
from .decay import with_decoupled_decay as with_decoupled_decay
from .freezing import freeze as freeze
from .rows import with_lazy_decay as with_lazy_decay
from .rows import with_sparse_decay as with_sparse_decay
from .selective import with_selective_decay as with_selective_decay
from .stable import with_stable_decay as with_stable_decay
