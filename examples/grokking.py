"""Without decay a network memorizes, and with decay it generalizes ("grokking"). Written in Flax Linen.

    python examples/grokking.py

The task is (a + b) mod 59. The network trains on half of the table of sums, and the other half tests it. Each number
has a 128-dimensional embedding. The two embeddings of a pair go through one hidden layer of 256 units. Each step of
Adam takes the whole training half as its batch. Three runs start from the same weights:

- no decay: `optax.adam`. The network memorizes the training half within 100 steps. It gets no unseen sum right in all
  2,000 steps.
- L2 in Adam: `wdjax.adam_l2` with a strength of 1e-3. The network generalizes after about 300 steps.
- decoupled decay: `wdjax.adamw` with a weight decay of 1. The network generalizes after about 1,400 steps.

Chance is 1.7 %. A network that memorized does worse than chance: in the table of sums no training sum of the same row
or column has the answer of an unseen sum.

The two strengths differ by a factor of a thousand because their units differ. Adam divides the L2 term, like the rest
of the gradient, by the root mean square of past gradients. That number is far below 1, so the L2 term grows. A
decoupled decay is not divided. The strengths were picked by hand, so the numbers of steps do not rank the methods.

In separate runs, which are not part of this script, the two strengths were swapped, and neither method generalized.
With a weight decay of 1e-3, AdamW gets no unseen sum right in 2,000 steps. With an L2 strength of 1, Adam stays at
chance on both halves. Two more seeds, with other splits and initial weights, gave the same result for the runs with
decay. The step counts changed by about 10 %.

The embedding and the kernels decay, and the biases do not. The script shows this before the training starts.

Sources: Power et al. 2022 (arXiv:2201.02177) found the effect, which they call grokking, and that weight decay helps.
Liu et al. 2022 (arXiv:2205.10343) relate it to the representation that the embedding learns.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from _common import METHOD_COLORS, arguments, print_plan, print_table, save
from flax.training.train_state import TrainState
from tqdm import tqdm

import wdjax

MODULUS = 59
LEARNING_RATE, B2 = 3e-3, 0.98
L2_STRENGTH, WEIGHT_DECAY = 1e-3, 1.0
CHUNK = 50  # Steps in one compiled scan.
KNOWN = 99.5  # Percent. A network that gets this share of a half right counts as knowing that half.

SUMS = np.add.outer(np.arange(MODULUS), np.arange(MODULUS)) % MODULUS


class Adder(nn.Module):
    """Logits of (a + b) mod 59 for all a and b at once, of shape (59, 59, 59).

    The hidden layer is a dense layer on both embeddings side by side. It is written as the sum of its two halves, so
    that each half is computed for 59 numbers instead of 3,481 pairs.
    """

    @nn.compact
    def __call__(self) -> jax.Array:
        numbers = nn.Embed(MODULUS, 128)(jnp.arange(MODULUS))
        a, b = nn.Dense(256)(numbers), nn.Dense(256, use_bias=False)(numbers)
        return nn.Dense(MODULUS)(nn.relu(a[:, None] + b[None, :]))


def optimizers() -> dict[str, optax.GradientTransformation]:
    weights = wdjax.weights_only()
    return {
        "no decay": optax.adam(LEARNING_RATE, b2=B2),
        "L2 in Adam": wdjax.adam_l2(LEARNING_RATE, L2_STRENGTH, weights, b2=B2),
        "decoupled decay": wdjax.adamw(LEARNING_RATE, WEIGHT_DECAY, weights, b2=B2),
    }


def train(state: TrainState, is_training: np.ndarray, steps: int, name: str) -> dict[str, np.ndarray]:
    """Trains on the training sums. Returns the percentage right of each half after 0, 1, ..., steps - 1 steps."""

    def step(state: TrainState, _: None) -> tuple[TrainState, dict[str, jax.Array]]:
        def loss(params: Any) -> tuple[jax.Array, jax.Array]:
            logits = state.apply_fn({"params": params})
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, SUMS)
            return losses.mean(where=is_training), logits.argmax(-1) == SUMS

        grads, is_right = jax.grad(loss, has_aux=True)(state.params)
        halves = {"training": is_training, "unseen": ~is_training}
        right = {half: 100 * is_right.mean(where=where) for half, where in halves.items()}
        return state.apply_gradients(grads=grads), right

    chunk = jax.jit(lambda state: jax.lax.scan(step, state, length=CHUNK))
    parts = []
    for _ in tqdm(range(steps // CHUNK), desc=f"{name:15}", unit_scale=CHUNK, unit="step"):
        state, right = chunk(state)
        parts.append(jax.device_get(right))
    return {half: np.concatenate([part[half] for part in parts]) for half in parts[0]}


def steps_until_known(percent: np.ndarray) -> float:
    """After how many steps a half was known for the first time; infinity if it never was."""
    known = np.flatnonzero(percent >= KNOWN)
    return float(known[0]) if len(known) else np.inf


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Trains, prints, draws, and returns the rows of the table."""
    options = arguments(__doc__, __file__, argv)
    steps = 2 * CHUNK if options.quick else 2000
    is_training = np.random.default_rng(0).permutation(MODULUS**2).reshape(MODULUS, MODULUS) % 2 == 0

    model = Adder()
    start = model.init(jax.random.key(0))["params"]
    print_plan(start, WEIGHT_DECAY)
    histories, rows = {}, {}
    for name, optimizer in optimizers().items():
        state = TrainState.create(apply_fn=model.apply, params=start, tx=optimizer)
        histories[name] = train(state, is_training, steps, name)
        rows[name] = {f"{half} %": float(percent[-1]) for half, percent in histories[name].items()}
        rows[name] |= {f"{half} known": steps_until_known(percent) for half, percent in histories[name].items()}

    print_table(rows, list(rows["no decay"]))
    print(f"\nknown: number of steps until {KNOWN} % of that half is correct (inf: not reached in {steps:,} steps).")
    for name, row in rows.items():
        memorized, generalized = row["training known"], row["unseen known"]
        first = f"memorizes the training half in {memorized:,.0f} steps" if memorized < np.inf else "knows neither half"
        second = f"generalizes after {generalized:,.0f} steps"
        if generalized == np.inf:
            second = f"gets {row['unseen %']:.1f} % of the unseen half right at the end"
        print(f"{name}: {first}, and {second}.")
    draw(histories, options.out)
    return rows


def draw(histories: Mapping[str, Mapping[str, np.ndarray]], out: Path) -> None:
    """Draws the percentage of unseen sums over the steps, and of the training sums where nothing decays."""
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    steps = len(histories["no decay"]["unseen"])
    look: Any = {"textcoords": "offset points", "fontsize": 13}
    for name, half, style, label in (
        ("L2 in Adam", "unseen", "-", f"unseen sums,\nL2 in Adam,\nλ = {L2_STRENGTH:g}"),
        ("decoupled decay", "unseen", "-", f"unseen sums,\nAdamW\n(decoupled),\nλ = {WEIGHT_DECAY:g}"),
        ("no decay", "unseen", "-", "unseen sums, no decay"),  # Drawn over the others, which start on it.
        ("no decay", "training", ":", "training sums,\nno decay"),
    ):
        percent, color = histories[name][half], METHOD_COLORS[name]
        axes.plot(np.arange(1, steps), percent[1:], style, color=color, linewidth=3.5)
        rises = np.flatnonzero(percent > 55)
        if len(rises):  # The label goes left of where the curve rises, or below its end.
            axes.annotate(label, (rises[0], 58), (-10, 0), color=color, ha="right", va="center", **look)
        else:
            axes.annotate(label, (steps, percent[-1]), (0, -7), color=color, ha="right", va="top", **look)
    axes.set(xscale="log", xlim=(10, 1.2 * steps), ylim=(-13, 106))
    axes.set(xlabel="training step (log scale)", ylabel=f"right answers to (a + b) mod {MODULUS} (%)")
    axes.xaxis.set_major_formatter("{x:,.0f}")

    unseen = {name: history["unseen"][-1] for name, history in histories.items()}
    least = min(unseen["L2 in Adam"], unseen["decoupled decay"])
    numbers = f"{unseen['no decay']:.0f} % right without decay, {least:.0f} % with L2 in Adam or with AdamW"
    save(figure, f"The same network on sums it never saw:\n{numbers}", out)


if __name__ == "__main__":
    main()
