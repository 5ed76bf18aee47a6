"""The loop over parameters that all places share, and the modules it uses.

`loop`        finds the rate, mask and anchor of each parameter and applies the rule of a place to it
`per_leaf`    the rate, the mask and the stacked layers of each parameter
`anchors`     the anchor of each parameter, and what the state keeps of it
`arithmetic`  computes the rule for one parameter in safe dtypes
`rules`       the base class of rule sets: a decision for each parameter
`decision`    the decision of a rule set on one parameter
`rates`       a rate as a user gives it
`masks`       turns any kind of mask into one answer for each parameter
`trees`       the leaves of a parameter tree, each with its canonical path
`draws`       random keys for each parameter
`groups`      the base class of kinds that act on groups of weights
`matrices`    the base class of kinds that act on whole matrices, and functions of singular values
`radii`       the radius that a rule takes: a number, or the norm at `init`
`norms`       norms that neither overflow nor underflow, also over devices
`mesh_axes`   sums over devices within `shard_map`
`probe`       how `monitor` reads a decay
`steps`       tells real steps from skipped ones
`hazards`     warns at `init` of rates that are too small or too large to work
`devices`     words errors about arrays on different devices
`checks`      validates arguments and words the errors
`types`       the types of arguments
`text`        shows values and calls in errors, and repeated blocks as one path
`unstable`    every use of JAX's unstable API
"""
