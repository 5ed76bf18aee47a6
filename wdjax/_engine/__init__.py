"""The one loop over parameters that all places share, and what it stands on.

`loop`        a rate, a mask and an anchor for each parameter, and the rule of a place applied to it
`arithmetic`  the arithmetic of one parameter in safe dtypes
`rules`       what every rule set is: a decision for each parameter
`masks`       masks of every kind, brought to one answer for each parameter
`trees`       the leaves of a parameter tree, each with its canonical path
`mesh_axes`   what the other devices have of an array, within `shard_map`
`steps`       which updates are steps
`hazards`     rates that are known before the first step to do nothing, or too much
`checks`      what is refused, and in which words
`types`       the types of arguments
`unstable`    everything that is used of the unstable parts of JAX
"""
