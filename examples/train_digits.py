"""What weight decay is for: scanned digits, 30 % of the training labels wrong, with Flax Linen.

    python examples/train_digits.py

The network has nine times as many weights as training images. Several seeds are trained without decay and with several
strengths (lambda) of

- L2 in Adam: the gradient of the penalty is added to the gradient of the loss, so Adam normalizes both
  (`wdjax.adam_l2`);
- decoupled decay: the weights shrink separately from Adam's step (`wdjax.adamw`).

Both act on the kernels and not on the biases, as the plan that is printed first shows. The test labels are right.

Without decay the network memorizes the wrong labels: the training error falls to almost zero, and the test error rises
to about 25 %. With the right strength it does not memorize them: the training error stays near 30 %, which is the share
of wrong labels, and the test error ends near 6 %. Either method can do that, but not with the same number: the best
lambda of decoupled decay is hundreds of times that of L2. Too large a lambda hurts more than none.

Two limits. Without decay, early stopping at about 200 steps is almost as good, but it needs validation data. And with
right labels (WRONG = 0.0) there is little to gain: the test error falls from 2.4 to 1.9 %, and the best lambda is a
tenth of the one above.

The best strength is chosen by the test error that is shown, which flatters it a little. Choose yours on validation
data, as sweep_weight_decay.py does.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import Digits, Errors, arguments, digits, print_plan, report_errors, with_wrong_labels
from flax.training.train_state import TrainState
from tqdm import tqdm

import wdjax

WRONG = 0.3  # Of the training labels.
TRAIN_SIZE, BATCH_SIZE, LEARNING_RATE = 1000, 100, 1e-2

# The two strengths have different units, so each method has its own grid, from almost nothing to too much.
# No decay is a decoupled decay of 0. The strength is an argument of the compiled program, so changing it does not
# recompile.
METHODS: dict[str, tuple[Callable[..., optax.GradientTransformation], tuple[float, ...]]] = {
    "no decay": (wdjax.adamw, (0.0,)),
    "L2 in Adam": (wdjax.adam_l2, (0.0001, 0.001, 0.003, 0.01, 0.03, 0.1)),
    "decoupled decay": (wdjax.adamw, (0.01, 0.1, 0.3, 1.0, 3.0, 10.0)),
}


class MLP(nn.Module):
    """One hidden layer."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.gelu(nn.Dense(128)(x))
        return nn.Dense(10)(x)


def train_step(state: TrainState, images: jax.Array, labels: jax.Array) -> TrainState:
    """One step down the mean cross-entropy of a batch."""

    def loss(params: Any) -> jax.Array:
        logits = state.apply_fn({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


def error(state: TrainState, images: jax.Array, labels: jax.Array) -> jax.Array:
    """The percentage of misclassified images."""
    logits = state.apply_fn({"params": state.params}, images)
    return 100 * jnp.mean(logits.argmax(-1) != labels)


def learning_rate(epochs: int) -> optax.Schedule:
    """Rises for a twentieth of the steps, then falls to zero. The decoupled decay follows it, as Adam's step does."""
    steps = epochs * TRAIN_SIZE // BATCH_SIZE
    return optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, steps // 20, steps)


def train(
    data: Digits, epochs: int, recipe: Callable[..., Any], weight_decay: jax.Array, seed: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Trains once. Returns the training error and the test error after each epoch."""
    weights_key, order_key = jax.random.split(jax.random.key(seed))
    params = MLP().init(weights_key, data.train_images[:1])["params"]
    optimizer = recipe(learning_rate(epochs), weight_decay, wdjax.weights_only())
    state = TrainState.create(apply_fn=MLP().apply, params=params, tx=optimizer)

    def step(state: TrainState, batch: jax.Array) -> tuple[TrainState, None]:
        return train_step(state, data.train_images[batch], data.train_labels[batch]), None

    def epoch(state: TrainState, key: jax.Array) -> tuple[TrainState, tuple[jax.Array, jax.Array]]:
        batches = jax.random.permutation(key, TRAIN_SIZE).reshape(-1, BATCH_SIZE)
        state, _ = jax.lax.scan(step, state, batches)
        return state, (
            error(state, data.train_images, data.train_labels),
            error(state, data.test_images, data.test_labels),
        )

    return jax.lax.scan(epoch, state, jax.random.split(order_key, epochs))[1]


def train_all(train: Callable[..., Any], quick: bool) -> dict[str, dict[float, Errors]]:
    """The errors by method and strength: all seeds at once, and one compilation for each recipe."""
    data = with_wrong_labels(digits(TRAIN_SIZE), WRONG)
    epochs, seeds = (5, np.arange(2)) if quick else (150, np.arange(5))
    steps = np.arange(1, epochs + 1) * (TRAIN_SIZE // BATCH_SIZE)

    @functools.partial(jax.jit, static_argnums=0)
    def train_seeds(recipe: Callable[..., Any], weight_decay: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.vmap(functools.partial(train, data, epochs, recipe, weight_decay))(seeds)

    runs: dict[str, dict[float, Errors]] = {method: {} for method in METHODS}
    settings = [(method, strength) for method, (_, strengths) in METHODS.items() for strength in strengths]
    for method, strength in tqdm(settings, desc=f"{len(seeds)} seeds each"):
        runs[method][strength] = Errors(steps, *jax.device_get(train_seeds(METHODS[method][0], strength)))
    return runs


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Trains, prints, draws, and returns the rows of the table."""
    options = arguments(__doc__, __file__, argv)
    params = jax.eval_shape(MLP().init, jax.random.key(0), jnp.zeros((1, 64)))["params"]
    print_plan(params, 1.0)
    return report_errors(train_all(train, options.quick), WRONG, options)


if __name__ == "__main__":
    main()
