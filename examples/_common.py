"""Code that the examples share: the command line, the digits, norms by group, tables, the report on wrong labels."""

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

matplotlib.use("Agg")  # Draws into files, so it works without a screen.
import matplotlib.pyplot as plt

# Black, blue, vermilion and green of Okabe and Ito, which a color-blind reader can tell apart.
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73")
# Each method has the same color in every picture.
METHOD_COLORS = {"no decay": COLORS[0], "L2 in Adam": COLORS[1], "decoupled decay": COLORS[2]}
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
    """The percentage of misclassified digits after some of the steps."""

    steps: np.ndarray  # (measured,)
    train: np.ndarray  # (seeds, measured), by the labels as given, right or wrong.
    test: np.ndarray  # (seeds, measured)

    @property
    def last_train(self) -> float:
        return float(self.train[:, -1].mean())

    @property
    def last_test(self) -> float:
        return float(self.test[:, -1].mean())


def arguments(description: str | None, script: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads `--quick` and `--out`, and creates the folder for the picture."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short run that only shows that everything works")
    parser.add_argument("--out", type=Path, default=Path("out") / f"{Path(script).stem}.png", help="the picture")
    options = parser.parse_args(argv)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    return options


def digits(train_size: int = 300) -> Digits:
    """scikit-learn's 1,797 digits, split once and for all: few to train on, so that a network memorizes them."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x, y = jnp.asarray(images[order] / 16, jnp.float32), jnp.asarray(labels[order], jnp.int32)
    return Digits(x[:train_size], y[:train_size], x[train_size:], y[train_size:])


def with_wrong_labels(data: Digits, share: float) -> Digits:
    """The same digits, with this share of training labels changed to one of the other nine. Test labels stay right."""
    rng = np.random.default_rng(0)
    labels = np.array(data.train_labels)
    wrong = rng.permutation(len(labels))[: round(share * len(labels))]
    labels[wrong] = (labels[wrong] + rng.integers(1, 10, len(wrong))) % 10
    return data._replace(train_labels=jnp.asarray(labels))


def shuffled_batches(size: int, batch_size: int, epochs: int) -> np.ndarray:
    """The rows of each batch, one batch per line. Each epoch goes through all rows once, in its own order."""
    rng = np.random.default_rng(0)
    return np.concatenate([rng.permutation(size).reshape(-1, batch_size) for _ in range(epochs)])


def group_norms(params: Any) -> dict[str, jax.Array]:
    """The Euclidean norm of all kernels and of all biases."""
    squares: dict[str, jax.Array] = {}
    for group, leaf in zip(jax.tree.leaves(GROUPS.values(params)), jax.tree.leaves(params), strict=True):
        squares[group] = squares.get(group, jnp.zeros(())) + jnp.sum(leaf**2)
    return {group: jnp.sqrt(square) for group, square in squares.items()}


def print_plan(params: Any, weight_decay: float) -> None:
    """Prints which parameters decay with `weights_only`, before anything is trained."""
    print(f"Parameters that decay (shown for decoupled decay with strength {weight_decay:g}):\n")
    print(wdjax.plan(params, weight_decay, wdjax.weights_only()), end="\n\n")


def print_table(rows: Mapping[str, Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Prints some columns of the rows, numbers to four significant digits."""
    left = max(map(len, rows))
    print("\n" + " " * left + "".join(f"{column:>19}" for column in columns))
    for name, row in rows.items():
        print(f"{name:{left}}" + "".join(f"{row[column]:>#19.4g}" for column in columns))


def report_errors(
    runs: Mapping[str, Mapping[float, Errors]], wrong: float, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Prints the table and what it says, draws it, and returns its rows.

    Args:
        runs: the errors of all seeds, by method and strength. The strength 0 stands for no decay.
        wrong: the share of wrong training labels.
        options: what `arguments` returned.
    """
    rows: dict[str, dict[str, float]] = {}
    for method, tried in runs.items():
        for strength, errors in tried.items():
            test, train = errors.test[:, -1], errors.train[:, -1]
            row = {"test error %": test.mean(), "lowest seed %": test.min(), "highest seed %": test.max()}
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
        f"\nThe best lambda of decoupled decay is {decoupled[0] / l2[0]:.3g} times that of L2. Their units differ."
        f"\nTraining error, by the labels as given: {none[1].last_train:.1f} % without decay,"
        f" {decoupled[1].last_train:.1f} % with decoupled decay."
    )
    if options.quick:
        print("This --quick run is too short to learn the wrong labels. Its numbers say nothing about decay.")
    draw_errors(runs, wrong, options)
    return rows


def best_strength(tried: Mapping[float, Errors]) -> tuple[float, Errors]:
    """The strength of the lowest mean test error at the end, and its errors."""
    return min(tried.items(), key=lambda item: item[1].last_test)


def draw_errors(runs: Mapping[str, Mapping[float, Errors]], wrong: float, options: argparse.Namespace) -> None:
    """Draws the test error over the strengths, and the errors over the steps without decay and with the best one."""
    (_, none), _, (decoupled, chosen) = (best_strength(tried) for tried in runs.values())
    # The README shows it 800 pixels wide, so the letters are large.
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 5.6), layout="constrained")
    look: Any = {"textcoords": "offset points", "fontsize": 14}
    black = METHOD_COLORS["no decay"]
    left.axhspan(none.test[:, -1].min(), none.test[:, -1].max(), color=black, alpha=0.15, linewidth=0)
    left.axhline(none.last_test, color=black, linewidth=2.5)
    at_left_edge = {"xycoords": ("axes fraction", "data"), "va": "bottom"}
    left.annotate(f"no decay: {none.last_test:.1f} %", (0.02, none.test[:, -1].max()), (0, 3), **at_left_edge, **look)
    for method in ("L2 in Adam", "decoupled decay"):
        color = METHOD_COLORS[method]
        last = np.stack([errors.test[:, -1] for errors in runs[method].values()])
        left.fill_between(list(runs[method]), last.min(1), last.max(1), color=color, alpha=0.25, linewidth=0)
        left.semilogx(list(runs[method]), last.mean(1), "o-", color=color, linewidth=2.5)
        strength, errors = best_strength(runs[method])
        text = f"{method}:\n{errors.last_test:.1f} % at λ = {strength:g}"
        left.annotate(text, (strength, errors.last_test), (0, -9), color=color, ha="center", va="top", **look)
    left.set(title="After training", xlabel="λ (log scale; each method has its own unit)", ylabel="test error (%)")

    # The training error counts by the labels as given, so a network that learned only the truth ends on this line.
    right.axhline(100 * wrong, color="0.45", linewidth=1.2)
    at_end: Any = {"xycoords": ("axes fraction", "data"), "ha": "right"}
    label = "share of wrong training labels"
    right.annotate(label, (0.99, 100 * wrong), (0, -3), color="0.35", va="top", **at_end, **look)
    for name, errors in ("no decay", none), ("decoupled decay", chosen):
        color = METHOD_COLORS[name]
        for kind, curves, line in (("test", errors.test, "-"), ("training", errors.train, ":")):
            right.fill_between(errors.steps, curves.min(0), curves.max(0), color=color, alpha=0.2, linewidth=0)
            right.plot(errors.steps, curves.mean(0), line, color=color, linewidth=2.5)
            # Labels without decay go below their curves, and labels with decay go above, away from the other lines.
            edge, above, va = (curves[:, -1].min(), -3, "top") if errors is none else (curves[:, -1].max(), 6, "bottom")
            right.annotate(f"{kind}, {name}", (0.99, edge), (0, above), color=color, va=va, **at_end, **look)
    right.set(title="During training", xlabel="training step", ylabel="error (%)", xlim=(0, none.steps[-1]))
    top = 1.05 * max(errors.test[:, -1].max() for tried in runs.values() for errors in tried.values())
    for axes in (left, right):
        axes.set_ylim(-0.06 * top, top)  # With room for labels below the lowest errors.
        axes.title.set_size(14)
        axes.xaxis.label.set_size(14)
        axes.yaxis.label.set_size(14)
        axes.tick_params(labelsize=13)
    note = f"Lines: mean of {len(none.test)} seeds. Bands: lowest to highest seed."
    figure.supxlabel(f"{note} Right: decoupled decay with λ = {decoupled:g}.", fontsize=13)
    message = f"test error {none.last_test:.0f} % without weight decay, {chosen.last_test:.0f} % with it"
    if options.quick:
        message = "this quick run is too short to learn them"
    save(figure, f"{100 * wrong:g} % of the training labels are wrong:\n{message}", options.out, size=16)


def draw_bounds(axes: Any, bound: float) -> None:
    """Draws two values to compare a difference with: the bound of the check, and one rounding."""
    for value, style, label, above in (
        (bound, "--", f"the check allows {bound:g}", 5),
        (float(np.finfo(np.float32).eps), ":", "one rounding in float32", -16),
    ):
        axes.axhline(value, color=COLORS[2], linestyle=style, linewidth=2)
        axes.annotate(
            label, (0.98, value), (0, above), ("axes fraction", "data"), "offset points", color=COLORS[2], ha="right"
        )


def save(figure: Any, title: str, path: Path, size: float = 13) -> None:
    """Writes the picture with its title, and prints the path."""
    figure.suptitle(title, fontsize=size, fontweight="bold")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"\nPicture: {path}")
