"""For your own unit tests: closed forms of weight decay, and assertions that an optimizer follows them.

The closed forms (`oracles`) use NumPy in float64 and no JAX. The `assertions` use chex, so this room needs the extra
`wdjax[testing]`. It is imported by name: `import wdjax.testing`.
"""

try:
    import chex as _chex  # noqa: F401
except ImportError as error:
    raise ImportError(
        "wdjax.testing needs chex, which is not installed. Run pip install 'wdjax[testing]', or pip install chex."
    ) from error

from .assertions import assert_audit as assert_audit
from .assertions import assert_only_decays as assert_only_decays
from .assertions import assert_plan as assert_plan
from .oracles import decayed_weights as decayed_weights
from .oracles import heavy_ball_weights as heavy_ball_weights
from .oracles import ridge_solution as ridge_solution
from .oracles import soft_threshold as soft_threshold
from .penalties import assert_gradient as assert_gradient
from .penalties import assert_prox as assert_prox
