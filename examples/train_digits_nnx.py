"""The comparison of train_digits.py with Flax NNX: the optimizers and the rules are written the same way.

    python examples/train_digits_nnx.py

`nnx.Optimizer(model, tx, wrt=nnx.Param)` takes any Optax transformation. It shows it the parameters as a tree of
`nnx.Param`, whose paths JAX itself spells "hidden_1/kernel/value"; wdjax leaves the last part out, so that
`only("kernel")` and `weights_only()` say the same here as in Linen. Data, batches, strengths and schedule are those of
train_digits.py; the initial weights are drawn anew, so the numbers differ a little from the ones there.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from _common import arguments, digits, draw_comparison, measures_of_weights, print_comparison, shuffled_batches
from flax import nnx
from tqdm import tqdm

import wdjax

BATCH_SIZE = 50
LEARNING_RATE = 1e-3
L2_STRENGTH = 1e-3
WEIGHT_DECAY = 1.0


class MLP(nnx.Module):
    """Two hidden layers of 512 units, each with LayerNorm."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden_1 = nnx.Linear(64, 512, rngs=rngs)
        self.norm_1 = nnx.LayerNorm(512, rngs=rngs)
        self.hidden_2 = nnx.Linear(512, 512, rngs=rngs)
        self.norm_2 = nnx.LayerNorm(512, rngs=rngs)
        self.output = nnx.Linear(512, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.gelu(self.norm_1(self.hidden_1(x)))
        x = nnx.gelu(self.norm_2(self.hidden_2(x)))
        return self.output(x)


def optimizers(steps: int) -> dict[str, optax.GradientTransformation]:
    """The three optimizers, word for word those of train_digits.py."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, steps // 20, steps)
    weights = wdjax.weights_only()
    return {
        "no decay": optax.adam(schedule),
        "L2 in Adam": wdjax.adam_l2(schedule, L2_STRENGTH, weights),
        "decoupled decay": wdjax.adamw(schedule, WEIGHT_DECAY, weights),
    }


def cross_entropy(model: MLP, images: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()


@nnx.jit
def train_step(model: MLP, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array) -> None:
    """One step down the mean cross-entropy of a batch; changes the model and the optimizer in place."""
    optimizer.update(model, nnx.grad(cross_entropy)(model, images, labels))


@nnx.jit
def loss_and_accuracy(model: MLP, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    return cross_entropy(model, images, labels), jnp.mean(model(images).argmax(-1) == labels)


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Trains, prints, draws, and returns the rows of the tables."""
    options = arguments(__doc__, __file__, argv)
    data = digits()
    batches = shuffled_batches(len(data.train_labels), BATCH_SIZE, epochs=10 if options.quick else 200)

    histories: dict[str, list[dict[str, float]]] = {}
    for name, transformation in optimizers(len(batches)).items():
        model = MLP(nnx.Rngs(0))  # The same seed each time: the same initial weights.
        optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)
        start = nnx.state(nnx.clone(model), nnx.Param)
        histories[name] = []
        for step, batch in enumerate(tqdm(batches, desc=f"{name:15}"), start=1):
            train_step(model, optimizer, data.train_images[batch], data.train_labels[batch])
            if step % 10 == 0 or step == len(batches):
                train_loss, train_accuracy = loss_and_accuracy(model, data.train_images, data.train_labels)
                test_loss, test_accuracy = loss_and_accuracy(model, data.test_images, data.test_labels)
                row = {"step": step, "train acc": train_accuracy, "test acc": test_accuracy}
                row |= {"train loss": train_loss, "test loss": test_loss}
                row |= measures_of_weights(nnx.state(model, nnx.Param), start)
                histories[name].append({key: float(value) for key, value in row.items()})

    rows = {name: history[-1] for name, history in histories.items()}
    print_comparison(rows)
    draw_comparison(histories, f"Flax NNX, {len(data.train_labels)} training digits", options.out)
    return rows


if __name__ == "__main__":
    main()
