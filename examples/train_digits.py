"""Three ways to say "weight decay" to Adam, on scanned digits, with Flax Linen.

    python examples/train_digits.py

A network with a thousand times more weights than training images learns them by heart, three times from the same
weights and with the same batches:

- no decay: `optax.adam`;
- L2 in Adam: the penalty's gradient joins the loss's and is divided by the same root (`wdjax.adam_l2`);
- decoupled decay: the weights shrink beside Adam's step (`wdjax.adamw`).

The last two act on the weights of layers only, as the plan that is printed first shows; what biases and norm scales do
is in the last table. Do not look for a winner: the digits are easy, and other initial weights move the test accuracy by
as much (train_digits_nnx.py has some). What the three make of the weights is another matter.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from _common import arguments, digits, draw_comparison, measures_of_weights, print_comparison, shuffled_batches
from flax.training.train_state import TrainState
from tqdm import tqdm

import wdjax

BATCH_SIZE = 50
LEARNING_RATE = 1e-3

# The two strengths have different units, so the same number would compare nothing. These are the powers of ten that
# bring the kernels to about half the norm that they have without decay; they were not chosen by accuracy.
L2_STRENGTH = 1e-3
WEIGHT_DECAY = 1.0


class MLP(nn.Module):
    """Two hidden layers of 512 units, each with LayerNorm: kernels, biases and norm scales, 0.3 million numbers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(2):
            x = nn.gelu(nn.LayerNorm()(nn.Dense(512)(x)))
        return nn.Dense(10)(x)


def optimizers(steps: int) -> dict[str, optax.GradientTransformation]:
    """The three optimizers. The schedule also scales the decoupled decay, as it scales Adam's step."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, steps // 20, steps)
    weights = wdjax.weights_only()
    return {
        "no decay": optax.adam(schedule),
        "L2 in Adam": wdjax.adam_l2(schedule, L2_STRENGTH, weights),
        "decoupled decay": wdjax.adamw(schedule, WEIGHT_DECAY, weights),
    }


@jax.jit
def train_step(state: TrainState, images: jax.Array, labels: jax.Array) -> TrainState:
    """One step down the mean cross-entropy of a batch."""

    def loss(params: Any) -> jax.Array:
        logits = state.apply_fn({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


@jax.jit
def loss_and_accuracy(state: TrainState, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits = state.apply_fn({"params": state.params}, images)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, jnp.mean(logits.argmax(-1) == labels)


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Trains, prints, draws, and returns the rows of the tables."""
    options = arguments(__doc__, __file__, argv)
    data = digits()
    batches = shuffled_batches(len(data.train_labels), BATCH_SIZE, epochs=10 if options.quick else 200)

    model = MLP()
    start = model.init(jax.random.key(0), data.train_images[:1])["params"]
    print(wdjax.plan(start, WEIGHT_DECAY, wdjax.weights_only()), end="\n\n")
    histories: dict[str, list[dict[str, float]]] = {}

    for name, optimizer in optimizers(len(batches)).items():
        state = TrainState.create(apply_fn=model.apply, params=start, tx=optimizer)
        histories[name] = []
        for step, batch in enumerate(tqdm(batches, desc=f"{name:15}"), start=1):
            state = train_step(state, data.train_images[batch], data.train_labels[batch])
            if step % 10 == 0 or step == len(batches):
                train_loss, train_accuracy = loss_and_accuracy(state, data.train_images, data.train_labels)
                test_loss, test_accuracy = loss_and_accuracy(state, data.test_images, data.test_labels)
                row = {"step": step, "train acc": train_accuracy, "test acc": test_accuracy}
                row |= {"train loss": train_loss, "test loss": test_loss}
                row |= measures_of_weights(state.params, start)
                histories[name].append({key: float(value) for key, value in row.items()})

    rows = {name: history[-1] for name, history in histories.items()}
    print_comparison(rows)
    draw_comparison(histories, f"Flax Linen, {len(data.train_labels)} training digits", options.out)
    return rows


if __name__ == "__main__":
    main()
