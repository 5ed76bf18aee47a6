"""d2l.ai's weight decay (chapter "Weight Decay"): 200 inputs, 20 examples, and the penalty in three places.

    python examples/high_dimensional_regression.py

The data are y = 0.05 + sum of 0.01 x_i + noise of 0.01. With twenty examples for 201 parameters, least squares fits
the training set perfectly and learns next to nothing: in the 180 directions that no example shows, the weights stay
where they were drawn, so that with initial weights of N(0, 1) their norm ends near sqrt(180) = 13.4. An L2 penalty of
strength 3 on the weights, not on the bias, takes those directions to zero.

For SGD the penalty may stand in the loss, in the gradient or in the update: the three are the same step, and the
script raises if they differ by more than rounding. Twenty seeds run at once under `jax.vmap`.
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


def draw(key: jax.Array) -> Problem:
    """Draws one seed's problem, with weights from N(0, 1) as in the book and each epoch in an order of its own."""
    for_x, for_noise, for_weights, for_order = jax.random.split(key, 4)
    X = jax.random.normal(for_x, (TRAIN + TEST, INPUTS))
    y = 0.05 + X @ jnp.full(INPUTS, 0.01) + 0.01 * jax.random.normal(for_noise, (TRAIN + TEST,))
    orders = jax.vmap(lambda key: jax.random.permutation(key, TRAIN))(jax.random.split(for_order, EPOCHS))
    w0 = jax.random.normal(for_weights, (INPUTS,))
    batches = orders.reshape(EPOCHS, -1, BATCH_SIZE)
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
    """Minibatch SGD with the penalty in the "loss", the "gradient" or the "update"; in the dtype of the data.

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
    """Trains all seeds at once; every array gets a leading axis of seeds, then epochs.

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
    problems = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), seeds))

    runs = [(lam, place) for lam in (0.0, 3.0) for place in PLACES]
    results: dict[tuple[float, str], dict[str, np.ndarray]] = {}
    rows: dict[str, dict[str, float]] = {}
    for lam, place in tqdm(runs, desc=f"{seeds} seeds at once"):
        results[lam, place] = result = jax.device_get(train_all(problems, lam, place))
        # Of the largest weight. A step rounds by a few 1e-7 of it in float32; 400 of them hardly err the same way.
        off = max(np.max(np.abs(result[k] - results[lam, "loss"][k])) for k in ("w", "b")) / np.max(np.abs(result["w"]))
        if not off < 2e-5:
            raise AssertionError(f"lambda = {lam}: in the {place} the result is another one, by {off:.1e}")
        row = {"off": off}
        for name in ("norm_w", "train_half_mse", "test_half_mse"):
            row |= {name: result[name][:, -1].mean(), f"{name} std": result[name][:, -1].std()}
        rows[f"lambda = {lam:.0f}, in the {place}"] = {key: float(value) for key, value in row.items()}

    print(f"\nMean over {seeds} seeds and standard deviation; off: largest difference to the penalty in the loss.")
    print_table(rows, ["norm_w", "norm_w std", "train_half_mse", "test_half_mse", "test_half_mse std", "off"])
    draw_curves([results[lam, "loss"] for lam in (0.0, 3.0)], options.out)
    return rows


def draw_curves(results: Sequence[dict[str, np.ndarray]], path: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for axes, result, lam in zip(panels, results, (0, 3), strict=True):
        epochs = np.arange(1, EPOCHS + 1)
        for name, color in ("train", COLORS[1]), ("test", COLORS[2]):
            curves = result[f"{name}_half_mse"]
            axes.semilogy(epochs, curves.T, color=color, linewidth=0.5, alpha=0.4)
            axes.semilogy(epochs, np.median(curves, axis=0), color=color, linewidth=2.5, label=f"{name} (median)")
        norm = result["norm_w"][:, -1].mean()
        axes.set(
            title=f"lambda = {lam}: |w| ends at {norm:.2f}", xlabel="epoch", ylabel="half mean squared error (log)"
        )
        axes.grid(alpha=0.25)
        axes.legend(title=f"{len(curves)} seeds, thin")
    save(figure, "20 examples, 200 inputs, without and with an L2 penalty", path)


if __name__ == "__main__":
    main()
