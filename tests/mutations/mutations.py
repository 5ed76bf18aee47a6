"""Faults to put into wdjax, one at a time. Each is a plausible mistake, and some test must catch it."""

from typing import NamedTuple


class Mutation(NamedTuple):
    """One fault.

    Attributes:
        name: what goes wrong.
        file: the path of the file, below wdjax/.
        old, new: the code, which occurs once in the file, and its replacement.
        tests: the tests that should catch it, below tests/. The others run only if these do not.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = ("test_contract.py",)


CONTRACT, ARRAYS, LOOP = "test_contract.py", "test_arrays.py", "_engine/test_loop.py"
HAZARDS, BAD_INPUT, FRAMEWORKS = "_engine/test_hazards.py", "test_bad_input.py", "test_frameworks.py"
WRITERS, LORA, TELEMETRY = "low_precision/", "low_rank/", "telemetry/"
PATHS, SCALES, WEIGHTS = "paths/test_paths.py", "paths/test_scales.py", "paths/test_weights_only.py"
FREEZE, STEPS, AUDIT, PLANS = "wrappers/test_freeze.py", "test_steps.py", "audits/test_audit.py", "plans/"

MUTATIONS = [
    # Warnings of rates.
    Mutation(
        "the smallest rate of a schedule is warned of",
        "_engine/hazards.py",
        "at = int(np.argmax(fractions))",
        "at = int(np.argmin(fractions))",
        (HAZARDS,),
    ),
    Mutation(
        "every init calls a schedule anew",
        "_engine/hazards.py",
        "if id(schedule) not in probed:",
        "if True:",
        (HAZARDS,),
    ),
    # What params and anchors are.
    Mutation(
        "a training state is a tree of parameters",
        "_engine/trees.py",
        'is_whole = has("params") and (has("opt_state") or has("tx"))',
        "is_whole = False",
        (BAD_INPUT, FRAMEWORKS),
    ),
    Mutation(
        "batch statistics are parameters",
        "_engine/trees.py",
        '("BatchStat", "Cache",',
        '("Cache",',
        (FRAMEWORKS,),
    ),
    Mutation(
        "an optimizer's state is a tree of parameters",
        "_engine/trees.py",
        'type(node).__name__.endswith("State") and',
        "False and",
        (BAD_INPUT,),
    ),
    Mutation(
        "an error prints the numbers of arrays",
        "_engine/text.py",
        "(value.shape or not isinstance(value.dtype, np.dtype)):",
        "False:",
        (BAD_INPUT,),
    ),
    Mutation(
        "an anchor of 0.0 is only for one array",
        "_engine/loop.py",
        "if zeros.isdisjoint(prefixes(path))]",
        "if path not in zeros]",
        (LOOP,),
    ),
    Mutation(
        "integers are anchors",
        "_engine/loop.py",
        "if not trees.is_decayable(anchor) or",
        "if",
        (BAD_INPUT,),
    ),
    Mutation(
        "the order of keys is no difference",
        "_engine/trees.py",
        "    if keys != of_param:\n",
        "    if set(keys) != set(of_param):\n",
        (BAD_INPUT,),
    ),
    # The arithmetic of one parameter.
    Mutation(
        "the sign of a decay is flipped",
        "_engine/arithmetic.py",
        "return minus(update, rate, -pull)",
        "return minus(update, rate, pull)",
    ),
    Mutation(
        "a known rate is multiplied twice",
        "_engine/arithmetic.py",
        "return update - rate.value * pull\n",
        "return update - rate.value * rate.value * pull\n",
    ),
    Mutation(
        "a traced rate of 0 is not off",
        "_engine/arithmetic.py",
        "off = rate.value == 0\n",
        "off = rate.value < 0\n",
    ),
    Mutation(
        "an infinite pull at a rate of 0 is NaN",
        "_engine/arithmetic.py",
        "_select(off, _finite(pull), pull)",
        "_select(off, pull, pull)",
    ),
    Mutation(
        "no derivative at a rate of 0",
        "_engine/arithmetic.py",
        "_select(off, step - jax.lax.stop_gradient(step), step)",
        "_select(off, jnp.zeros_like(step), step)",
    ),
    Mutation(
        "a proximal step at a rate of 0 moves",
        "_engine/arithmetic.py",
        "return _select(rate.value == 0, off - (jax.lax.stop_gradient(finite) - finite), on)",
        "return on",
    ),
    Mutation(
        "the anchor is forgotten",
        "_engine/arithmetic.py",
        "return p if anchor is None else p - anchor",
        "return p",
    ),
    Mutation(
        "the anchor is added",
        "_engine/arithmetic.py",
        "return p if anchor is None else p - anchor",
        "return p if anchor is None else p + anchor",
    ),
    Mutation(
        "float64 is decayed in float32",
        "_engine/arithmetic.py",
        "return jnp.dtype(jnp.float64 if wide else jnp.float32)",
        "return jnp.dtype(jnp.float32)",
    ),
    Mutation(
        "bfloat16 is decayed in bfloat16",
        "_engine/arithmetic.py",
        "dtype = compute_dtype(update, param)\n",
        "dtype = jnp.result_type(update)\n",
    ),
    Mutation(
        "an update comes back in another dtype",
        "_engine/arithmetic.py",
        "return (new if rule.is_raw else narrowed(new, update)),",
        "return new,",
    ),
    Mutation(
        "a complex update loses its imaginary part",
        "_engine/arithmetic.py",
        "is_complex = jnp.iscomplexobj(update) or not jnp.iscomplexobj(new)",
        "is_complex = not jnp.iscomplexobj(new)",
    ),
    Mutation(
        "only the last factor of a rate counts",
        "_engine/arithmetic.py",
        "                number *= factor\n",
        "                number = factor\n",
    ),
    Mutation(
        "only the last array of a rate counts",
        "_engine/arithmetic.py",
        "value, is_known = value * jnp.asarray(array, number.dtype), False",
        "value, is_known = jnp.asarray(array, number.dtype), False",
    ),
    Mutation(
        "a stack has one norm",
        "_engine/arithmetic.py",
        "_on_layers(rule, apply, stack, ",
        "_on_layers(rule, apply, (), ",
        (LOOP, ARRAYS, SCALES),
    ),
    Mutation(
        "a stack has one norm in the loss",
        "_engine/arithmetic.py",
        "_on_layers(rule, reduce, stack, ",
        "_on_layers(rule, reduce, (), ",
        (ARRAYS, SCALES),
    ),
    # The loop over parameters.
    Mutation(
        "updates are not counted",
        "_engine/loop.py",
        "return updates, state._replace(count=optax.safe_increment(state.count), leaf=leaf)",
        "return updates, state._replace(leaf=leaf)",
    ),
    Mutation(
        "a leaf state is not kept",
        "_engine/loop.py",
        "                kept[path] = new\n",
        "                pass\n",
        (LOOP,),
    ),
    Mutation(
        "the mask is skipped",
        "_engine/loop.py",
        "if flag is False or not trees.is_decayable(leaf):",
        "if not trees.is_decayable(leaf):",
    ),
    Mutation(
        "an array as the mask is skipped",
        "_engine/loop.py",
        '                factors.append(("mask", flag))\n',
        "                pass\n",
        (ARRAYS,),
    ),
    Mutation(
        "schedules are called one step late",
        "_engine/loop.py",
        "value = schedule(jnp.asarray(state.count))",
        "value = schedule(jnp.asarray(state.count) + 1)",
    ),
    Mutation(
        "a shared schedule is evaluated for each parameter",
        "_engine/loop.py",
        "            if id(factor) not in evaluated:\n",
        "            if True:\n",
        ("test_cost.py", CONTRACT),
    ),
    Mutation(
        "the anchor at init shares the buffers of params",
        "_engine/loop.py",
        'jax.tree.map(lambda p: p.copy() if hasattr(p, "copy") else p, params)',
        "params",
    ),
    Mutation(
        "a rate of 0 is not permanently off",
        "_engine/loop.py",
        " and not (self.zero_is_off and any(map(_is_zero, term.factors)))\n",
        "\n",
    ),
    Mutation(
        "a radius of 0 is off",
        "_engine/loop.py",
        "            is_off = number == 0 and self.zero_is_off\n",
        "            is_off = number == 0\n",
        (LOOP,),
    ),
    Mutation(
        "gates are forgotten",
        "_engine/loop.py",
        "Term((number, *arrays, *gates), ",
        "Term((number, *arrays), ",
        (STEPS, "wrappers/"),
    ),
    Mutation(
        "a missing anchor is not noticed",
        "_engine/loop.py",
        "        if missing or extra:\n",
        "        if extra:\n",
        ("test_bad_input.py",),
    ),
    Mutation(
        "no warning of a rate that rounds to nothing",
        "_engine/loop.py",
        "        if self.is_per_step:\n",
        "        if False:\n",
        ("_engine/test_hazards.py",),
    ),
    Mutation(
        "no warning of a rate that overshoots",
        "_engine/hazards.py",
        "        elif fraction >= 1 and can_overshoot:\n",
        "        elif fraction > 2 and can_overshoot:\n",
        ("_engine/test_hazards.py",),
    ),
    # Trees, masks, meshes, checks.
    Mutation(
        "integers are decayed",
        "_engine/trees.py",
        "dtype in (float, complex) if is_python else jnp.issubdtype(dtype, jnp.inexact)",
        "dtype in (float, complex) if is_python else jnp.issubdtype(dtype, jnp.number)",
    ),
    Mutation(
        "a sequence loses its index in the path",
        "_engine/trees.py",
        "            return str(key.idx)\n",
        '            return "0"\n',
        (PATHS,),
    ),
    Mutation(
        "two parameters with one path are not noticed",
        "_engine/trees.py",
        "    if len(set(paths)) < len(paths):\n",
        "    if False:\n",
        (PATHS,),
    ),
    Mutation(
        "an array of the wrong shape is accepted",
        "_engine/trees.py",
        "    if len(sizes) > len(shape) or any(size not in (1, of_param) for size, of_param in pairs):\n",
        "    if False:\n",
        (ARRAYS, "test_bad_input.py"),
    ),
    Mutation(
        "a stray entry of a mask is not noticed",
        "_engine/masks.py",
        "    if extra:\n",
        "    if False:\n",
        ("test_bad_input.py",),
    ),
    Mutation(
        "an array that is whole on all devices counts once per device",
        "_engine/mesh_axes.py",
        "        if name in varying_axes(x) or name not in varying_axes(index):\n",
        "        if True:\n",
        ("test_shard_map.py", LOOP),
    ),
    Mutation(
        "a negative rate is accepted",
        "_engine/checks.py",
        "~(np.isfinite(numbers) & (numbers >= 0))",
        "~np.isfinite(numbers)",
        ("test_bad_input.py",),
    ),
    Mutation(
        "a NaN rate is accepted",
        "_engine/checks.py",
        "~(np.isfinite(numbers) & (numbers >= 0))",
        "numbers < 0",
        ("test_bad_input.py",),
    ),
    Mutation(
        "an unknown argument is ignored",
        "_engine/checks.py",
        "            if name not in signature.parameters:\n",
        "            if False:\n",
        ("test_bad_input.py",),
    ),
    Mutation(
        "a skipped step counts as a step",
        "_engine/steps.py",
        "new.gradient_step > old.gradient_step if",
        "new.gradient_step >= old.gradient_step if",
        (STEPS,),
    ),
    # The places and the penalties.
    Mutation(
        "the half of L2 is lost",
        "penalties.py",
        "return 0.5 * jnp.sum(_square(w))",
        "return jnp.sum(_square(w))",
        ("test_penalties.py", "test_algebra.py"),
    ),
    Mutation(
        "the proximal map of L2 is its first-order approximation",
        "penalties.py",
        "        return w / (1 + step)\n\n\n@dataclasses.dataclass(frozen=True)\nclass L1",
        "        return w * (1 - step)\n\n\n@dataclasses.dataclass(frozen=True)\nclass L1",
        ("test_penalties.py", CONTRACT),
    ),
    Mutation(
        "the proximal map of L1 makes no zeros",
        "penalties.py",
        "jnp.sign(w) * jnp.maximum(jnp.abs(w) - step, 0)",
        "jnp.sign(w) * jnp.abs(jnp.abs(w) - step)",
        ("test_penalties.py", CONTRACT),
    ),
    Mutation(
        "a zero group has a NaN gradient",
        "penalties.py",
        "return jnp.where(norm == 0, 0, w / jnp.where(norm == 0, 1, norm))",
        "return w / norm",
        ("test_penalties.py",),
    ),
    Mutation(
        "a derived gradient is halved",
        "penalties.py",
        'jax.grad(lambda w: _like(kind, "value", kind.value(w), ()))(w)',
        'jax.grad(lambda w: 0.5 * _like(kind, "value", kind.value(w), ()))(w)',
        ("test_penalties.py", "test_docs.py"),
    ),
    Mutation(
        "a strength may differ within a group",
        "penalties.py",
        "    if not parts or is_elementwise(kind):\n",
        "    if True:\n",
        (ARRAYS,),
    ),
    Mutation(
        "continuous decay is its first-order approximation",
        "in_update.py",
        "rate._replace(value=-jnp.expm1(-rate.value))",
        "rate",
    ),
    Mutation(
        "cautious decay drops ties",
        "in_update.py",
        "jax.lax.select(jnp.real(agreement) >= 0, term, blank)",
        "jax.lax.select(jnp.real(agreement) > 0, term, blank)",
    ),
    Mutation(
        "cautious decay acts where it disagrees",
        "in_update.py",
        "jax.lax.select(jnp.real(agreement) >= 0, term, blank)",
        "jax.lax.select(jnp.real(agreement) <= 0, term, blank)",
    ),
    Mutation(
        "a proximal step forgets the update",
        "on_weights.py",
        "new = prox(self.kind, away(p + update, a), rate.value)",
        "new = prox(self.kind, away(p, a), rate.value)",
    ),
    # Recipes and wrappers.
    Mutation(
        "AdamW decays before Adam",
        "recipes.py",
        "        optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov),\n"
        "        decoupled_decay(weight_decay, mask, toward=toward),\n",
        "        decoupled_decay(weight_decay, mask, toward=toward),\n"
        "        optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov),\n",
        ("test_recipes.py",),
    ),
    Mutation(
        "SGD forgets Nesterov",
        "recipes.py",
        "        add_l2_to_grads(weight_decay, mask, toward=toward),\n"
        "        optax.identity() if momentum is None else optax.trace(momentum, nesterov),\n",
        "        add_l2_to_grads(weight_decay, mask, toward=toward),\n"
        "        optax.identity() if momentum is None else optax.trace(momentum),\n",
        ("test_recipes.py",),
    ),
    Mutation(
        "the count increases in a skipped step",
        "wrappers.py",
        "next_count = jnp.where(jnp.all(jnp.array(real, bool)), optax.safe_increment(count), count)",
        "next_count = optax.safe_increment(count)",
        (STEPS, "wrappers/"),
    ),
    Mutation(
        "schedule-free decays only the average",
        "wrappers.py",
        "        if shares:\n            after",
        "        if False:\n            after",
        ("wrappers/", STEPS),
    ),
    Mutation(
        "a frozen weight of -0.0 becomes 0.0",
        "wrappers.py",
        "    zeros = -jnp.zeros_like(update)\n",
        "    zeros = jnp.zeros_like(update)\n",
        (FREEZE, ARRAYS),
    ),
    Mutation(
        "the optimizer sees the gradient of a frozen row",
        "wrappers.py",
        "_where(flag, jnp.zeros_like(x), x)",
        "x",
        (ARRAYS,),
    ),
    # Low precision, LoRA, the monitor.
    Mutation(
        "stochastic rounding always rounds down",
        "low_precision/rounding.py",
        "jnp.floor((steps - whole) + lost * inverse + fraction)",
        "jnp.floor((steps - whole) + lost * inverse)",
        (WRITERS,),
    ),
    Mutation(
        "every array gets the same random numbers",
        "low_precision/writers.py",
        "jax.random.fold_in(key, i) if is_low(leaf)",
        "jax.random.fold_in(key, 0) if is_low(leaf)",
        (WRITERS,),
    ),
    Mutation(
        "the same random numbers in each step",
        "low_precision/writers.py",
        'jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), state.count)',
        'jax.random.key(seed, impl="threefry2x32")',
        (WRITERS,),
    ),
    Mutation(
        "compensation forgets the residual",
        "low_precision/writers.py",
        "step = jnp.asarray(update, jnp.float32) + residual.astype(jnp.float32)",
        "step = jnp.asarray(update, jnp.float32) + 0 * residual.astype(jnp.float32)",
        (WRITERS,),
    ),
    Mutation(
        "the float32 copy does not move",
        "low_precision/writers.py",
        "    weights = weights + jnp.asarray(update, jnp.float32)\n    return step_to(p, rounded(weights, p.dtype), "
        "weights - p.astype(jnp.float32)), weights\n",
        "    new = weights + jnp.asarray(update, jnp.float32)\n    return step_to(p, rounded(new, p.dtype), "
        "new - p.astype(jnp.float32)), weights\n",
        (WRITERS,),
    ),
    Mutation(
        "the product of LoRA factors is scaled only once",
        "low_rank/__init__.py",
        "pull = of_w0.reshape(p.shape) + scale * of_product.reshape(p.shape)",
        "pull = of_w0.reshape(p.shape) + of_product.reshape(p.shape)",
        (LORA,),
    ),
    Mutation(
        "W0 is left out of the pull",
        "low_rank/__init__.py",
        "pull = of_w0.reshape(p.shape) + scale * of_product.reshape(p.shape)",
        "pull = 0 * of_w0.reshape(p.shape) + scale * of_product.reshape(p.shape)",
        (LORA,),
    ),
    Mutation(
        "shrinkage has the wrong sign",
        "telemetry/_sums.py",
        '"shrinkage": _ratio(-s.along, s.weight),',
        '"shrinkage": _ratio(s.along, s.weight),',
        (TELEMETRY,),
    ),
    Mutation(
        "the monitor measures skipped steps",
        "telemetry/__init__.py",
        "lambda new, old: jnp.where(is_step, new, old), measured, state.measured)",
        "lambda new, old: new, measured, state.measured)",
        (TELEMETRY,),
    ),
    # Which parameters.
    Mutation(
        "the last rule wins",
        "paths/_tables.py",
        "            left = [i for i in asked if i not in deciders]\n",
        "            left = list(asked)\n",
        (PATHS,),
    ),
    Mutation(
        "a pattern that matches nothing is not an error",
        "paths/language.py",
        "    if not found and (isinstance(pattern, Text) or all(tree.leaves[i].dtype is not None for i in asked)):\n",
        "    if False:\n",
        (PATHS,),
    ),
    Mutation(
        "a star crosses a segment",
        "paths/language.py",
        'def compiled(pattern: str, star: str = "[^/]*")',
        'def compiled(pattern: str, star: str = ".*")',
        (PATHS,),
    ),
    Mutation(
        "all_but acts like only",
        "paths/_tables.py",
        'return Table((Row(language.checked_patterns("all_but", patterns, syntax), False),), default=True)',
        'return Table((Row(language.checked_patterns("all_but", patterns, syntax), True),), default=False)',
        (PATHS,),
    ),
    Mutation(
        "layer-wise decay is one block off",
        "paths/_scales.py",
        "values, reason = tuple(self.factor ** (count - k) for k in range(count))",
        "values, reason = tuple(self.factor ** (count - k - 1) for k in range(count))",
        (SCALES, LOOP),
    ),
    Mutation(
        "width scales the other way",
        "paths/_scales.py",
        "Decision((width / self.base) ** self.power,",
        "Decision((self.base / width) ** self.power,",
        (SCALES,),
    ),
    Mutation(
        "a norm's scale counts as a weight",
        "paths/standard.py",
        "decays = found.name in (KERNEL, ADAPTER) or (found.name == EMBEDDING and self.embeddings)",
        "decays = found.name in (KERNEL, ADAPTER, NORM) or (found.name == EMBEDDING and self.embeddings)",
        (WEIGHTS,),
    ),
    # Plans, audits and sweeps.
    Mutation(
        "a plan forgets frozen parameters",
        "plans/__init__.py",
        "    elif kept.value is True:\n",
        "    elif False:\n",
        (PLANS, FREEZE),
    ),
    Mutation(
        "an audit measures half the rate",
        "audits/_measures.py",
        "return float(np.median(-np.real(moved[moves] / weights[moves])))",
        "return 0.5 * float(np.median(-np.real(moved[moves] / weights[moves])))",
        (AUDIT,),
    ),
    Mutation(
        "an audit misses L2 in the gradient",
        "audits/_measures.py",
        '        place = "gradient"\n    elif not _same(',
        '        place = "update"\n    elif not _same(',
        (AUDIT,),
    ),
    Mutation(
        "a sweep gives every run the first seed",
        "sweeps/__init__.py",
        "        return _checked_result(train(jax.random.key(seed), **values))\n",
        "        return _checked_result(train(jax.random.key(0 * seed), **values))\n",
        ("sweeps/",),
    ),
    Mutation(
        "the best setting is the worst",
        "sweeps/_found.py",
        "row = finite[losses[finite].mean(axis=1).argmin()]",
        "row = finite[losses[finite].mean(axis=1).argmax()]",
        ("sweeps/",),
    ),
]
