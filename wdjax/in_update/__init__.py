"""In the update: after the optimizer's scaling, so that no second moment divides the decay.

This is weight decay in the sense of AdamW: the optimizer adapts the loss's gradient but not the decay. The exact place
decides the unit. Before the learning rate (`decoupled_decay`, as in PyTorch and Optax), the learning rate and its
schedule multiply the decay. After the learning rate (`independent_decay`), they do not. `continuous_decay`, also after
it, is `decoupled_decay` in continuous time, which never overshoots.

`cautious` is a modifier: it lets one of these decays act only where the decay agrees with the optimizer.
`weight_norm_control` decays the norm of weights toward a target instead of toward zero.

Three transformations do not decay. `scale_by_path` and `normalized_update` set the size of updates: by path, and
relative to the weights. `tangential_update` removes the part of an update that is parallel to the weights.
"""

from .._engine.loop import DecayState as DecayState
from .decays import continuous_decay as continuous_decay
from .decays import decoupled_decay as decoupled_decay
from .decays import independent_decay as independent_decay
from .modifiers import cautious as cautious
from .multipliers import scale_by_path as scale_by_path
from .norm_control import weight_norm_control as weight_norm_control
from .normalizing import normalized_update as normalized_update
from .tangential import tangential_update as tangential_update
