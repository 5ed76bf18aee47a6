"""Functions of a whole optimizer state.

`thawing`      `thaw`: the state with which training continues when other parameters are frozen
`hyperparams`  `stale_hyperparams`: rates in a state that differ from those in the code
`shardings`    `state_shardings`: where each array of a state belongs on a mesh

A state holds trees like params, such as moments and anchors, between counts and other numbers. Here its leaves are
known by their canonical paths: "0/mu/head/kernel" ends with the path of the parameter "head/kernel". So a state may be
of any optimizer, and it may have been restored as dictionaries and lists.
"""

from .hyperparams import stale_hyperparams as stale_hyperparams
from .shardings import state_shardings as state_shardings
from .thawing import thaw as thaw
