"""Where AdamW takes the weights: their equilibrium, predicted and measured by `wdjax.monitor`, with Flax Linen.

    python examples/monitor_equilibrium.py

The decay takes a share of the weights in each step, and noise in the gradients puts new length on. Where both are as
large, weights stay as long as they are, whatever they started from. If gradients were noise and nothing else, AdamW's
weights would come to a root mean square of sqrt(eta / (2 lambda)), and turn in each step by
sqrt(2 eta lambda (1 - b1) / (1 + b1)), within a few times 1 / (eta lambda) steps.

Three runs of one network show how far that goes. Two learn digits with noise on their pixels, from kernels a quarter
and twice as large as usual; in the third, a control, the gradients are random numbers, and the predictions hold to a
percent. In a network that learns they give the scale. The two that learn come to the same place, but:

- in the hidden layers, whose LayerNorm makes the size of their kernels free, the weights end a tenth smaller: Adam's
  steps are a little shorter than those of pure noise, and the gradients that follow a step oppose it, as descent does,
  so that less of it is left;
- in the head, whose size means something, the mean of the gradients keeps the weights almost a third above.

More noise brings both closer, less takes them further off. Set NOISE to 0, and the network learns the digits by heart:
for hundreds of steps there are no gradients to speak of and the weights fall freely, until errors throw them back.

Every number of the picture is one of `wdjax.scalars`, taken in each step within one compiled `jax.lax.scan`.
"""

from collections.abc import Mapping, Sequence
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

LEARNING_RATE, WEIGHT_DECAY, B1 = 2e-3, 0.5, 0.9
BATCH_SIZE, NOISE = 16, 0.5  # The noise has this standard deviation; pixels are in [0, 1].
RATE = LEARNING_RATE * WEIGHT_DECAY
EXPECTED = {
    "weight_rms": np.sqrt(LEARNING_RATE / (2 * WEIGHT_DECAY)),
    "angular_update": np.sqrt(2 * RATE * (1 - B1) / (1 + B1)),
}
GROUPS = wdjax.by_path({"Dense_[01]/kernel": "hidden", "Dense_2/kernel": "head"}, default="rest")
RUNS = {"learns, small start": 0.25, "learns, large start": 2.0, "random gradients": 1.0}


class MLP(nn.Module):
    """Two hidden layers, each with LayerNorm, and a head without."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(2):
            x = nn.gelu(nn.LayerNorm()(nn.Dense(128)(x)))
        return nn.Dense(10)(x)


def train(state: TrainState, data: Digits, batches: np.ndarray, learns: bool) -> dict[str, np.ndarray]:
    """What was measured in each step."""

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


def draw(histories: Mapping[str, Mapping[str, np.ndarray]], out: Any) -> None:
    """Draws each metric of both groups over the steps, as means of 100 steps, with the prediction beside it."""
    figure, panels = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained")
    for axes, metric in zip(panels, ("weight_rms", "angular_update", "shrinkage"), strict=True):
        for color, (run, history) in zip(COLORS, histories.items(), strict=True):
            for group, line in (("hidden", "-"), ("head", ":")):
                means = history[f"{group}/{metric}"].reshape(-1, 100).mean(1)
                axes.plot(np.arange(len(means)) * 100 + 50, means, line, color=color, label=f"{group} ({run})")
        axes.axhline(EXPECTED.get(metric, 0.0), color="black", linestyle="--", linewidth=1.5, label="predicted")
        axes.set(title=metric, xlabel="step")
        axes.grid(alpha=0.25)
    panels[0].set(ylabel="root mean square of the weights", ylim=(0, None))
    panels[1].set(ylabel="radians a step (log scale)", yscale="log")
    panels[2].axhline(RATE, color="black", linewidth=0.8)
    panels[2].annotate(
        "effective_rate: the decay alone", (0.98, RATE), xycoords=("axes fraction", "data"), ha="right", va="bottom"
    )
    panels[2].set(ylabel="share of the weights that a step takes off", ylim=(-1.5 * RATE, 1.3 * RATE))
    panels[0].legend(fontsize=8)
    save(figure, f"AdamW, learning rate {LEARNING_RATE}, weight decay {WEIGHT_DECAY}, batches of {BATCH_SIZE}", out)


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
