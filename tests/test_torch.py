"""PyTorch's own optimizers beside wdjax's, each on the gradients of its own parameters, in float64 to rounding."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from peer import peer

import wdjax

torch = peer("torch")

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("x64")]  # Peers: Optax's bias correction.

STEPS, LEARNING_RATE, WEIGHT_DECAY = 60, 0.05, 0.1
RNG = np.random.default_rng(0)
INPUTS, TARGETS = RNG.normal(size=(16, 4)), RNG.normal(size=(16, 2))
START = {
    "Dense_0/bias": RNG.normal(size=5),
    "Dense_0/kernel": RNG.normal(size=(4, 5)),
    "Dense_1/bias": RNG.normal(size=2),
    "Dense_1/kernel": RNG.normal(size=(5, 2)),
}
Trajectory = list[dict[str, np.ndarray]]


def ours(optimizer: optax.GradientTransformation, penalty: Callable[[Any], Any] = lambda params: 0.0) -> Trajectory:
    params: dict[str, dict[str, jax.Array]] = {"Dense_0": {}, "Dense_1": {}}
    for path, value in START.items():
        layer, name = path.split("/")
        params[layer][name] = jnp.asarray(value)

    def loss(params: Any) -> jax.Array:
        hidden = jnp.tanh(INPUTS @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"][None])
        outputs = hidden @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"][None]
        return 0.5 * jnp.mean((outputs - TARGETS) ** 2) + penalty(params)

    def step(carry: Any, _: Any) -> Any:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    _, after = jax.jit(lambda carry: jax.lax.scan(step, carry, length=STEPS))((params, optimizer.init(params)))
    flat = dict(zip(wdjax.paths.canonical_paths(after), map(np.asarray, jax.tree.leaves(after)), strict=True))
    return [{path: values[i] for path, values in flat.items()} for i in range(STEPS)]


def theirs(
    optimizer: Callable[..., Any],
    decay_of: Callable[[str], float],
    factor: Callable[[int], float] | None,
    multiplier_of: Callable[[str], float] = lambda path: 1.0,
) -> Trajectory:
    params = {path: torch.tensor(value, requires_grad=True) for path, value in START.items()}
    groups = [
        {"params": [value], "weight_decay": decay_of(path), "lr": LEARNING_RATE * multiplier_of(path)}
        for path, value in params.items()
    ]
    peer = optimizer(groups, lr=LEARNING_RATE)
    scheduler = None if factor is None else torch.optim.lr_scheduler.LambdaLR(peer, factor)
    inputs, targets = torch.tensor(INPUTS), torch.tensor(TARGETS)
    trajectory = []
    for _ in range(STEPS):
        peer.zero_grad()
        hidden = torch.tanh(inputs @ params["Dense_0/kernel"] + params["Dense_0/bias"])
        outputs = hidden @ params["Dense_1/kernel"] + params["Dense_1/bias"]
        (0.5 * ((outputs - targets) ** 2).mean()).backward()
        peer.step()
        if scheduler is not None:
            scheduler.step()
        trajectory.append({path: value.detach().numpy().copy() for path, value in params.items()})
    return trajectory


class SGDW(torch.optim.SGD):
    """PyTorch has none; people shrink the weights by hand before the step."""

    def __init__(self, groups: list[dict[str, Any]], **kwargs: Any) -> None:
        groups = [{**group, "decoupled": group["weight_decay"], "weight_decay": 0.0} for group in groups]
        super().__init__(groups, **kwargs)

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(1 - group["lr"] * group["decoupled"])
        return super().step(closure)


def with_options(optimizer: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return lambda groups, lr: optimizer(groups, lr=lr, **options)


class Pair(NamedTuple):
    ours: Callable[..., optax.GradientTransformation]
    theirs: Callable[..., Any]
    options: dict[str, Any]


NESTEROV = {"momentum": 0.9, "nesterov": True}
PAIRS = {
    "sgd_l2": Pair(wdjax.sgd_l2, torch.optim.SGD, {}),
    "sgd_l2 momentum": Pair(wdjax.sgd_l2, torch.optim.SGD, {"momentum": 0.9}),
    "sgd_l2 nesterov": Pair(wdjax.sgd_l2, torch.optim.SGD, NESTEROV),
    "sgdw": Pair(wdjax.sgdw, SGDW, {}),
    "sgdw momentum": Pair(wdjax.sgdw, SGDW, {"momentum": 0.9}),
    "sgdw nesterov": Pair(wdjax.sgdw, SGDW, NESTEROV),
    "adam_l2": Pair(wdjax.adam_l2, torch.optim.Adam, {}),
    "adamw": Pair(wdjax.adamw, torch.optim.AdamW, {}),
}


class Decay(NamedTuple):
    """Who decays how much: as wdjax's arguments, and as a function of the path for PyTorch's groups."""

    rate: Any
    mask: Any
    of: Callable[[str], float]


RATES = {"Dense_0/kernel": WEIGHT_DECAY, "Dense_1/kernel": 0.03}
DECAYS = {
    "everything": Decay(WEIGHT_DECAY, None, lambda path: WEIGHT_DECAY),
    "no biases": Decay(WEIGHT_DECAY, wdjax.all_but("bias"), lambda path: WEIGHT_DECAY * path.endswith("kernel")),
    "two rates": Decay(wdjax.by_path(RATES, default=0.0), None, lambda path: RATES.get(path, 0.0)),
}

every_pair = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
every_decay = pytest.mark.parametrize("decay", DECAYS.values(), ids=DECAYS)


def farthest(mine: Trajectory, other: Trajectory) -> float:
    return max(np.abs(a[path] - b[path]).max() for a, b in zip(mine, other, strict=True) for path in START)


def assert_follows(pair: Pair, decay: Decay, learning_rate: Any, factor: Callable[[int], float] | None) -> None:
    peer = with_options(pair.theirs, **pair.options)
    mine = ours(pair.ours(learning_rate, decay.rate, decay.mask, **pair.options))
    assert farthest(mine, theirs(peer, decay.of, factor)) < 1e-12
    # And not because the decay is too small to see.
    assert farthest(mine, theirs(peer, lambda path: 0.0, factor)) > 1e-3


@every_pair
@every_decay
def test_every_step_with_parameter_groups(pair: Pair, decay: Decay) -> None:
    assert_follows(pair, decay, LEARNING_RATE, None)


@every_pair
def test_every_step_under_a_cosine_schedule(pair: Pair) -> None:
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, STEPS)
    assert_follows(pair, DECAYS["no biases"], schedule, lambda step: 0.5 * (1 + np.cos(np.pi * step / STEPS)))


MULTIPLIERS = {"Dense_0/kernel": 0.1, "Dense_0/bias": 0.3}


@every_pair
@pytest.mark.parametrize(
    "schedule", [None, optax.cosine_decay_schedule(LEARNING_RATE, STEPS)], ids=["number", "cosine"]
)
def test_every_step_with_learning_rates_of_groups(pair: Pair, schedule: Any) -> None:
    factor = None if schedule is None else lambda step: 0.5 * (1 + np.cos(np.pi * step / STEPS))
    decay, peer = DECAYS["two rates"], with_options(pair.theirs, **pair.options)
    recipe = pair.ours(schedule or LEARNING_RATE, decay.rate, **pair.options)
    mine = ours(optax.chain(recipe, wdjax.scale_by_path(wdjax.by_path(MULTIPLIERS, default=1.0))))
    assert farthest(mine, theirs(peer, decay.of, factor, lambda path: MULTIPLIERS.get(path, 1.0))) < 1e-12
    assert farthest(mine, theirs(peer, decay.of, factor)) > 1e-3


@pytest.mark.parametrize("name", ["sgd_l2", "sgd_l2 momentum", "adam_l2"])
@every_decay
def test_a_penalty_in_the_loss_is_their_weight_decay(name: str, decay: Decay) -> None:
    pair = PAIRS[name]
    peer = theirs(with_options(pair.theirs, **pair.options), decay.of, None)
    bare = pair.ours(LEARNING_RATE, 0.0, **pair.options)
    assert farthest(ours(bare, lambda params: wdjax.l2_penalty(params, decay.rate, decay.mask)), peer) < 1e-12


def test_decoupled_and_coupled_are_not_the_same() -> None:
    """The peers tell the places apart: a recipe in another's place does not pass."""
    everything = DECAYS["everything"]
    for mine, other in (("adamw", "adam_l2"), ("adam_l2", "adamw"), ("sgdw momentum", "sgd_l2 momentum")):
        peer = theirs(with_options(PAIRS[other].theirs, **PAIRS[other].options), everything.of, None)
        optimizer = PAIRS[mine].ours(LEARNING_RATE, WEIGHT_DECAY, **PAIRS[mine].options)
        assert farthest(ours(optimizer), peer) > 1e-3
