"""Which parameters: rule sets, decided from names, shapes and dtypes while tracing, never from values.

What they have in common is `Rules` (`_rules`): a value for each parameter, a boolean (a mask), a rate, a multiplier, a
schedule, or a text (a label for `optax.partition`). They are made by

- `by_path`, `only`, `all_but` (`_tables`): a table from patterns to values, in which the first rule that matches wins;
- `weights_only` (`_standard`): the weights of layers and nothing else, told from names and shapes (`_roles`) or from
  the modules of a model (`_modules`), to which `register_layer` adds your own;
- `by_depth` and `by_width` (`_depth`, `_width`): multipliers from a block's depth and a matrix's width.

Each may be a value, a pattern (if it is a mask), the default or a factor of another.

A pattern (`_patterns`) is one of

- a text: a shell pattern, case-sensitive. `*`, `?` and `[...]` stay within a segment of the path, `**` spans any
  number of segments. Without "/" it is compared with each segment, at any depth (`"bias"`, `"LayerNorm_*"`); with
  "/" it is compared with the path from the root (`"encoder/**/kernel"`). Matching an inner node takes all below it;
- a compiled regular expression, which must match the whole path: `re.compile(r".*/kernel")`;
- a predicate, a function of a `Leaf` (path, shape, dtype): `lambda leaf: leaf.ndim >= 2`;
- a mask by rules, which matches where it is True: `weights_only()`;
- a tuple of these, any of which may match.

`syntax=` reads texts as other libraries do, as regular expressions or as pieces of a path.

The canonical path of a parameter is its keys joined by "/", the same in every library; `canonical_paths` lists them.

A rule that matches nothing, a rule that never decides because earlier ones take all it matches, and a parameter that
no rule covers are errors: a typo in a pattern stops the program before the first step.
"""

from .._engine.rules import Rules as Rules
from .._engine.trees import Leaf as Leaf
from .._engine.trees import canonical_paths as canonical_paths
from ._depth import by_depth as by_depth
from ._modules import register_layer as register_layer
from ._standard import weights_only as weights_only
from ._tables import all_but as all_but
from ._tables import by_path as by_path
from ._tables import only as only
from ._tables import stacks as stacks
from ._width import by_width as by_width
