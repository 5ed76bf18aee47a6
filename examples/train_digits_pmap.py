"""Weight decay under `jax.pmap` needs no extra code. This script checks that.

    python examples/train_digits_pmap.py

Every device holds all parameters and a share of each batch. The gradients are averaged over the devices, and then every
device takes the same AdamW step. The decay acts on parameters that are the same everywhere, so it needs no
communication. At the end the script makes two checks. Each raises an error if it fails. First, the replicas must be
equal bit by bit. Second, they must agree with a single-device run to within 1e-4 of each array's largest entry. Adam's
eps is raised to 1e-5 for this; see `EPS`. The single-device run takes the same batches whole. The picture shows the
difference over the steps.

The script uses all GPUs (or TPUs) of the machine. If there is only a CPU, it is split into eight devices.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from _common import COLORS, arguments, digits, draw_bounds, group_norms, print_table, save, shuffled_batches
from flax.training.train_state import TrainState
from tqdm import tqdm
from train_digits import MLP

import wdjax

# Adam divides a gradient by its own size. If the true gradient is zero, rounding noise of 1e-9 becomes a full step, and
# the two runs diverge. An eps far above that noise, and far below most gradients, prevents this. The network helps too:
# GELU is smooth. At the kink of a ReLU, rounding can switch a whole gradient on or off. On a CPU, this network passes
# with the default eps of 1e-8 too. A parameter that cannot change the loss, such as the bias of the keys in attention,
# needs the larger eps.
EPS = 1e-5

# Of each array's largest entry, at the end. On eight CPU devices the two runs end within 3e-7 after 300 steps, which is
# a few roundings in float32. The bound leaves room for other machines and still finds mistakes. A lost share of the
# batch ends at 1e-1, and a weight decay of 0.99 instead of 1 ends at 1e-3.
BOUND = 1e-4


def device_count() -> int:
    """The number of devices to train on. A CPU becomes eight, unless the user has set a number."""
    said = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not said and "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", 8)  # Counts only if JAX has not used a device yet.
    return jax.local_device_count()


def train_step(state: TrainState, images: jax.Array, labels: jax.Array, axis: str | None) -> tuple[TrainState, Any]:
    """One step, and the batch's mean loss. With an axis, images and labels are one device's share of the batch."""

    def loss(params: Any) -> jax.Array:
        logits = state.apply_fn({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    value, grads = jax.value_and_grad(loss)(state.params)
    if axis is not None:
        # All shares have the same size, so the mean of their means is the mean of the batch.
        value, grads = jax.lax.pmean((value, grads), axis)
    return state.apply_gradients(grads=grads), value


def first_replica(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x[0]), tree)


def replicas_are_equal(tree: Any) -> bool:
    """Whether each array is the same on all devices, bit by bit (so that NaN equals NaN, and -0 is not 0)."""
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return all(replica.tobytes() == array[0].tobytes() for array in arrays for replica in array)


@jax.jit
def difference(params: Any, others: Any) -> jax.Array:
    """The largest difference between entries, relative to the largest entry of the array they are in."""

    def of_leaf(a: jax.Array, b: jax.Array) -> jax.Array:
        scale = jnp.maximum(jnp.max(jnp.abs(a)), jnp.finfo(a.dtype).tiny)  # Biases start at zero.
        return jnp.max(jnp.abs(a - b)) / scale

    return jnp.max(jnp.stack(jax.tree.leaves(jax.tree.map(of_leaf, params, others))))


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Trains both ways at once, checks, prints, draws, and returns the rows of the table and of the checks."""
    options = arguments(__doc__, __file__, argv)
    jax.config.update("jax_default_matmul_precision", "highest")  # Otherwise GPUs may round products to 10 bits.
    count = device_count()
    share = max(1, 64 // count)
    data = digits(train_size=5 * count * share)
    batches = shuffled_batches(len(data.train_labels), count * share, epochs=4 if options.quick else 60)

    model = MLP()
    params = model.init(jax.random.key(0), data.train_images[:1])["params"]
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-3, len(batches) // 20, len(batches))
    optimizer = wdjax.adamw(schedule, 1.0, wdjax.weights_only(), eps=EPS)
    single = TrainState.create(apply_fn=model.apply, params=params, tx=optimizer).replace(step=jnp.zeros([], jnp.int32))
    replicated = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), single)

    single_step = jax.jit(lambda state, x, y: train_step(state, x, y, None))
    replicated_step = jax.pmap(lambda state, x, y: train_step(state, x, y, "devices"), axis_name="devices")
    losses: dict[str, list[float]] = {"pmap": [], "one device": []}
    differences = []
    for batch in tqdm(batches, desc=f"{count} x {jax.devices()[0].device_kind}"):
        x, y = data.train_images[batch], data.train_labels[batch]
        single, loss = single_step(single, x, y)
        replicated, shared_loss = replicated_step(replicated, x.reshape(count, share, -1), y.reshape(count, share))
        losses["one device"].append(float(loss))
        losses["pmap"].append(float(shared_loss[0]))
        differences.append(float(difference(single.params, first_replica(replicated.params))))

    rows: dict[str, dict[str, float]] = {}
    for name, params in {"pmap": first_replica(replicated.params), "one device": single.params}.items():
        correct = single.apply_fn({"params": params}, data.test_images).argmax(-1) == data.test_labels
        rows[name] = {"last loss": losses[name][-1], "test acc": float(correct.mean())}
        rows[name] |= {f"|{group}|": float(norm) for group, norm in group_norms(params).items()}
    print_table(rows, list(rows["pmap"]))

    if not replicas_are_equal(replicated):
        raise AssertionError("the replicas of parameters and optimizer state differ")
    print(f"\nReplicas of parameters and optimizer state ({count}): equal bit by bit.")
    difference_at_end = differences[-1]
    if not difference_at_end < BOUND:
        raise AssertionError(f"the runs differ by {difference_at_end:.1e} of an array's largest entry, not by rounding")
    said = f"{difference_at_end:.1e} of an array's largest entry"
    print(f"Difference between the pmap run and the single-device run after {len(batches)} steps: {said}.")

    draw(differences, count, options.out)
    return rows | {"checks": {"devices": count, "difference": difference_at_end}}


def draw(differences: Sequence[float], devices: int, path: Path) -> None:
    """Draws the difference between the two runs, the bound of the check, and the size of a single rounding."""
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    visible = np.where(differences, differences, np.nan)  # A logarithmic axis has no zero.
    axes.semilogy(np.arange(1, len(visible) + 1), visible, color=COLORS[1], linewidth=2)
    axes.annotate(
        f"pmap over {devices} and one device",
        (len(visible), visible[-1]),
        (0, 9),
        textcoords="offset points",
        color=COLORS[1],
        ha="right",
    )
    draw_bounds(axes, BOUND)
    axes.set(xlabel="step", ylabel="largest difference of parameters\n(relative to the array's largest, log scale)")
    axes.set(xlim=(0, len(visible)), ylim=(1e-8, 1e-3))
    alike = f"pmap over {devices} devices and one device train alike"
    save(figure, f"{alike}:\nafter {len(visible)} steps the weights differ by {differences[-1]:.0e}", path)


if __name__ == "__main__":
    main()
