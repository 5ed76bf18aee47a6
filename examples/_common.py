"""What the examples share: the command line, the digits, the norms by group, tables and the picture of a comparison."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from sklearn.datasets import load_digits

import wdjax

matplotlib.use("Agg")  # Draws into files: works without a screen.
import matplotlib.pyplot as plt

# Black, blue, vermilion and green of Okabe and Ito, which a colour-blind reader can tell apart.
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73")
plt.rcParams.update(
    {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
)

# The label of each parameter. Linen and NNX name the parts of their layers alike, so one table serves both.
GROUPS = wdjax.by_path({"kernel": "kernels", "bias": "biases", "scale": "norm scales"})


class Digits(NamedTuple):
    """8x8 scans of handwritten digits as rows of 64 pixels in [0, 1], and which digit each one is."""

    train_images: jax.Array
    train_labels: jax.Array
    test_images: jax.Array
    test_labels: jax.Array


def arguments(description: str | None, script: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads `--quick` and `--out`, and makes the folder of the picture."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short run that only shows that everything works")
    parser.add_argument("--out", type=Path, default=Path("out") / f"{Path(script).stem}.png", help="the picture")
    options = parser.parse_args(argv)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    return options


def digits(train_size: int = 300) -> Digits:
    """scikit-learn's 1,797 digits, split once and for all: few to train on, so that a network learns them by heart."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x, y = jnp.asarray(images[order] / 16, jnp.float32), jnp.asarray(labels[order], jnp.int32)
    return Digits(x[:train_size], y[:train_size], x[train_size:], y[train_size:])


def shuffled_batches(size: int, batch_size: int, epochs: int) -> np.ndarray:
    """The rows of each batch, one batch a line: each epoch goes through all rows once in an order of its own."""
    rng = np.random.default_rng(0)
    return np.concatenate([rng.permutation(size).reshape(-1, batch_size) for _ in range(epochs)])


def group_norms(params: Any) -> dict[str, jax.Array]:
    """The Euclidean norm of all kernels, of all biases and of all norm scales."""
    squares: dict[str, jax.Array] = {}
    for group, leaf in zip(jax.tree.leaves(GROUPS.values(params)), jax.tree.leaves(params), strict=True):
        squares[group] = squares.get(group, jnp.zeros(())) + jnp.sum(leaf**2)
    return {group: jnp.sqrt(square) for group, square in squares.items()}


@jax.jit
def measures_of_weights(params: Any, start: Any) -> dict[str, jax.Array]:
    """For each group its norm, and how far it is from where it started."""
    norms = {f"|{group}|": norm for group, norm in group_norms(params).items()}
    moved = group_norms(jax.tree.map(jnp.subtract, params, start))
    return norms | {f"{group} moved": distance for group, distance in moved.items()}


def print_table(rows: Mapping[str, Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Prints some columns of the rows, numbers to four significant digits."""
    left = max(map(len, rows))
    print("\n" + " " * left + "".join(f"{column:>19}" for column in columns))
    for name, row in rows.items():
        print(f"{name:{left}}" + "".join(f"{row[column]:>#19.4g}" for column in columns))


def print_comparison(rows: Mapping[str, Mapping[str, float]]) -> None:
    """Prints the accuracies and losses, then the weights, of a comparison on the digits."""
    print_table(rows, ["train acc", "test acc", "train loss", "test loss"])
    print_table(rows, ["|kernels|", "kernels moved", "|biases|", "biases moved", "|norm scales|", "norm scales moved"])


def draw_comparison(histories: Mapping[str, Sequence[Mapping[str, float]]], title: str, path: Path) -> None:
    """Draws loss, test accuracy and the norm of the kernels over the steps, one color for each run."""
    figure, (losses, accuracy, kernels) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for color, (name, history) in zip(COLORS, histories.items(), strict=True):
        curves = {key: [row[key] for row in history] for key in history[0]}
        losses.semilogy(curves["step"], curves["test loss"], color=color, label=name)
        losses.semilogy(curves["step"], curves["train loss"], color=color, linestyle=":")
        accuracy.plot(curves["step"], curves["test acc"], color=color, label=name)
        kernels.plot(curves["step"], curves["|kernels|"], color=color, label=name)
    losses.set(title="Cross-entropy (solid: test, dotted: train)", xlabel="step", ylabel="mean loss (log scale)")
    accuracy.set(title="Test accuracy", xlabel="step", ylabel="share of test images (axis from 0.8)", ylim=(0.8, 1))
    kernels.set(title="Norm of all kernels", xlabel="step", ylabel="Euclidean norm")
    kernels.set_ylim(bottom=0)
    for axes, place in (losses, "center right"), (accuracy, "lower right"), (kernels, "lower left"):
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, loc=place)
    save(figure, title, path)


def save(figure: Any, title: str, path: Path) -> None:
    """Writes the picture under its one message, and says where."""
    figure.suptitle(title, fontsize=13, fontweight="bold")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"\nPicture: {path}")
