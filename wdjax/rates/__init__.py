"""Rates from what a person knows: pure functions that return a number, a schedule or a table for `weight_decay`.

No function here touches a parameter or a state. Each returns a rate, and every place takes it.

- A weight decay that follows the learning rate (`schedules`): `relative` in proportion to it, `corrected` in
  proportion to its square.
- Schedules of the weight decay that Optax has no name for (`schedules`): `cosine`, which may start at 0, and
  `log_time`.
- From what you know to a rate, and back (`conversions`): the memory of AdamW in steps or in tokens, the normalized
  weight decay of the AdamW paper, L2 in SGD with momentum, the standard deviation of a Gaussian prior.
- From a rate to where it leads (`equilibrium`): the size of AdamW's weights, and how far a step turns them.

There are two units. The rate of `decoupled_decay` is per step and per unit of learning rate, and so is that of L2 in
the gradient. The rate of `independent_decay` is per step. Each docstring says which one it returns.
"""

from .conversions import from_l2 as from_l2
from .conversions import from_normalized as from_normalized
from .conversions import from_prior as from_prior
from .conversions import from_timescale as from_timescale
from .conversions import from_tokens as from_tokens
from .conversions import prior_scale as prior_scale
from .conversions import timescale as timescale
from .equilibrium import equilibrium_angle as equilibrium_angle
from .equilibrium import equilibrium_rms as equilibrium_rms
from .schedules import corrected as corrected
from .schedules import cosine as cosine
from .schedules import log_time as log_time
from .schedules import relative as relative
