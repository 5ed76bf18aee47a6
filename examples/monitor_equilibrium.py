"""Where AdamW takes the weights: their equilibrium, predicted and measured by `wdjax.monitor`, with Flax Linen.

    python examples/monitor_equilibrium.py

Each step, the decay removes a share of the weights, and noise in the gradients makes them longer. Where the two
balance, the weights keep their length, whatever length they started with. If gradients were pure noise, AdamW's weights
would reach a root mean square of sqrt(eta / (2 lambda)) within a few times 1 / (eta lambda) steps. From then on, each
step would turn them by sqrt(2 eta lambda (1 - b1) / (1 + b1)) radians.

Three runs of one network test this. Two runs learn digits with noise on their pixels, and start from kernels a quarter
and twice as large as usual. In the third, a control, the gradients are random numbers, and the predictions hold to a
percent. The two that learn end with the same size. Both are near the predictions, but not equal to them:

- In the hidden layers the weights end a tenth smaller than predicted. LayerNorm follows, so the size of their kernels
  hardly changes the output. (It would not change it at all if these layers had no biases.) Adam's steps are a little
  shorter than those of pure noise. Later gradients also partly undo each step.
- In the head the weights end almost a third larger. Their size matters, and the mean of the gradients maintains it.

More noise brings both closer to the prediction, and less noise takes them further away. With NOISE = 0 the network
memorizes the digits. Then the gradients almost vanish for hundreds of steps and the weights shrink freely, until the
network makes errors again and the weights grow.

The picture shows the size of the hidden weights of the two runs that learn, and the prediction. The table shows
measured / predicted for both quantities, for the hidden layers and the head, in all three runs. Every number comes from
`wdjax.scalars`, taken in each step within one compiled `jax.lax.scan`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from _common import COLORS, Digits, arguments, digits, print_table, save, shuffled_batches
from flax.training.train_state import TrainState
from tqdm import tqdm

import wdjax
from wdjax import rates

LEARNING_RATE, WEIGHT_DECAY, B1 = 2e-3, 0.5, 0.9
BATCH_SIZE, NOISE = 16, 0.5  # The noise has this standard deviation; pixels are in [0, 1].
EXPECTED = {
    "weight_rms": rates.equilibrium_rms(WEIGHT_DECAY, LEARNING_RATE),
    "angular_update": rates.equilibrium_angle(WEIGHT_DECAY, LEARNING_RATE, B1),
}
GROUPS = wdjax.by_path({"Dense_[01]/kernel": "hidden", "Dense_2/kernel": "head"}, default="rest")
RUNS = {"learns, small start": 0.25, "learns, large start": 2.0, "random gradients": 1.0}


class MLP(nn.Module):
    """Two hidden layers, each with LayerNorm, and a head without it."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(2):
            x = nn.gelu(nn.LayerNorm()(nn.Dense(128)(x)))
        return nn.Dense(10)(x)


def train(state: TrainState, data: Digits, batches: np.ndarray, learns: bool) -> dict[str, np.ndarray]:
    """The measurements in each step."""

    def step(state: TrainState, batch: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        def loss(params: Any) -> jax.Array:
            logits = state.apply_fn({"params": params}, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, data.train_labels[batch]).mean()

        key, images = jax.random.key(state.step), data.train_images[batch]
        images += NOISE * jax.random.normal(key, images.shape)
        grads = jax.grad(loss)(state.params) if learns else optax.tree.random_like(key, state.params)
        state = state.apply_gradients(grads=grads)
        return state, wdjax.scalars(state)

    steps = jax.jit(lambda state, batches: jax.lax.scan(step, state, batches))
    parts = []
    for some in tqdm(np.split(batches, 10), desc="learning" if learns else "control"):
        state, measured = steps(state, some)
        parts.append(jax.device_get(measured))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def draw(histories: Mapping[str, Mapping[str, np.ndarray]], out: Path) -> None:
    """Draws the size of the hidden weights of the two runs that learn, as means of 100 steps, and the prediction."""
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    expected, ends = EXPECTED["weight_rms"], []
    for name, color, below, label in (
        ("learns, large start", COLORS[2], 0, "start: twice the usual size"),
        ("learns, small start", COLORS[1], -5, "start: a quarter of the usual size"),
    ):
        size = histories[name]["hidden/weight_rms"]
        means = size.reshape(-1, 100).mean(1)
        ends.append(100 * size[-len(size) // 4 :].mean() / expected)
        axes.plot(np.arange(len(means)) * 100 + 50, means, color=color, linewidth=3)
        axes.annotate(label, (50, means[0]), (12, below), textcoords="offset points", color=color, va="center")
    axes.axhline(expected, color=COLORS[0], linestyle="--", linewidth=2)
    label = f"predicted: √(η / 2λ) = {expected:.4f}"
    axes.annotate(label, (0.98, expected), (0, 5), ("axes fraction", "data"), "offset points", ha="right", va="bottom")
    axes.set(xlabel="step", ylabel="root mean square of the hidden weights", ylim=(0, None), xlim=(0, len(size)))
    within = f"{min(ends):.0f} to {max(ends):.0f} % of the predicted size"
    save(figure, f"AdamW forgets how large the weights were at the start:\nthey end at {within}", out)


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Trains, prints measured over predicted in the last quarter of the steps, draws, and returns what was printed."""
    options = arguments(__doc__, __file__, argv)
    data = digits(1600)
    batches = shuffled_batches(len(data.train_labels), BATCH_SIZE, epochs=5 if options.quick else 80)
    model, weights = MLP(), wdjax.weights_only()
    start = model.init(jax.random.key(0), data.train_images[:1])["params"]
    adamw = wdjax.adamw(LEARNING_RATE, WEIGHT_DECAY, weights, b1=B1)
    optimizer = wdjax.monitor(adamw, WEIGHT_DECAY, weights, learning_rate=LEARNING_RATE, groups=GROUPS)

    histories, rows = {}, {}
    for run, scale in RUNS.items():
        params = jax.tree.map(lambda p, decays, scale=scale: p * scale if decays else p, start, weights.mask(start))
        state = TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)
        histories[run] = train(state, data, batches, learns=run.startswith("learns"))
        last = {name: values[-len(batches) // 4 :].mean() for name, values in histories[run].items()}
        for group in ("hidden", "head"):
            rows[f"{group}, {run}"] = {m: last[f"{group}/{m}"] / EXPECTED[m] for m in EXPECTED}
    print("\nMeasured / predicted, in the last quarter of the steps:", end="")
    print_table(rows, list(EXPECTED))
    draw(histories, options.out)
    return rows


if __name__ == "__main__":
    main()
