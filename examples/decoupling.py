"""Can learning rate and weight decay be tuned separately? The question of the AdamW paper, asked on digits.

    python examples/decoupling.py

Each panel of the picture is a grid of learning rates η and weight decays, trained by one `wdjax.sweep`. A horizontal
band of good settings, one side of a box, means that all learning rates share their good decays, so the two can be tuned
separately. A diagonal means that another learning rate needs another decay. Three methods are compared:

- L2 in Adam: `wdjax.adam_l2`;
- independent decay: a step removes the share κ of a weight, whatever η is. This is the decay of the paper's Algorithm
  2, `wdjax.independent_decay`;
- decoupled decay: a step removes the share ηλ. This is AdamW in Optax and PyTorch, `wdjax.adamw`.

The paper reports a diagonal for L2 in Adam, and something closer to a box for Algorithm 2, on CIFAR-10. Its ResNets
normalize what their convolutions return. Here two small networks learn 300 digits, 30 % of them with a wrong label:

- normalized: both layers are followed by a normalization, so the size of the weights does not change the output. The
  result is that of the paper. Independent decay is a box, and L2 in Adam is a diagonal. Decoupled decay is a diagonal,
  too.
- plain: no normalization. The result is the opposite. L2 in Adam and decoupled decay are close to a box, and
  independent decay is a diagonal.

Both results follow from where training leads. In the plain network, decay sets the minimum. L2 adds λw to the gradient,
and decoupled decay adds λw to Adam's direction, so the learning rate has no part in the balance. An independent decay
κ acts like λ = κ/η, so the best κ is proportional to η. In the normalized network, decay sets the angle by which a
step turns the weights, in the long run. It is proportional to √κ with independent decay, to √(ηλ) with decoupled decay,
and to the cube root of η²λ with L2 in Adam. So where η is ten times as large, the best decay should be 10**slope times
as large, with these slopes:

                        plain   normalized
    L2 in Adam              0           -2
    independent decay       1            0
    decoupled decay         0           -1

Independent and decoupled decay are the same method in different units, κ = ηλ, so their slopes differ by 1, and only
one of them can be a box.

The table has the measured slopes: of a straight line through the best decay for each learning rate, in logarithms. It
also has two numbers for how well the learning rates share a decay:

- separability: take a decay that is good at one learning rate, and use it at another one. The probability that it is
  good there, too. It is 1 for a box and 0 for a thin diagonal. A decay is good if its test error is at most GOOD points
  above the lowest one at this learning rate. Two more columns have half and double of GOOD.
- points lost: how many percentage points of test error it costs, on average, to use the best decay of another learning
  rate instead of its own.

Limits: this is one small problem, and the learning rate is constant. The best settings are chosen by the test error
that is shown. At the smallest learning rates, the plain network does not learn the wrong labels within 500 steps,
so all small decays are about equally good there. The largest learning rates are bad with any decay. Both change the
measured slopes.

Three seeds are few for the normalized network, where the best decay saves only about 6 points and the error of a run is
noisy. With the seeds 3, 4 and 5 instead of 0, 1 and 2, the separability of L2, independent and decoupled decay is 0.19,
0.67 and 0.47 there, instead of 0.06, 0.73 and 0.15. The slopes are -1.77, 0.45 and 0.04, instead of -2.05, 0.04 and
-0.92: these seeds do not confirm the slope of decoupled decay. In the plain network, the separability is 0.78, 0.22 and
0.66, instead of 0.70, 0.24 and 0.60, and the slopes are -0.04, 0.88 and -0.31.

Other settings were tried before this one, all with a cosine schedule. The plain network gave the same picture, also
with 1,000 digits and 1,500 steps. In the normalized network, the best independent decay was a κ of 1, the end of the
grid. With only the hidden layer normalized, decoupled decay had a horizontal band, and the other two had none. With
right labels, decay changed little.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from _common import COLORS, arguments, digits, print_table, save, with_wrong_labels
from tqdm import tqdm

import wdjax

WRONG = 0.3  # Of the training labels.
DATA = with_wrong_labels(digits(train_size=300), WRONG)
HIDDEN, BATCH_SIZE = 64, 50
GOOD = 3.0  # Percentage points above the lowest error at the same learning rate.


def independent(learning_rate: Any, weight_decay: Any) -> optax.GradientTransformation:
    """AdamW as in the paper. If the learning rate had a schedule, the decay would follow it by `rates.relative`."""
    return optax.chain(optax.adam(learning_rate), wdjax.independent_decay(weight_decay))


# The optimizer of each method, and the decays of its grid. The units of the decays differ, and so do the grids.
METHODS: dict[str, tuple[Callable[..., optax.GradientTransformation], np.ndarray]] = {
    "L2 in Adam": (wdjax.adam_l2, 0.002 * 2.0 ** np.arange(17)),
    "independent decay": (independent, 0.0002 * 2.0 ** np.arange(13)),
    "decoupled decay": (wdjax.adamw, 0.04 * 2.0 ** np.arange(13)),
}
NETWORKS = {"plain": False, "normalized": True}


def normalize(x: jax.Array) -> jax.Array:
    """Layer normalization without parameters."""
    return jax.nn.standardize(x, axis=-1, epsilon=1e-6)


def logits_of(params: Any, images: jax.Array, normalized: bool) -> jax.Array:
    """One hidden layer. If it is normalized, the size of the weights does not change the logits."""
    if not normalized:
        return jax.nn.gelu(images @ params["hidden"]) @ params["head"]
    return 3 * normalize(jax.nn.gelu(normalize(images @ params["hidden"])) @ params["head"])


def train(network: str, method: str, steps: int, key: jax.Array, learning_rate: Any, weight_decay: Any) -> jax.Array:
    """Trains once. Returns the percentage of misclassified test digits."""
    for_hidden, for_head, for_rows = jax.random.split(key, 3)
    params = {
        "hidden": jax.random.normal(for_hidden, (64, HIDDEN)) / 64**0.5,
        "head": jax.random.normal(for_head, (HIDDEN, 10)) / HIDDEN**0.5,
    }
    optimizer = METHODS[method][0](learning_rate, weight_decay)

    def loss_of(params: Any, rows: jax.Array) -> jax.Array:
        logits = logits_of(params, DATA.train_images[rows], NETWORKS[network])
        return optax.softmax_cross_entropy_with_integer_labels(logits, DATA.train_labels[rows]).mean()

    def step(carry: Any, rows: jax.Array) -> tuple[Any, None]:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss_of)(params, rows), state, params)
        return (optax.apply_updates(params, updates), state), None

    rows = jax.random.randint(for_rows, (steps, BATCH_SIZE), 0, len(DATA.train_labels))
    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), rows)
    wrong = logits_of(params, DATA.test_images, NETWORKS[network]).argmax(-1) != DATA.test_labels
    return 100 * jnp.mean(wrong)


def separability(errors: np.ndarray, good: float = GOOD) -> float:
    """The probability that a decay which is good at one learning rate is good at another one, too.

    The mean over all pairs of learning rates, and over the decays that are good at the first one.

    Args:
        errors: of shape (learning rates, decays).
        good: how far above the lowest error at its learning rate a decay may be.
    """
    is_good = (errors <= errors.min(axis=1, keepdims=True) + good).astype(float)
    shared = is_good @ is_good.T / is_good.sum(axis=1, keepdims=True)  # Rows: the first learning rate.
    return mean_of_pairs(shared)


def points_lost(errors: np.ndarray) -> float:
    """What it costs to use the best decay of another learning rate, as the mean over all pairs of learning rates."""
    return mean_of_pairs(errors[:, errors.argmin(axis=1)] - errors.min(axis=1, keepdims=True))


def mean_of_pairs(matrix: np.ndarray) -> float:
    """The mean of all entries that are not on the diagonal."""
    return float(matrix[~np.eye(len(matrix), dtype=bool)].mean())


def slope(errors: np.ndarray, learning_rates: np.ndarray, decays: np.ndarray) -> float:
    """The slope of the line of least squares through the best decay for each learning rate, in logarithms."""
    return float(np.polyfit(np.log(learning_rates), np.log(decays[errors.argmin(axis=1)]), 1)[0])


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Sweeps, prints, draws, and returns the rows of the table."""
    options = arguments(__doc__, __file__, argv)
    each, steps, seeds = (4, 10, 1) if options.quick else (1, 500, 3)
    learning_rates = 0.001 * 2.0 ** np.arange(0, 8, each)
    grids: dict[str, wdjax.sweeps.Sweep] = {}
    rows: dict[str, dict[str, float]] = {}
    for network in NETWORKS:
        for method, (_, all_decays) in METHODS.items():
            name = f"{network}, {method}"
            decays = all_decays[::each]
            # Small programs gain from running a few at a time, also on a CPU.
            run = partial(wdjax.sweep, partial(train, network, method, steps), seeds=seeds, chunk=8)
            grids[name] = run(learning_rate=learning_rates, weight_decay=decays, progress=partial(tqdm, desc=name))
            errors = grids[name].results["loss"].mean(axis=-1)
            rows[name] = {
                "lowest error %": float(errors.min()),
                "slope": slope(errors, learning_rates, decays),
                "points lost": points_lost(errors),
                "separability": separability(errors),
                "half": separability(errors, GOOD / 2),
                "double": separability(errors, GOOD * 2),
            }
    print_table(rows, list(next(iter(rows.values()))))
    if options.quick:
        print("\nThis --quick run is too short to learn anything. Its numbers say nothing about decay.")
    draw(grids, rows, options.quick, options.out)
    return rows


def draw(grids: dict[str, wdjax.sweeps.Sweep], rows: dict[str, dict[str, float]], quick: bool, path: Path) -> None:
    """Draws all grids with one scale of colors. Dots are on the good decays, and stars on the best ones."""
    figure, axes = plt.subplots(len(NETWORKS), len(METHODS), figsize=(13, 10), layout="constrained", sharex=True)
    image: Any = None
    for axis, (name, found) in zip(axes.flat, grids.items(), strict=True):
        learning_rates, decays = found.values.values()
        errors = found.results["loss"].mean(axis=-1)
        image = axis.pcolormesh(errors.T, cmap="viridis_r", vmin=10, vmax=50)
        i, j = (errors <= errors.min(axis=1, keepdims=True) + GOOD).nonzero()
        axis.plot(i + 0.5, j + 0.5, "o", color="white", markeredgecolor="black", markersize=6)
        best = errors.argmin(axis=1) + 0.5
        look: Any = {"color": COLORS[2], "markeredgecolor": "black", "clip_on": False}
        axis.plot(np.arange(len(best)) + 0.5, best, "*", markersize=17, **look)
        axis.set_xticks(np.arange(0, len(learning_rates), 2) + 0.5, [f"{v:g}" for v in learning_rates[::2]])
        axis.set_yticks(np.arange(0, len(decays), 2) + 0.5, [f"{v:.3g}" for v in decays[::2]])
        axis.grid(visible=False)
        row = rows[name]
        numbers = f"separability {row['separability']:.2f}, slope {row['slope']:.1f}".replace("-", "−")
        axis.set_title(f"{name}\n{numbers}", fontsize=12)
    for axis in axes[-1]:
        axis.set_xlabel("learning rate (log scale)", fontsize=13)
    for axis, unit in zip(axes.T, ("λ, in the gradient", "κ, per step", "λ, times the learning rate"), strict=True):
        for one in axis:
            one.set_ylabel(f"{unit} (log scale)", fontsize=12)
    figure.colorbar(image, ax=axes, label="test error (%)", extend="both", shrink=0.6)
    note = f"Star: the best decay for the learning rate. Dots: at most {GOOD:g} percentage points above it."
    seeds = len(next(iter(grids.values())).seeds)
    figure.supxlabel(f"{note} Means of {seeds} seeds." if seeds > 1 else note, fontsize=13)
    message = "Learning rates share a decay, or need their own:\nit depends on the method and on the network"
    save(figure, "This quick run is too short to learn" if quick else message, path, size=16)


if __name__ == "__main__":
    main()
