"""Which weight decay is best, and does it matter? d2l.ai's exercises 1 and 2 of the chapter "Weight Decay".

    python examples/sweep_weight_decay.py

The problem is the book's, 20 examples with 200 inputs (see high_dimensional_regression.py). `wdjax.sweep` trains it for
many strengths and seeds with one compilation; each seed draws data of its own, so what is uncertain includes the data.

1. The losses against the strength. The training loss only grows. The validation loss falls by a factor of thousands,
   and is flat from there on: where the weights are gone, the prediction is a constant.
2. Is the strength that validation data choose really the optimal one? It is one of several that they cannot tell
   apart (the shaded band; see `wdjax.Best`). Does it matter? Fresh data, a thousand for each seed, say what each choice
   costs, also the one where each seed chooses by its own hundred validation examples, as one does in practice.
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
        "train": half_mse(params, problem.X, problem.y),
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
        "the worst that may be the best": among[among.mean(axis=1).argmax()],
        "each seed's own choice": fresh[validation.argmin(axis=0), np.arange(seeds)],
        "best on the fresh data": fresh[fresh.mean(axis=1).argmin()],
    }
    rows = {
        name: {"fresh": float(loss.mean()), "std. error": float(loss.std(ddof=1) / seeds**0.5)}
        for name, loss in choices.items()
    }
    print_table(rows, ["fresh", "std. error"])
    own = decays[validation.argmin(axis=0)]
    print(f"\nChosen by single seeds: from {own.min():.3g} to {own.max():.3g}. By all: {low:.3g} to {high:.3g}.")

    draw_sweep(found, best, options.out)
    return rows


def draw_sweep(found: wdjax.Sweep, best: wdjax.Best, path: Path) -> None:
    """Mean over seeds, and the seeds' quartiles as a band; on the right the flat part, enlarged."""
    decays, results = found.values["weight_decay"], found.results
    chosen = best.values["weight_decay"]
    figure, (whole, detail) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    series: dict[str, Any] = dict(zip(("train", "validation", "fresh"), (COLORS[1], COLORS[2], COLORS[0]), strict=True))
    for axes in (whole, detail):
        for name, color in series.items():
            if axes is whole or name != "train":
                axes.fill_between(decays, *np.quantile(results[name], [0.25, 0.75], axis=1), color=color, alpha=0.15)
                style = "--" if name == "fresh" else "-"
                axes.plot(decays, results[name].mean(axis=1), style, color=color, marker=".", label=name)
        axes.axvspan(*best.interval["weight_decay"], color=COLORS[2], alpha=0.1, label="may be the best")
        axes.axvline(chosen, color=COLORS[2], linewidth=1, label=f"best on validation data: {chosen:.3g}")
        axes.axvline(BOOK, color=COLORS[0], linewidth=1, linestyle=":", label="the book's 3")
        axes.set(xscale="log", xlabel="weight decay (log scale)", ylabel="half mean squared error")
        axes.grid(alpha=0.25)
    whole.set(yscale="log", title="All strengths (log scale)", ylabel="half mean squared error (log scale)")
    least = results["validation"].mean(axis=1).min()
    flat = decays[results["validation"].mean(axis=1) < 3 * least]
    detail.set(title="Where it is flat", xlim=(flat.min(), decays.max()), ylim=(0, 2.5 * least))
    whole.legend(fontsize=8, loc="lower right")
    seeds = len(found.seeds)
    save(figure, f"20 examples, 200 inputs: mean of {seeds} seeds, and their quartiles as bands", path)


if __name__ == "__main__":
    main()
