"""Rule sets: they decide on each parameter by its name, shape and dtype while tracing, never by its values.

All rule sets are `Rules`. They give each parameter a value: a boolean (a mask), a rate, a multiplier, a schedule, or a
string (a label for `optax.partition`). These functions make them:

- `by_path`, `only`, `all_but` (`_tables`): a table from patterns to values. The first rule that matches wins.
- `weights_only` (`standard`): selects the weights of layers and nothing else. It goes by names and shapes (`roles`)
  or by the modules of a model (`_modules`). `register_layer` adds your own layers.
- `by_depth` and `by_width` (`_depth`, `_width`): multipliers from the depth of a block or the width of a matrix.

A rule set may be a value, a pattern (if it is a mask), the default or a factor of another rule set.

A pattern (`language`) is one of

- a string: a shell pattern, case-sensitive. `*`, `?` and `[...]` stay within a segment of the path. `**` spans any
  number of segments. Without "/" the pattern is compared with each segment, at any depth (`"bias"`, `"LayerNorm_*"`).
  With "/" it is compared with the path from the root (`"encoder/**/kernel"`). An inner node includes all below it.
- a compiled regular expression, which must match the whole path: `re.compile(r".*/kernel")`.
- a predicate, which is a function of a `Leaf` (path, shape, dtype): `lambda leaf: leaf.ndim >= 2`.
- a mask made of rules, which matches where it is True: `weights_only()`.
- a tuple of these. It matches where any of them does.

`syntax=` reads strings as other libraries do: as regular expressions or as parts of a path.

The canonical path of a parameter is its keys joined by "/". It is the same in every library. `canonical_paths` lists
the paths.

Three things raise an error: a rule that matches nothing, a rule that never decides because earlier rules match the same
parameters first, and a parameter without a rule. So a typo in a pattern stops the program before the first step.
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
