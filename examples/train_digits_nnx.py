"""The experiment of train_digits.py, written in Flax NNX.

    python examples/train_digits_nnx.py

The optimizers and the rules are written as in Linen. `nnx.Optimizer(model, tx, wrt=nnx.Param)` takes any Optax
transformation. NNX passes the parameters as a tree of `nnx.Param`. JAX names the leaves "hidden/kernel/value". wdjax
drops "/value", so `only("kernel")` and `weights_only()` work as in Linen. Data, strengths, schedule and seeds are those
of train_digits.py. The initial weights are drawn in another way, so the numbers differ a little.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from _common import Digits, arguments, print_plan, report_errors
from flax import nnx
from train_digits import BATCH_SIZE, TRAIN_SIZE, WRONG, learning_rate, train_all

import wdjax


class MLP(nnx.Module):
    """One hidden layer."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(64, 128, rngs=rngs)
        self.output = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.output(nnx.gelu(self.hidden(x)))


def cross_entropy(model: MLP, images: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()


def train_step(model: MLP, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array) -> None:
    """One step down the mean cross-entropy of a batch. It changes the model and the optimizer in place."""
    optimizer.update(model, nnx.grad(cross_entropy)(model, images, labels))


def error(model: MLP, images: jax.Array, labels: jax.Array) -> jax.Array:
    """The percentage of misclassified images."""
    return 100 * jnp.mean(model(images).argmax(-1) != labels)


def train(
    data: Digits, epochs: int, recipe: Callable[..., Any], weight_decay: jax.Array, seed: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Trains once. Returns the training error and the test error after each epoch."""
    weights_key, order_key = jax.random.split(jax.random.key(seed))
    model = MLP(nnx.Rngs(weights_key))
    transformation = recipe(learning_rate(epochs), weight_decay, wdjax.weights_only())
    # `jax.lax.scan` carries arrays, so the model and its optimizer are split into arrays and their fixed structure.
    structure, state = nnx.split((model, nnx.Optimizer(model, transformation, wrt=nnx.Param)))

    def step(state: nnx.State, batch: jax.Array) -> tuple[nnx.State, None]:
        model, optimizer = nnx.merge(structure, state)
        train_step(model, optimizer, data.train_images[batch], data.train_labels[batch])
        return nnx.state((model, optimizer)), None

    def epoch(state: nnx.State, key: jax.Array) -> tuple[nnx.State, tuple[jax.Array, jax.Array]]:
        batches = jax.random.permutation(key, TRAIN_SIZE).reshape(-1, BATCH_SIZE)
        state, _ = jax.lax.scan(step, state, batches)
        model, _ = nnx.merge(structure, state)
        return state, (
            error(model, data.train_images, data.train_labels),
            error(model, data.test_images, data.test_labels),
        )

    return jax.lax.scan(epoch, state, jax.random.split(order_key, epochs))[1]


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Trains, prints, draws, and returns the rows of the table."""
    options = arguments(__doc__, __file__, argv)
    params = nnx.state(nnx.eval_shape(lambda: MLP(nnx.Rngs(0))), nnx.Param)
    print_plan(params, 1.0)
    return report_errors(train_all(train, options.quick), WRONG, options)


if __name__ == "__main__":
    main()
