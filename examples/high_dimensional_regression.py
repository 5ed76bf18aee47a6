"""The weight decay experiment of d2l.ai: 20 examples, 200 inputs.

    python examples/high_dimensional_regression.py

It places the penalty in the loss, in the gradient and in the update. (In the book: chapter "Weight Decay".)

The data are y = 0.05 + sum of 0.01 x_i + noise of 0.01. There are 20 training examples for 201 parameters. Least
squares fits the examples perfectly and learns next to nothing. In the 180 directions that no example shows, the weights
stay where they were drawn, so their norm ends near sqrt(180) = 13.4 if they start from N(0, 1). An L2 penalty of
strength 3 on the weights, but not on the bias, takes those directions to zero.

For SGD without momentum, the penalty may be in the loss, in the gradient or in the update. All three give the same
step, and the script raises an error if they differ by more than rounding. Twenty seeds run at once under `jax.vmap`.
The book trains for 100 epochs. With the penalty the test error is still falling by then, so the script trains for 300.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from _common import COLORS, arguments, print_table, save
from tqdm import tqdm

import wdjax

TRAIN, TEST, INPUTS, BATCH_SIZE, EPOCHS, LEARNING_RATE = 20, 100, 200, 5, 100, 0.003
UNTIL_FLAT = 300  # Epochs. The book's are EPOCHS.
PLACES = ("loss", "gradient", "update")
WEIGHTS = wdjax.only("w")


class Problem(NamedTuple):
    """One seed's data, initial parameters and batches.

    Attributes:
        X, y: training examples, of shape (20, 200) and (20,).
        X_test, y_test: test examples, of shape (100, 200) and (100,).
        w0, b0: initial weights, of shape (200,), and bias, a scalar.
        batches: the rows of each batch, of shape (epochs, 4, 5).
    """

    X: jax.Array
    y: jax.Array
    X_test: jax.Array
    y_test: jax.Array
    w0: jax.Array
    b0: jax.Array
    batches: jax.Array


def draw(key: jax.Array, epochs: int = EPOCHS) -> Problem:
    """Draws one seed's problem, with weights from N(0, 1) as in the book and a new order for each epoch."""
    for_x, for_noise, for_weights, for_order = jax.random.split(key, 4)
    X = jax.random.normal(for_x, (TRAIN + TEST, INPUTS))
    y = 0.05 + X @ jnp.full(INPUTS, 0.01) + 0.01 * jax.random.normal(for_noise, (TRAIN + TEST,))
    orders = jax.vmap(lambda key: jax.random.permutation(key, TRAIN))(jax.random.split(for_order, epochs))
    w0 = jax.random.normal(for_weights, (INPUTS,))
    batches = orders.reshape(epochs, -1, BATCH_SIZE)
    return Problem(X[:TRAIN], y[:TRAIN], X[TRAIN:], y[TRAIN:], w0, jnp.zeros_like(w0[0]), batches)


def half_mse(params: Any, X: jax.Array, y: jax.Array) -> jax.Array:
    return 0.5 * jnp.mean((X @ params["w"] + params["b"] - y) ** 2)


def train(
    X: jax.Array,
    y: jax.Array,
    w0: jax.Array,
    b0: jax.Array,
    batches: jax.Array,
    lam: float,
    place: str,
    data_factor: float = 1.0,
) -> dict[str, jax.Array]:
    """Minibatch SGD in the dtype of the data, with the penalty in the "loss", the "gradient" or the "update".

    Args:
        X, y, w0, b0, batches: as in `Problem`.
        lam: the strength: lam / 2 * |w|^2 in the loss.
        place: one of `PLACES`.
        data_factor: multiplies half the mean squared error; 2 for the book's concise version, whose loss has no 1/2.

    Returns:
        "w" and "b" after each epoch, of shape (epochs, 200) and (epochs,).
    """
    optimizer = {
        "loss": optax.sgd(LEARNING_RATE),
        "gradient": wdjax.sgd_l2(LEARNING_RATE, lam, WEIGHTS),
        "update": wdjax.sgdw(LEARNING_RATE, lam, WEIGHTS),
    }[place]

    def loss(params: Any, rows: jax.Array) -> jax.Array:
        data = data_factor * half_mse(params, X[rows], y[rows])
        return data + wdjax.l2_penalty(params, lam, WEIGHTS) if place == "loss" else data

    def step(carry: Any, rows: jax.Array) -> tuple[Any, None]:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, rows), state, params)
        return (optax.apply_updates(params, updates), state), None

    def epoch(carry: Any, rows_of_batches: jax.Array) -> tuple[Any, Any]:
        carry, _ = jax.lax.scan(step, carry, rows_of_batches)
        return carry, carry[0]

    params = {"w": w0, "b": b0}
    return jax.lax.scan(epoch, (params, optimizer.init(params)), batches)[1]


@partial(jax.jit, static_argnames=("lam", "place", "data_factor"))
def train_all(problems: Problem, lam: float, place: str, data_factor: float = 1.0) -> dict[str, jax.Array]:
    """Trains all seeds at once. Every array has a leading axis for the seeds, then one for the epochs.

    Returns:
        "w" and "b" after each epoch, "norm_w", and "train_half_mse" and "test_half_mse" (without the penalty).
    """

    def one(p: Problem) -> dict[str, jax.Array]:
        path = train(p.X, p.y, p.w0, p.b0, p.batches, lam, place, data_factor)
        errors = {
            "train_half_mse": jax.vmap(lambda params: half_mse(params, p.X, p.y))(path),
            "test_half_mse": jax.vmap(lambda params: half_mse(params, p.X_test, p.y_test))(path),
        }
        return path | errors | {"norm_w": jnp.linalg.norm(path["w"], axis=-1)}

    return jax.vmap(one)(problems)


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Trains, checks, prints, draws, and returns the rows of the table."""
    options = arguments(__doc__, __file__, argv)
    seeds = 3 if options.quick else 20
    problems = jax.jit(jax.vmap(partial(draw, epochs=UNTIL_FLAT)))(jax.random.split(jax.random.key(0), seeds))

    runs = [(lam, place) for lam in (0.0, 3.0) for place in PLACES]
    results: dict[tuple[float, str], dict[str, np.ndarray]] = {}
    rows: dict[str, dict[str, float]] = {}
    for lam, place in tqdm(runs, desc=f"{seeds} seeds at once"):
        results[lam, place] = result = jax.device_get(train_all(problems, lam, place))
        # Relative to the largest weight. In float32, each step rounds by a few 1e-7 of it, in varying directions.
        off = max(np.max(np.abs(result[k] - results[lam, "loss"][k])) for k in ("w", "b")) / np.max(np.abs(result["w"]))
        if not off < 2e-5:
            raise AssertionError(f"lambda = {lam}: with the penalty in the {place}, the result differs by {off:.1e}")
        row = {"off": off}
        for name in ("norm_w", "train_half_mse", "test_half_mse"):
            row |= {name: result[name][:, -1].mean(), f"{name} std": result[name][:, -1].std()}
        rows[f"lambda = {lam:.0f}, in the {place}"] = {key: float(value) for key, value in row.items()}

    print(f"\nMean over {seeds} seeds after {UNTIL_FLAT} epochs, and standard deviation. (The picture shows medians.)")
    print("off: the largest difference from the penalty in the loss.")
    print_table(rows, ["norm_w", "norm_w std", "train_half_mse", "test_half_mse", "test_half_mse std", "off"])
    at_book, at_end = (results[3.0, "loss"]["test_half_mse"][:, n - 1].mean() for n in (EPOCHS, UNTIL_FLAT))
    print(f"\nlambda = 3: after the book's {EPOCHS} epochs test_half_mse is {at_book:.2g}; at the end, {at_end:.2g}.")
    draw_curves([results[lam, "loss"] for lam in (0.0, 3.0)], options.out)
    return rows


def draw_curves(results: Sequence[dict[str, np.ndarray]], path: Path) -> None:
    """Draws the median over seeds of the training and test error, without and with the penalty."""
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    epochs = np.arange(1, UNTIL_FLAT + 1)
    ends = {}
    for result, lam, color in zip(results, (0, 3), COLORS[:2], strict=True):
        for data, style in ("test", "-"), ("train", ":"):
            curve = np.median(result[f"{data}_half_mse"], axis=0)
            ends[data, lam] = curve[-1]
            axes.plot(epochs, curve, style, color=color, linewidth=3)
            above, place = (-8, "top") if (data, lam) == ("train", 3) else (9, "bottom")  # Away from other lines.
            label = f"{'new data' if data == 'test' else 'training data'}, λ = {lam}"
            at = {"xytext": (0, above), "textcoords": "offset points", "ha": "right", "va": place}
            axes.annotate(label, (UNTIL_FLAT, curve[-1]), color=color, **at)
    axes.set(yscale="log", ylim=(1e-13, 1e4), xlim=(0, UNTIL_FLAT))
    seeds = len(results[0]["norm_w"])
    axes.set(xlabel="epoch", ylabel=f"half mean squared error\n(median of {seeds} seeds, log scale)")
    without, penalized = (f"{ends['test', lam]:.2g}" for lam in (0, 3))
    message = f"{without} without an L2 penalty, {penalized} with it"
    save(figure, f"{TRAIN} examples, {INPUTS} inputs. The median error on new data:\n{message}", path)


if __name__ == "__main__":
    main()
