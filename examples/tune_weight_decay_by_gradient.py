"""Weight decay tuned by gradient: the derivative of the validation loss through all steps of training.

    python examples/tune_weight_decay_by_gradient.py

The rates of wdjax may be traced, so the loss on validation data after training is a differentiable function of them.
Here a small network learns 100 digits by SGD with momentum and L2 in the gradient. The loss is the mean over several
seeds. Each step moves the logarithm of the strength against the sign of the derivative. One run starts far too strong,
and one far too weak. The picture shows both runs. The script also sweeps the strength over a grid of 16.

Two checks raise an error if they fail. The derivative at a strength of 0.01 must equal the difference quotient to 1 %.
The runs from 0.1 and from 0.0001 must end at a strength that may be the best by the sweep.

Then each layer gets its own strength: a `by_path` table of traced numbers. Nothing checks this run. A grid would need
16 × 16 trainings. Data that neither the training nor the tuning has seen measure the benefit.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from _common import COLORS, arguments, digits, print_table, save
from tqdm import tqdm

import wdjax

DATA = digits(train_size=100)
VALIDATION = 400
HIDDEN, BATCH_SIZE, STEPS, LEARNING_RATE = 32, 20, 300, 0.05


def loss_of(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    hidden = jax.nn.gelu(images @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    logits = hidden @ params["head"]["kernel"] + params["head"]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train(key: jax.Array, hidden: jax.Array, head: jax.Array) -> dict[str, jax.Array]:
    """Trains with a strength for each layer. Returns the losses on training, validation and fresh data."""
    for_hidden, for_head, for_rows = jax.random.split(key, 3)
    params = {
        "hidden": {"kernel": jax.random.normal(for_hidden, (64, HIDDEN)) / 64**0.5, "bias": jnp.zeros(HIDDEN)},
        "head": {"kernel": jax.random.normal(for_head, (HIDDEN, 10)) / HIDDEN**0.5, "bias": jnp.zeros(10)},
    }
    strengths = wdjax.by_path({"hidden/kernel": hidden, "head/kernel": head}, default=0.0)
    optimizer = wdjax.sgd_l2(LEARNING_RATE, strengths, momentum=0.9)

    def step(carry: Any, rows: jax.Array) -> tuple[Any, None]:
        params, state = carry
        grads = jax.grad(loss_of)(params, DATA.train_images[rows], DATA.train_labels[rows])
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    rows = jax.random.randint(for_rows, (STEPS, BATCH_SIZE), 0, len(DATA.train_labels))
    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), rows)
    return {
        "train": loss_of(params, DATA.train_images, DATA.train_labels),
        "validation": loss_of(params, DATA.test_images[:VALIDATION], DATA.test_labels[:VALIDATION]),
        "fresh": loss_of(params, DATA.test_images[VALIDATION:], DATA.test_labels[VALIDATION:]),
    }


@partial(jax.jit, static_argnames="seeds")
def hypergradient(logs: jax.Array, seeds: int) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The gradient of the seeds' mean validation loss in the logarithms of both strengths, and all mean losses.

    Forward mode carries the derivatives along with the training and stores no step, so its memory does not grow with
    the number of steps. Its time grows with the number of strengths, which is two.
    """

    def mean_losses(logs: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        hidden, head = jnp.exp(logs)
        keys = jax.vmap(jax.random.key)(jnp.arange(seeds, dtype=jnp.uint32))
        losses = jax.vmap(lambda key: train(key, hidden, head))(keys)
        losses = {name: loss.mean() for name, loss in losses.items()}
        return losses["validation"], losses

    return jax.jacfwd(mean_losses, has_aux=True)(logs)


def tune(start: Sequence[float], shared: bool, rounds: int, seeds: int) -> tuple[np.ndarray, Any]:
    """Steps on the logarithms. Returns the strengths of each round, of shape (rounds + 1, 2), and the final losses.

    The steps use only the sign of the slope, which is a hundred times steeper at too large a strength than near the
    minimum.
    """
    logs: Any = jnp.log(jnp.array(start))
    optimizer = optax.sign_sgd(optax.cosine_decay_schedule(20 / rounds, rounds))  # All steps together: exp(10).
    state, history = optimizer.init(logs), [logs]
    for _ in tqdm(range(rounds), desc=f"from {start[0]:g}"):
        slope, _ = hypergradient(logs, seeds)
        # One strength for both layers moves by the sum of their slopes.
        updates, state = optimizer.update(jnp.full(2, slope.sum()) if shared else slope, state)
        logs = optax.apply_updates(logs, updates)
        history.append(logs)
    return np.exp(history), hypergradient(logs, seeds)[1]


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Sweeps, tunes, checks, prints, draws, and returns the rows of the table."""
    options = arguments(__doc__, __file__, argv)
    seeds, rounds = (3, 16) if options.quick else (8, 40)
    both = lambda key, weight_decay: train(key, weight_decay, weight_decay)  # noqa: E731
    decays = np.geomspace(1e-4, 1e-1, 7 if options.quick else 16)
    found = wdjax.sweep(both, weight_decay=decays, seeds=seeds, chunk=4, progress=tqdm)
    best = found.best("validation")
    print(f"\nSweep: {best}")

    at, h = jnp.log(jnp.array([0.01, 0.01])), 0.02
    up, down = (hypergradient(at + d, seeds)[1]["validation"] for d in (h, -h))
    slope = hypergradient(at, seeds)[0].sum()
    if not abs(slope - (up - down) / (2 * h)) < 0.01 * abs(slope):  # Its errors: h^2 and float32.
        raise AssertionError(f"the derivative is {slope}, and the difference quotient {(up - down) / (2 * h)}")

    row = {name: float(loss[best.index].mean()) for name, loss in found.results.items()}
    rows = {"sweep": {"hidden": best.values["weight_decay"], "head": best.values["weight_decay"]} | row}
    paths = {}
    runs = {"from 0.1": (0.1, True), "from 0.0001": (0.0001, True), "each layer its own": (0.01, False)}
    for name, (start, shared) in runs.items():
        paths[name], losses = tune([start, start], shared, rounds, seeds)
        rows[name] = {"hidden": paths[name][-1, 0], "head": paths[name][-1, 1]} | jax.device_get(losses)
    rows = {name: {column: float(value) for column, value in row.items()} for name, row in rows.items()}
    print_table(rows, ["hidden", "head", "train", "validation", "fresh"])

    low, high = best.interval["weight_decay"]
    for name in ("from 0.1", "from 0.0001"):
        if not low <= rows[name]["hidden"] <= high:
            raise AssertionError(f"the run started {name} ended at {rows[name]['hidden']}, outside {low} to {high}")
    draw(best, paths, seeds, options.out)
    return rows


def draw(best: wdjax.sweeps.Best, paths: dict[str, np.ndarray], seeds: int, out: Path) -> None:
    """Draws the strength that both layers share, from both starts, and the strengths that the sweep leaves open."""
    low, high = best.interval["weight_decay"]
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    axes.axhspan(low, high, color=COLORS[3], alpha=0.15, linewidth=0)
    ends = []
    for name, color in ("from 0.1", COLORS[2]), ("from 0.0001", COLORS[1]):
        path = paths[name][:, 0]
        ends.append(f"{path[-1]:.2g}")
        axes.plot(path, color=color, linewidth=3)
        axes.annotate(f"starts {name}", (0, path[0]), (12, 0), textcoords="offset points", color=color, va="center")
    look: Any = {"color": COLORS[3], "ha": "right", "va": "top"}
    label = "range that the sweep leaves open"
    axes.annotate(label, (0.98, high), (0, -4), ("axes fraction", "data"), "offset points", **look)
    axes.set(yscale="log", xlabel="tuning step", ylabel="L2 strength (log scale)")
    axes.set(xlim=(0, None))
    sweep = f"the best of a sweep is {best.values['weight_decay']:.2g}"
    save(figure, f"The gradient finds the L2 strength from both ends:\n{ends[0]} and {ends[1]}; {sweep}", out)


if __name__ == "__main__":
    main()
