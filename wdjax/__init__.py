"""wdjax: weight decay for JAX, as Optax gradient transformations. Each place in a training step has its functions:

    params ─▶ loss ──▶ grad ──▶ scale_by_adam ──▶ × −learning_rate ──▶ apply_updates ─▶ params
               ▲        ▲                    ▲                     ▲                ▲
            in_loss  in_gradient         in_update             in_update       on_weights
          l2_penalty add_l2_to_grads  decoupled_decay      independent_decay  proximal_step
                                                                               constrain

`weights_only`, `by_path`, `only` and `all_but` (wdjax.paths) choose parameters, and `plan` (wdjax.plans) shows the
choice for a model. Rates from what a person knows: wdjax.rates. Learning rates by path: `scale_by_path`. Penalties:
`L2`, `L1`, ... (wdjax.penalties). Constraints: `L2Ball`, `L2Sphere`, ... (wdjax.constraints). Wrappers for a finished
optimizer (wdjax.wrappers): `with_decoupled_decay`, `with_sparse_decay`, `with_lazy_decay`, `freeze`. For their states
(wdjax.states): `thaw`, `stale_hyperparams`, `state_shardings`. LoRA: `decoupled_lora_decay`. Low precision:
wdjax.low_precision. `audit` (wdjax.audits) finds out what an optimizer really does; `monitor` (wdjax.telemetry)
measures it during training. `sweep` (wdjax.sweeps) searches for the best rate. Complete optimizers: wdjax.recipes. For
your own tests: wdjax.testing.

Less common methods have names in their rooms only: `weight_norm_control` and `tangential_update` in wdjax.in_update,
`cpr` and `shrink_and_perturb` in wdjax.on_weights, `with_stable_decay` and `with_selective_decay` in wdjax.wrappers,
`Lp`, `SparseGroupLasso`, `NuclearNorm`, `SpectralNorm` and `Orthogonality` in wdjax.penalties.
"""

from . import rates as rates
from ._engine.anchors import EMA as EMA
from ._engine.types import Anchor as Anchor
from ._engine.types import Mask as Mask
from ._engine.types import Params as Params
from ._engine.types import Rate as Rate
from ._engine.types import Schedule as Schedule
from .audits import Audit as Audit
from .audits import audit as audit
from .constraints import L1Ball as L1Ball
from .constraints import L2Ball as L2Ball
from .constraints import L2Sphere as L2Sphere
from .constraints import NonNegative as NonNegative
from .constraints import SpectralBall as SpectralBall
from .in_gradient import add_l2_to_grads as add_l2_to_grads
from .in_gradient import add_penalty_to_grads as add_penalty_to_grads
from .in_loss import l2_penalty as l2_penalty
from .in_loss import penalty as penalty
from .in_update import cautious as cautious
from .in_update import continuous_decay as continuous_decay
from .in_update import decoupled_decay as decoupled_decay
from .in_update import independent_decay as independent_decay
from .in_update import normalized_update as normalized_update
from .in_update import scale_by_path as scale_by_path
from .low_precision import apply_updates as apply_updates
from .low_precision import compensated as compensated
from .low_precision import in_float32 as in_float32
from .low_precision import master_weights as master_weights
from .low_precision import stochastic_rounding as stochastic_rounding
from .low_rank import decoupled_lora_decay as decoupled_lora_decay
from .on_weights import constrain as constrain
from .on_weights import proximal_step as proximal_step
from .paths import Leaf as Leaf
from .paths import Rules as Rules
from .paths import all_but as all_but
from .paths import by_depth as by_depth
from .paths import by_path as by_path
from .paths import by_width as by_width
from .paths import only as only
from .paths import weights_only as weights_only
from .penalties import L1 as L1
from .penalties import L2 as L2
from .penalties import ElasticNet as ElasticNet
from .penalties import GroupLasso as GroupLasso
from .penalties import Huber as Huber
from .penalties import Penalty as Penalty
from .penalties import ProximalPenalty as ProximalPenalty
from .plans import Plan as Plan
from .plans import plan as plan
from .recipes import adam_l2 as adam_l2
from .recipes import adamw as adamw
from .recipes import sgd_l2 as sgd_l2
from .recipes import sgdw as sgdw
from .states import stale_hyperparams as stale_hyperparams
from .states import state_shardings as state_shardings
from .states import thaw as thaw
from .sweeps import sweep as sweep
from .telemetry import monitor as monitor
from .telemetry import scalars as scalars
from .wrappers import freeze as freeze
from .wrappers import with_decoupled_decay as with_decoupled_decay
from .wrappers import with_lazy_decay as with_lazy_decay
from .wrappers import with_sparse_decay as with_sparse_decay

__version__ = "0.1.0"
