"""Which weight decay is best, and does it matter? d2l.ai's exercises 1 and 2 of the chapter "Weight Decay".

    python examples/sweep_weight_decay.py

The problem is the book's: 20 examples with 200 inputs, and 100 epochs (see high_dimensional_regression.py).
`wdjax.sweep` trains it for many strengths and seeds with one compilation. Each seed draws its own data, so the
uncertainty includes the data.

1. How do the losses depend on the strength? The picture shows it. The training loss only grows. The validation loss
   falls by a factor of thousands and then stays flat: there the weights are almost zero, and the prediction is almost
   constant. After 100 epochs λ = 3 has not converged, so part of its error is training time.
2. Is the strength that the validation data choose really the optimal one? It is one of several that they cannot tell
   apart (the shaded band; see `wdjax.sweeps.Best`). Does it matter? A thousand fresh examples for each seed measure
   what each choice costs. One row of the last table is what people do in practice: each seed chooses by its own hundred
   validation examples.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from _common import COLORS, arguments, print_table, save
from high_dimensional_regression import INPUTS, draw, half_mse
from high_dimensional_regression import train as train_regression
from tqdm import tqdm

import wdjax

BOOK = 3.0


def train(key: jax.Array, weight_decay: Any) -> dict[str, jax.Array]:
    """Draws a problem, trains on it, and measures on training, validation and fresh data."""
    for_problem, for_x, for_noise = jax.random.split(key, 3)
    problem = draw(for_problem)
    path = train_regression(problem.X, problem.y, problem.w0, problem.b0, problem.batches, weight_decay, "update")
    params = jax.tree.map(lambda leaf: leaf[-1], path)

    X = jax.random.normal(for_x, (1000, INPUTS))
    y = 0.05 + X @ jnp.full(INPUTS, 0.01) + 0.01 * jax.random.normal(for_noise, (1000,))
    return {
        "training": half_mse(params, problem.X, problem.y),
        "validation": half_mse(params, problem.X_test, problem.y_test),
        "fresh": half_mse(params, X, y),
        "norm": jnp.linalg.norm(params["w"]),
    }


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Sweeps, prints, draws, and returns the rows of the last table."""
    options = arguments(__doc__, __file__, argv)
    decays = np.sort([BOOK, *np.geomspace(0.1, 300, 6 if options.quick else 25)])
    seeds = 4 if options.quick else 20

    # Small programs gain from running a few at a time, also on a CPU.
    found = wdjax.sweep(train, weight_decay=decays, seeds=seeds, chunk=4, progress=tqdm)
    best = found.best("validation")
    print("\n" + found.table("validation") + f"\n\n{best}")

    validation, fresh = found.results["validation"], found.results["fresh"]
    low, high = best.interval["weight_decay"]
    among = fresh[best.alike]
    choices = {
        "the book's 3": fresh[decays == BOOK][0],
        "best on validation data, all seeds": fresh[best.index],
        "worst strength in the shaded band": among[among.mean(axis=1).argmax()],
        "each seed's own choice": fresh[validation.argmin(axis=0), np.arange(seeds)],
        "best on the fresh data": fresh[fresh.mean(axis=1).argmin()],
    }
    rows = {
        name: {"fresh": float(loss.mean()), "std. error": float(loss.std(ddof=1) / seeds**0.5)}
        for name, loss in choices.items()
    }
    print_table(rows, ["fresh", "std. error"])
    own = decays[validation.argmin(axis=0)]
    print(f"\nChosen by single seeds: from {own.min():.3g} to {own.max():.3g}.")
    print(f"All seeds together leave {low:.3g} to {high:.3g} open.")

    draw_sweep(found, best, options.out)
    return rows


def draw_sweep(found: wdjax.sweeps.Sweep, best: wdjax.sweeps.Best, path: Path) -> None:
    """Draws the losses over the strength, as means of the seeds, and shades the strengths that may be the best."""
    decays, seeds = found.values["weight_decay"], len(found.seeds)
    low, high = best.interval["weight_decay"]
    validation = found.results["validation"].mean(axis=1)
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    axes.axvspan(low, high, color=COLORS[3], alpha=0.15, linewidth=0)
    shaded = f"may be the best:\n{low:.2g} to {high:.3g}"
    axes.annotate(shaded, ((low * high) ** 0.5, validation[0]), color=COLORS[3], ha="center", va="top")
    for name, color, above in ("training", COLORS[1], 38), ("validation", COLORS[2], -30):
        loss = found.results[name].mean(axis=1)
        axes.plot(decays, loss, color=color, linewidth=3)
        axes.annotate(f"{name} data", (decays[0], loss[0]), (0, above), textcoords="offset points", color=color)
    at_book = validation[decays == BOOK][0]
    axes.plot(BOOK, at_book, "o", color=COLORS[0], markersize=8)
    axes.annotate("the book's 3", (BOOK, at_book), (10, 2), textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlabel="weight decay (log scale)")
    axes.set(ylabel=f"half mean squared error\n(mean of {seeds} seeds, log scale)")
    axes.xaxis.set_major_formatter("{x:g}")
    ratio = at_book / validation.min()
    alike = f"Validation data cannot tell weight decays of {low:.2g} to {high:.3g} apart"
    save(figure, f"{alike}.\nWith the book's 3 the error is {ratio:.1f} times the lowest", path)


if __name__ == "__main__":
    main()
