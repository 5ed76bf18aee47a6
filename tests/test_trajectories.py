"""Other libraries' own optimizers, step by step: what wdjax can say, it says to the last rounding.

`data/trajectories/ID.npz` holds the parameters before the first step and after each of 200 steps, as the library and
the version named in `ID.json` made them: in float64 (`f64/KEY`: every step up to the 40th, then every second one) and
in float32 (`f32/KEY`: every 20th), and the learning rates (`lr`). Problem `grads` feeds in stored gradients, whatever
the parameters are; problem `mlp` takes them of a small network's loss.
"""

import ast
import dataclasses
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wdjax
from wdjax import on_weights, rates

pytestmark = pytest.mark.peers  # Optax's bias correction.

FOLDER = Path(__file__).parent / "data" / "trajectories"
STEPS = 200
KEPT64 = np.r_[0:40, 40 : STEPS + 1 : 2]
KEPT32 = np.r_[0 : STEPS + 1 : 20]

# Of 1 + |w|. The worst of all rows is 1e-14: nobody's rounding differs by more once his hyper-parameters are his.
TOLERANCE = 1e-12
# Its multipliers and bounds are float32, also those of float64 parameters.
TOLERANCE_OF_CPR = 2e-7


@functools.cache
def load(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


@functools.cache
def facts(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


@dataclasses.dataclass(frozen=True)
class Run:
    """A recording, as the rows of the table read it to build an optimizer.

    Attributes:
        name: the recording.
        dtype: to run in.
        on: 1.0, or 0.0 to take the decay out.
    """

    name: str
    dtype: Any
    on: float

    @property
    def options(self) -> dict[str, Any]:
        return facts(self.name)["kwargs"]

    @property
    def groups(self) -> list[tuple[tuple[str, ...], dict[str, Any]]]:
        return [(tuple(names), options) for names, options in facts(self.name)["groups"]]

    @property
    def lr(self) -> Any:
        """The learning rate: a number if it stays what it is, else a schedule."""
        return self.group_lr(0)

    def group_lr(self, group: int) -> Any:
        lrs = load(self.name)["lr"].reshape(STEPS, -1)[:, group]
        return float(lrs[0]) if facts(self.name)["schedule"] == "const" else self.schedule(lrs)

    def schedule(self, values: np.ndarray) -> Callable[[Any], jax.Array]:
        return lambda count: jnp.asarray(values, self.dtype)[count]

    @property
    def wd(self) -> float:
        name = "wd" if "wd" in self.options else "weight_decay"
        return self.on * self.options[name]

    @property
    def group_wd(self) -> wdjax.Rules:
        return self.on * wdjax.by_path({names: options["weight_decay"] for names, options in self.groups})

    @property
    def regularizer(self) -> dict[str, float]:
        return ast.literal_eval(facts(self.name)["kernel_regularizer"])


Build = Callable[[Run], Any]


def float32(value: float) -> float:
    """What becomes of a number where hyper-parameters are held in float32, whatever the parameters are."""
    return float(np.float32(value))


# PyTorch and timm.


def torch_sgd(run: Run) -> Any:
    momentum, nesterov = run.options.get("momentum"), run.options.get("nesterov", False)
    return wdjax.sgd_l2(run.lr, run.wd, momentum=momentum, nesterov=nesterov)


def torch_sgd_groups(run: Run) -> Any:
    # One table has all the decays, and one the learning rates: a schedule for each group, without a common factor.
    lrs = wdjax.by_path({names: run.group_lr(i) for i, (names, _) in enumerate(run.groups)})
    return optax.chain(
        wdjax.add_l2_to_grads(run.group_wd),
        optax.trace(run.options["momentum"]),
        wdjax.scale_by_path(lrs),
        optax.scale(-1.0),
    )


def torch_adam(run: Run) -> Any:
    return wdjax.adam_l2(run.lr, run.wd, eps=run.options.get("eps", 1e-8))


def torch_adam_groups(run: Run) -> Any:
    return wdjax.adam_l2(run.lr, run.group_wd)


def torch_adamw(run: Run) -> Any:
    return wdjax.adamw(run.lr, run.wd, eps=run.options.get("eps", 1e-8))


def torch_adamw_groups(run: Run) -> Any:
    (_, decaying), (bare, _) = run.groups
    return wdjax.adamw(run.lr, run.on * decaying["weight_decay"], wdjax.all_but(*bare))


def timm_adamw_clip(run: Run) -> Any:
    return optax.chain(
        adam_clipped_by_gradient_rms(run.options["clipping_threshold"]),
        wdjax.decoupled_decay(run.wd),  # After the clipping, which does not see it.
        optax.scale_by_learning_rate(run.lr),
    )


def adam_clipped_by_gradient_rms(threshold: float, b2: float = 0.999, eps: float = 1e-8) -> Any:
    """Adam whose direction is divided by rms(g / sqrt(v)) / threshold where that is more than 1."""
    adam = optax.scale_by_adam(b2=b2, eps=eps)

    def update_fn(grads: Any, state: Any, params: Any = None) -> Any:
        updates, state = adam.update(grads, state, params)
        correction = 1 - b2**state.count

        def clip(u: jax.Array, g: jax.Array, v: jax.Array) -> jax.Array:
            rms = jnp.sqrt(jnp.mean((g / (jnp.sqrt(v / correction) + eps)) ** 2))
            return u / jnp.maximum(1.0, rms / threshold)

        return jax.tree.map(clip, updates, grads, state.nu), state

    return optax.GradientTransformation(adam.init, update_fn)


def timm_sgdw(run: Run) -> Any:
    momentum, nesterov = run.options.get("momentum"), run.options.get("nesterov", False)
    return wdjax.sgdw(run.lr, run.wd, momentum=momentum, nesterov=nesterov)


def timm_sgdw_corrected(run: Run) -> Any:
    weight_decay = rates.relative(run.wd, run.lr, peak=run.options["lr"])
    return wdjax.sgdw(run.lr, weight_decay, momentum=run.options["momentum"])


def timm_adamw_corrected(run: Run) -> Any:
    decay = wdjax.independent_decay(rates.corrected(run.wd, run.lr, peak=run.options["lr"]))
    return optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(run.lr), decay)


def timm_adopt(run: Run) -> Any:
    return optax.chain(
        optax.contrib.scale_by_adopt(b1=0.9, b2=0.9999, eps=1e-6, clip_value_fn=lambda x: x**0.333),
        # The first step only initializes the second moment, and does not decay.
        wdjax.decoupled_decay(lambda count: jnp.where(count == 0, 0.0, run.wd)),
        optax.scale_by_learning_rate(run.lr),
    )


def timm_lamb(run: Run) -> Any:
    (adapted, _), (bare, _) = run.groups
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(eps=1e-6),
        wdjax.decoupled_decay(run.group_wd),
        # What does not decay skips the trust ratio too.
        optax.masked(optax.scale_by_trust_ratio(), wdjax.by_path({adapted: True, bare: False}).mask),
        optax.scale_by_learning_rate(run.lr),
    )


# MXNet, whose kernels hold hyper-parameters in float32.


def mxnet_sgd(run: Run) -> Any:
    return wdjax.sgd_l2(float32(run.lr), float32(run.wd))


def mxnet_sgd_names(run: Run) -> Any:
    # wd_mult is 1 for names that end in _weight or _gamma, and 0 for all others.
    names = facts(run.name)["names"]
    multipliers = wdjax.by_path({key: float(name.endswith(("_weight", "_gamma"))) for key, name in names.items()})
    return wdjax.sgd_l2(float32(run.lr), float32(run.wd) * multipliers)


def mxnet_sgd_clip(run: Run) -> Any:
    return optax.chain(optax.clip(run.options["clip_gradient"]), mxnet_sgd(run))


# Keras. Its learning rate is inside the velocity of SGD; its Adam adds eps before the bias correction.


def keras_adam(eps: float, b1: float = 0.9, b2: float = 0.999, eps_root: float = 0.0) -> Any:
    """Adam with sqrt(v + eps_root) + eps, then the bias correction: Optax's with both divided by what it corrects."""
    return optax.inject_hyperparams(optax.scale_by_adam)(
        b1=b1,
        b2=b2,
        eps=lambda count: eps / jnp.sqrt(1 - b2 ** (count + 1.0)),
        eps_root=lambda count: eps_root / (1 - b2 ** (count + 1.0)),
    )


def keras_l2_sgd(run: Run) -> Any:
    l2 = 2 * run.regularizer["l2"]  # Keras' l2(r) is r times the sum of squares, without the half.
    return optax.chain(
        wdjax.add_l2_to_grads(run.on * l2, wdjax.only("w*")),
        optax.scale_by_learning_rate(run.lr),
        optax.trace(run.options["momentum"]),
    )


def keras_l2_adam(run: Run) -> Any:
    l2 = 2 * run.regularizer["l2"]
    return optax.chain(
        wdjax.add_l2_to_grads(run.on * l2, wdjax.only("w*")), keras_adam(1e-7), optax.scale_by_learning_rate(run.lr)
    )


def keras_l1_sgd(run: Run) -> Any:
    return optax.chain(
        wdjax.add_penalty_to_grads(wdjax.L1(), run.on * run.regularizer["l1"], wdjax.only("w*")), optax.sgd(run.lr)
    )


def keras_sgd(run: Run) -> Any:
    velocity = optax.chain(optax.scale_by_learning_rate(run.lr), optax.trace(run.options["momentum"]))
    return keras_decay(velocity, run)


def keras_adamw(run: Run) -> Any:
    return keras_decay(optax.chain(keras_adam(1e-7), optax.scale_by_learning_rate(run.lr)), run)


def keras_decay(optimizer: Any, run: Run) -> Any:
    decayed = wdjax.only(*facts(run.name)["decayed"])
    return wdjax.with_decoupled_decay(optimizer, run.wd, decayed, learning_rate=run.lr)


# TensorFlow Addons, which holds hyper-parameters, the betas too, in float32.


def tfa_sgdw(momentum: float | None) -> Build:
    def build(run: Run) -> Any:
        return optax.chain(
            optax.scale_by_learning_rate(float32(0.05)),
            optax.identity() if momentum is None else optax.trace(float32(momentum), nesterov=True),
            wdjax.independent_decay(run.on * float32(0.002)),
        )

    return build


def tfa_adamw(mask: wdjax.Rules | None = None) -> Build:
    def build(run: Run) -> Any:
        # The base rate is held in float32; its cosine is taken in float64.
        relative = run.schedule(load(run.name)["lr"] / 0.02)
        return optax.chain(
            keras_adam(float32(1e-7), float32(0.9), float32(0.999)),
            optax.scale_by_learning_rate(lambda count: float32(0.02) * relative(count)),
            wdjax.independent_decay(run.on * float32(0.002), mask),
        )

    return build


# big_vision, whose schedule is relative (its peak is 1) and multiplies a decay that no learning rate multiplies.


def big_vision(run: Run, direction: Any, multipliers: wdjax.Rules) -> Any:
    peak = run.options["lr"]
    values = (load(run.name)["lr"] / peak).astype(np.float32)
    # The warmup is a product with the float32 next to 1 / 20, and no division.
    values[:20] = np.arange(20, dtype=np.float32) * np.float32(1 / 20)
    relative = run.schedule(values)
    return optax.chain(
        direction,
        optax.scale_by_learning_rate(lambda count: peak * relative(count)),
        wdjax.independent_decay((lambda count: run.wd * relative(count)) * multipliers),
    )


def big_vision_sgd(run: Run) -> Any:
    multipliers = wdjax.by_path(run.options["wd_mults"], default=0.0)
    return big_vision(run, optax.trace(run.options["optax"]["decay"]), multipliers)


def big_vision_adam(run: Run) -> Any:
    # w1 has half the learning rate and the whole decay; b1 has no schedule, and so neither a step nor a decay.
    halves = wdjax.by_path([("b1", 0.0), *((re.compile(name), value) for name, value in run.options["lr_mults"])])
    direction = optax.chain(optax.scale_by_adam(), wdjax.scale_by_path(halves))
    return big_vision(run, direction, wdjax.by_path({"b1": 0.0}, default=1.0))


# pytorch-optimizer (kozistr): any optimizer, with the learning rate in the decay or, `fixed_decay`, without.


def decoupled(optimizer: Callable[[Any], Any]) -> Build:
    """wdjax's decay around a finished optimizer of Optax."""
    return lambda run: wdjax.with_decoupled_decay(optimizer(run.lr), run.wd, learning_rate=run.lr)


def fixed(direction: Callable[[], Any]) -> Build:
    return lambda run: optax.chain(direction(), optax.scale_by_learning_rate(run.lr), wdjax.independent_decay(run.wd))


def kozistr_adamp(run: Run) -> Any:
    """AdamP: where gradient and weights are almost perpendicular, the update is tangential and the decay smaller."""
    adam, matrices = keras_adam(1e-8), wdjax.only("w*")
    delta, wd_ratio, eps = 0.1, 0.1, 1e-8  # The defaults. The norm of the weights, too, has the eps added.
    # It tries rows as groups, then whole matrices.
    views = [(wdjax.in_update.tangential_update(matrices, per=0), (1,))]
    views += [(wdjax.in_update.tangential_update(matrices), (0, 1))]

    def update_fn(grads: Any, state: Any, params: Any) -> Any:
        updates, state = adam.update(grads, state, params)
        ratios = dict.fromkeys(("w1", "w2"), jnp.ones([], run.dtype))
        for tangential, axes in views:
            projected, _ = tangential.update(updates, tangential.init(params), params)
            for key, ratio in ratios.items():
                g, p, u = grads[key], params[key], updates[key]
                size, of_grad = (jnp.sqrt(jnp.sum(x**2, axes, keepdims=True)) for x in (p, g))
                cosines = jnp.abs(jnp.sum(g * p, axes, keepdims=True)) / (size * of_grad)
                limit = delta / np.sqrt(np.prod([p.shape[axis] for axis in axes]))
                does = (jnp.max(cosines) < limit) & (ratio == 1)
                radial = (u - projected[key]) * (size / (size + eps)) ** 2
                updates = {**updates, key: jnp.where(does, u - radial, u)}
                ratios[key] = jnp.where(does, wd_ratio, ratio).astype(run.dtype)
        decay = wdjax.decoupled_decay(run.wd * wdjax.by_path(ratios, default=1.0))
        return decay.update(updates, decay.init(params), params)[0], state

    return optax.chain(optax.GradientTransformation(adam.init, update_fn), optax.scale_by_learning_rate(run.lr))


# heavyball, whose cautious weight decay is the paper's, except for ties.


def heavyball_sgd(run: Run) -> Any:
    # It compares bits of signs. w1[0, 0] is below zero and its gradient +0: a tie, in which the paper's rule decays.
    mask = {"w1": np.arange(12).reshape(4, 3) > 0, "b1": True, "s": True, "w2": True, "b2": True}
    return optax.chain(
        optax.trace(run.options["beta"]),
        wdjax.cautious(wdjax.decoupled_decay(run.wd, mask)),
        optax.scale_by_learning_rate(run.lr),
    )


# The code of stable weight decay: SGDS.


def swd_sgds(run: Run) -> Any:
    momentum = run.options["momentum"]
    return wdjax.sgdw(run.lr, run.on * rates.from_l2(run.options["weight_decay"], momentum), momentum=momentum)


# The authors of constrained parameter regularization.

CPR_KINDS = {"l2": (wdjax.L2(), 0.5), "huber": (wdjax.Huber(1.0), 1.0), "l1": (wdjax.L1(), 1.0)}


def authors_cpr(run: Run) -> Any:
    """Adam, then the penalty and its gradient where Adam puts the weights. The code has no 1/2 in L2."""
    kind, half = CPR_KINDS[run.options["reg_function"]]
    given, rate = run.options["kappa_init_param"], run.options.get("kappa_update", 1.0) / half**2
    start = load("inputs")
    bounds: dict[str, Callable[[str], Any]] = {
        "uniform": lambda key: half * given,
        "dependent": lambda key: given * float32(kind.value(start[f"init/{key}"])),  # Before Adam's first step.
        "warm_start": lambda key: on_weights.WarmStart(given - 1),  # After its step, not before the next one.
    }
    bound = bounds[run.options["kappa_init_method"]]
    each = [after_the_step(on_weights.cpr(kind, bound(key), wdjax.only(key), update_rate=rate)) for key in ("w1", "w2")]
    return optax.chain(optax.adam(run.lr), *(each if run.on else ()))


def after_the_step(optimizer: Any) -> Any:
    """A transformation of the weights that the updates before it lead to."""

    def update(updates: Any, state: Any, params: Any) -> Any:
        landed = optax.apply_updates(params, updates)
        more, state = optimizer.update(jax.tree.map(jnp.zeros_like, updates), state, landed)
        return jax.tree.map(jnp.add, updates, more), state

    return optax.GradientTransformation(optimizer.init, update)


ROWS: dict[str, Build] = {
    # add_l2_to_grads
    "torch_sgd_m0": torch_sgd,
    "torch_sgd_m9": torch_sgd,
    "torch_sgd_m9_cosine": torch_sgd,
    "torch_sgd_nesterov": torch_sgd,
    "torch_sgd_m9_multigroup": torch_sgd_groups,
    "torch_adam_coupled": torch_adam,
    "torch_adam_coupled_eps1e-2": torch_adam,
    "torch_adam_coupled_biasexcl": torch_adam_groups,
    "mx_sgd_m0": mxnet_sgd,
    "mx_sgd_clip": mxnet_sgd_clip,
    "mx_sgd_names_default": mxnet_sgd_names,
    "keras_reg_l2_sgdm": keras_l2_sgd,
    "keras_reg_l2_adam": keras_l2_adam,
    # add_penalty_to_grads
    "keras_reg_l1_sgd": keras_l1_sgd,
    # decoupled_decay
    "torch_adamw": torch_adamw,
    "torch_adamw_eps1e-2": torch_adamw,
    "torch_adamw_warmcos": torch_adamw,
    "torch_adamw_biasexcl": torch_adamw_groups,
    "torch_adamw_mlp": torch_adamw_groups,
    "timm_adamw": torch_adamw,
    "timm_adamw_clip": timm_adamw_clip,
    "timm_adamw_corrected_warmcos": timm_adamw_corrected,
    "timm_sgdw_m0": timm_sgdw,
    "timm_sgdw_nesterov": timm_sgdw,
    "timm_sgdw_corrected_cosine": timm_sgdw_corrected,
    "timm_adopt_decoupled": timm_adopt,
    "timm_lamb_biasexcl": timm_lamb,
    "swd_sgds": swd_sgds,
    # with_decoupled_decay
    "keras_sgd_m9": keras_sgd,
    "keras_adamw_cosine": keras_adamw,
    "keras_adamw_exclude": keras_adamw,
    "koz_lion_dec": decoupled(lambda lr: optax.lion(lr, b1=0.9, b2=0.99, weight_decay=0.0)),
    "koz_adamax_dec": decoupled(optax.adamax),
    "koz_yogi_dec": decoupled(optax.yogi),
    # tangential_update
    "koz_adamp": kozistr_adamp,
    # cautious
    "hb_sgd_cautious": heavyball_sgd,
    # independent_decay
    "koz_adabelief_fixed": fixed(lambda: optax.scale_by_belief(eps=1e-16, eps_root=1e-16)),
    "koz_adamc_fixed": fixed(lambda: keras_adam(1e-8, eps_root=1e-15)),
    "koz_adopt_fixed": fixed(
        lambda: optax.contrib.scale_by_adopt(b1=0.9, b2=0.9999, eps=1e-6, clip_value_fn=lambda x: (x + 1) ** 0.25)
    ),
    "koz_tiger_fixed": fixed(lambda: optax.chain(optax.ema(0.965, debias=False), optax.scale_by_sign())),
    "tfa_sgdw_m0": tfa_sgdw(None),
    "tfa_sgdw_nesterov": tfa_sgdw(0.9),
    "tfa_adamw": tfa_adamw(),
    "tfa_adamw_cosine_lronly": tfa_adamw(),
    "tfa_adamw_exclude": tfa_adamw(wdjax.all_but("b*", "s*")),  # Its regular expressions "b" and "^s".
    "bv_sgd_momentum_wdmults": big_vision_sgd,
    "bv_adam_lrmults_frozen": big_vision_adam,
    # on_weights.cpr
    "cpr_l2_uniform": authors_cpr,
    "cpr_l2_dependent_cosine": authors_cpr,
    "cpr_l1_uniform": authors_cpr,
    "cpr_huber_dependent": authors_cpr,
    "cpr_huber_warmstart50": authors_cpr,
}

every_recording = pytest.mark.parametrize("name", ROWS)


def follow(run: Run) -> dict[str, np.ndarray]:
    """The parameters before the first step and after each, by the optimizer that stands in the table."""
    inputs, keys = load("inputs"), facts(run.name)["keys"]
    start = {key: jnp.asarray(inputs[f"init/{key}"], run.dtype) for key in keys}
    stored = {key: jnp.asarray(inputs[f"grads/{key}"], run.dtype) for key in keys}
    batch = jnp.asarray(inputs["mlp/X"], run.dtype), jnp.asarray(inputs["mlp/y"], jnp.int32)
    optimizer = ROWS[run.name](run)

    def step(carry: Any, grads: Any) -> Any:
        params, state = carry
        if facts(run.name)["problem"] == "mlp":
            grads = jax.grad(mlp_loss)(params, *batch)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    _, after = jax.jit(lambda carry: jax.lax.scan(step, carry, stored))((start, optimizer.init(start)))
    assert all(after[key].dtype == run.dtype for key in keys)
    return {key: np.concatenate([start[key][None], after[key]]) for key in keys}


def mlp_loss(params: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
    hidden = jnp.tanh(inputs @ params["w1"] + params["b1"][None])
    logits = hidden @ params["w2"] + params["b2"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def errors(run: Run) -> dict[str, np.ndarray]:
    """For each parameter, how far every kept step is from the recorded one."""
    bits, kept = ("f64", KEPT64) if run.dtype == np.float64 else ("f32", KEPT32)
    recorded = load(run.name)
    return {
        key: values[kept].astype(np.float64) - recorded[f"{bits}/{key}"].astype(np.float64)
        for key, values in follow(run).items()
    }


def largest(tree: dict[str, np.ndarray]) -> float:
    return max(np.abs(values).max() for values in tree.values())


def test_every_recording_has_a_row() -> None:
    assert {path.stem for path in FOLDER.glob("*.npz")} == {*ROWS, "inputs"}
    assert {path.stem for path in FOLDER.glob("*.json")} == {*ROWS}


@every_recording
@pytest.mark.usefixtures("x64")
def test_the_whole_trajectory_in_float64(name: str) -> None:
    tolerance = TOLERANCE_OF_CPR if ROWS[name] is authors_cpr else TOLERANCE
    for key, error in errors(Run(name, np.float64, on=1.0)).items():
        scale = 1 + np.abs(load(name)[f"f64/{key}"])
        np.testing.assert_array_less(np.abs(error) / scale, tolerance, err_msg=f"{name}: {key}")


@pytest.mark.slow
@every_recording
@pytest.mark.usefixtures("x64")
def test_without_its_decay_it_goes_elsewhere(name: str) -> None:
    missed = largest(errors(Run(name, np.float64, on=0.0)))
    assert missed > 0.1
    # The recording says how far: taking the decay out takes nothing else out.
    known = facts(name)["optax"]["control_no_decay_err_f64"]
    if known is not None:
        np.testing.assert_allclose(missed, known, rtol=1e-5)


@pytest.mark.slow
@every_recording
def test_the_whole_trajectory_in_float32(name: str) -> None:
    # Two float32 runs differ by the rounding of both: of the peer's (against its own float64), and of Optax's.
    known = facts(name)["optax"]
    bound = 3 * max(known["peer_f32_vs_f64"], known["max_abs_err_f32"] or 0.0)
    assert largest(errors(Run(name, np.float32, on=1.0))) < bound
