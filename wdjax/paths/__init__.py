"""Which parameters: rules by path, decided from names, shapes and dtypes while tracing, never from values.

A rule set is an ordered table from patterns to values; for each parameter the first rule that matches wins. The
value may be a boolean (a mask), a rate, a multiplier, a schedule, or any text (a label for `optax.partition`).

A pattern is one of

- a text: a shell pattern, case-sensitive. `*`, `?` and `[...]` stay within a segment of the path, `**` spans any
  number of segments. Without "/" it is compared with each segment, at any depth (`"bias"`, `"LayerNorm_*"`); with
  "/" it is compared with the path from the root (`"encoder/**/kernel"`). Matching an inner node takes all below it;
- a compiled regular expression, which must match the whole path: `re.compile(r".*/kernel")`;
- a predicate, a function of a `Leaf` (path, shape, dtype): `lambda leaf: leaf.ndim >= 2`;
- a tuple of these, any of which may match.

The canonical path of a parameter is its keys joined by "/", the same in every library; `canonical_paths` lists them.

A rule that matches nothing, a rule that never decides because earlier ones take all it matches, and a parameter that
no rule covers are errors: a typo in a pattern stops the program before the first step.
"""

from .._leaves import Leaf as Leaf
from .._leaves import canonical_paths as canonical_paths
from ._modules import register_layer as register_layer
from ._rules import Rules as Rules
from ._scales import by_depth as by_depth
from ._scales import by_width as by_width
from ._standard import weights_only as weights_only
from ._tables import all_but as all_but
from ._tables import by_path as by_path
from ._tables import only as only
