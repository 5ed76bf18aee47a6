"""Rule sets: they decide on each parameter by its name, shape and dtype while tracing, never by its values.

A rule set gives each parameter a value: a boolean (a mask), a rate, a multiplier, a schedule, or a string (a label for
`optax.partition`). `by_path`, `only` and `all_but` are tables from patterns to values. `weights_only` selects weights,
by names and shapes or by the modules of a model. `by_depth` and `by_width` are multipliers. A rule set may be a value,
a pattern (if it is a mask), the default or a factor of another rule set.

A pattern is one of

- a string: a shell pattern, case-sensitive. `*`, `?` and `[...]` stay within a segment of the path. `**` spans any
  number of segments. Without "/" the pattern is compared with each segment, at any depth (`"bias"`, `"LayerNorm_*"`).
  With "/" it is compared with the path from the root (`"encoder/**/kernel"`). An inner node includes all below it.
- a compiled regular expression, which must match the whole path: `re.compile(r".*/kernel")`.
- a predicate, which is a function of a `Leaf` (path, shape, dtype): `lambda leaf: leaf.ndim >= 2`.
- a mask made of rules, which matches where it is True: `weights_only()`.
- a tuple of these. It matches where any of them does.

The canonical path of a parameter is its keys joined by "/", in every library. `canonical_paths` lists the paths.

A rule that matches nothing, a rule that never decides because earlier rules match the same parameters first, and a
parameter without a rule are errors. So a typo in a pattern stops the program before the first step. A parameter that a
mask leaves out needs no rate.
"""

from .._engine.rules import Rules as Rules
from .._engine.trees import Leaf as Leaf
from .._engine.trees import canonical_paths as canonical_paths
from ._depth import by_depth as by_depth
from ._modules import register_layer as register_layer
from ._tables import all_but as all_but
from ._tables import by_path as by_path
from ._tables import only as only
from ._tables import stacks as stacks
from ._width import by_width as by_width
from .standard import weights_only as weights_only
