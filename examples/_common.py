"""What the examples share: the command line, the digits, the norms by group, tables, and the report on wrong labels."""

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
GROUPS = wdjax.by_path({"kernel": "kernels", "bias": "biases"})


class Digits(NamedTuple):
    """8x8 scans of handwritten digits as rows of 64 pixels in [0, 1], and which digit each one is."""

    train_images: jax.Array
    train_labels: jax.Array
    test_images: jax.Array
    test_labels: jax.Array


class Errors(NamedTuple):
    """The share of digits taken for another one, in percent, after some of the steps."""

    steps: np.ndarray  # (measured,)
    train: np.ndarray  # (seeds, measured), by the labels as they are given, right or wrong.
    test: np.ndarray  # (seeds, measured)

    @property
    def last_train(self) -> float:
        return float(self.train[:, -1].mean())

    @property
    def last_test(self) -> float:
        return float(self.test[:, -1].mean())


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


def with_wrong_labels(data: Digits, share: float) -> Digits:
    """The same digits, this share of the training labels wrong: one of the other nine. The test labels stay right."""
    rng = np.random.default_rng(0)
    labels = np.array(data.train_labels)
    wrong = rng.permutation(len(labels))[: round(share * len(labels))]
    labels[wrong] = (labels[wrong] + rng.integers(1, 10, len(wrong))) % 10
    return data._replace(train_labels=jnp.asarray(labels))


def shuffled_batches(size: int, batch_size: int, epochs: int) -> np.ndarray:
    """The rows of each batch, one batch a line: each epoch goes through all rows once in an order of its own."""
    rng = np.random.default_rng(0)
    return np.concatenate([rng.permutation(size).reshape(-1, batch_size) for _ in range(epochs)])


def group_norms(params: Any) -> dict[str, jax.Array]:
    """The Euclidean norm of all kernels and of all biases."""
    squares: dict[str, jax.Array] = {}
    for group, leaf in zip(jax.tree.leaves(GROUPS.values(params)), jax.tree.leaves(params), strict=True):
        squares[group] = squares.get(group, jnp.zeros(())) + jnp.sum(leaf**2)
    return {group: jnp.sqrt(square) for group, square in squares.items()}


def print_table(rows: Mapping[str, Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Prints some columns of the rows, numbers to four significant digits."""
    left = max(map(len, rows))
    print("\n" + " " * left + "".join(f"{column:>19}" for column in columns))
    for name, row in rows.items():
        print(f"{name:{left}}" + "".join(f"{row[column]:>#19.4g}" for column in columns))


def report_errors(runs: Mapping[str, Mapping[float, Errors]], wrong: float, path: Path) -> dict[str, dict[str, float]]:
    """Prints the table and what it says, draws it, and returns its rows.

    Args:
        runs: the errors of all seeds, by method and strength. The strength 0 stands for no decay.
        wrong: the share of wrong training labels.
        path: the picture.
    """
    rows: dict[str, dict[str, float]] = {}
    for method, tried in runs.items():
        for strength, errors in tried.items():
            test, train = errors.test[:, -1], errors.train[:, -1]
            row = {"test error %": test.mean(), "best seed": test.min(), "worst seed": test.max()}
            row["train error %"] = train.mean()
            name = f"{method}, lambda = {strength:g}" if strength else method
            rows[name] = {key: float(value) for key, value in row.items()}
    print_table(rows, list(rows["no decay"]))

    none, l2, decoupled = (best_strength(tried) for tried in runs.values())
    print(
        f"\n{100 * wrong:g} % of the training labels are wrong. Test error, mean of {len(none[1].test)} seeds:"
        f"\n- without decay: {none[1].last_test:.1f} %;"
        f"\n- with L2 in Adam: {l2[1].last_test:.1f} % at the best lambda, {l2[0]:g};"
        f"\n- with decoupled decay: {decoupled[1].last_test:.1f} % at the best lambda, {decoupled[0]:g}."
        f"\nThe best lambdas differ by a factor of {decoupled[0] / l2[0]:.0f}, because their units differ."
        f"\nTraining error, by the labels as given: {none[1].last_train:.1f} % without decay,"
        f" {decoupled[1].last_train:.1f} % with decoupled decay."
    )
    draw_errors(runs, wrong, path)
    return rows


def best_strength(tried: Mapping[float, Errors]) -> tuple[float, Errors]:
    """The strength of the lowest mean test error at the end, and its errors."""
    return min(tried.items(), key=lambda item: item[1].last_test)


def draw_errors(runs: Mapping[str, Mapping[float, Errors]], wrong: float, path: Path) -> None:
    """Draws the test error over the strengths, and the errors over the steps without decay and with the best one."""
    (_, none), _, (decoupled, chosen) = (best_strength(tried) for tried in runs.values())
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.8, 4.8), layout="constrained")
    left.axhspan(none.test[:, -1].min(), none.test[:, -1].max(), color=COLORS[0], alpha=0.15, linewidth=0)
    left.axhline(none.last_test, color=COLORS[0], linestyle="--", linewidth=2)
    left.annotate(  # At the left edge, above the band.
        f"no decay: {none.last_test:.1f} %",
        (0.02, none.test[:, -1].max()),
        (0, 4),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
    )
    for method, color in zip(("L2 in Adam", "decoupled decay"), COLORS[1:3], strict=True):
        last = np.stack([errors.test[:, -1] for errors in runs[method].values()])
        left.fill_between(list(runs[method]), last.min(1), last.max(1), color=color, alpha=0.25, linewidth=0)
        left.semilogx(list(runs[method]), last.mean(1), "o-", color=color, linewidth=2)
        strength, errors = best_strength(runs[method])
        text = f"{method}:\n{errors.last_test:.1f} % at {strength:g}"
        left.annotate(
            text, (strength, errors.last_test), (0, -10), textcoords="offset points", ha="center", va="top", color=color
        )
    left.set(title=f"After training (mean and range of {len(none.test)} seeds)", ylabel="test error in %")
    left.set(xlabel="lambda (log scale; each method has its own unit)")

    for name, errors, color in (("no decay", none, COLORS[0]), ("decoupled decay", chosen, COLORS[2])):
        for kind, curves, line in (("test", errors.test, "-"), ("training", errors.train, ":")):
            right.fill_between(errors.steps, curves.min(0), curves.max(0), color=color, alpha=0.2, linewidth=0)
            right.plot(errors.steps, curves.mean(0), line, color=color, linewidth=2)
            place, text = (errors.steps[-1], curves[:, -1].mean()), f"{kind}, {name}"
            right.annotate(text, place, (5, 0), textcoords="offset points", va="center", color=color)
    right.set(title=f"During training (decoupled decay: lambda = {decoupled:g})")
    right.set(xlabel="step", xlim=(0, none.steps[-1]))
    right.set(ylabel="error in % (training: by the labels as given)")
    top = 1.05 * max(errors.test[:, -1].max() for tried in runs.values() for errors in tried.values())
    for axes in (left, right):
        axes.set_ylim(0, top)
    message = f"{100 * wrong:g} % wrong labels: test error {none.last_test:.0f} % without weight decay"
    save(figure, f"{message}, {chosen.last_test:.0f} % with it", path)


def save(figure: Any, title: str, path: Path) -> None:
    """Writes the picture under its one message, and says where."""
    figure.suptitle(title, fontsize=13, fontweight="bold")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"\nPicture: {path}")
