"""The leaves of a parameter tree, each with its canonical path.

A parameter has one name, its *canonical path*: the keys that lead to it, joined by "/". Libraries put more than
parameters into a tree: an NNX `Variable` or a Linen `Partitioned` box around an array, `None` where an Equinox filter
removed a leaf, `optax.MaskedNode` where `optax.masked` did. Boxes do not appear in the path, so that a parameter has
the same path in `init` (which sees NNX Variables) and in `update` (which sees bare arrays). `None` and `MaskedNode` are
*holes*: rules may name these places, but they hold nothing to decay.

`leaves`      one leaf, or a hole
`flattening`  every leaf with its canonical path
`inputs`      errors for what is not a tree of parameters
`companions`  trees beside the parameters, such as updates and states
"""

from .companions import beside as beside
from .companions import of_each as of_each
from .flattening import canonical_paths as canonical_paths
from .flattening import classes as classes
from .flattening import cuts as cuts
from .flattening import flatten_with_paths as flatten_with_paths
from .flattening import is_array as is_array
from .flattening import is_module as is_module
from .flattening import key_text as key_text
from .flattening import prefixes as prefixes
from .flattening import structure as structure
from .inputs import check_broadcasts as check_broadcasts
from .inputs import parameters as parameters
from .inputs import warn_of_aliases as warn_of_aliases
from .leaves import Hidden as Hidden
from .leaves import Leaf as Leaf
from .leaves import describe as describe
from .leaves import hidden_where as hidden_where
from .leaves import is_decayable as is_decayable
from .leaves import is_hole as is_hole
from .leaves import shapes_taken_for as shapes_taken_for
