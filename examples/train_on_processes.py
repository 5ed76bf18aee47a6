"""Trains on two processes with `jax.distributed`, restores a checkpoint, and compares with one process.

    python examples/train_on_processes.py

The script starts two processes with two emulated CPU devices each. The state is the parameters and both moments of
AdamW. Each array whose first axis divides by four is split over the four devices. The others are replicated. Each
process sees half of each batch. Halfway, both save with orbax, and they train to the end. Then two new processes
restore the halfway checkpoint and train the second half again.

At the end the script makes two checks. Each raises an error if it fails. First, the restored run must end with the same
bits as the uninterrupted run. Second, the uninterrupted run must equal what a single process with one device computes
from the same batches, except for rounding. The picture shows this difference over the steps.

On real machines the same `train` runs in one process on each machine. All are started in the same way, with a directory
that all can write to:

    jax.distributed.initialize()  # Before anything else of JAX. Finds the others on Cloud TPU, SLURM, Open MPI, GKE;
    # elsewhere: jax.distributed.initialize("first-machine:1234", num_processes=2, process_id=0)  # and 1 on the other
    train(jax.sharding.Mesh(jax.devices(), ("devices",)), epochs, directory)  # jax.devices() are those of all processes

The demonstration uses the CPU only, whatever else the machine has. More in docs/how_to/several_processes.md.
"""

import faulthandler
import pickle
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from _common import COLORS, arguments, digits, draw_bounds, group_norms, print_table, save, shuffled_batches
from _processes import DEVICES_EACH, run_together
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp
from tqdm import tqdm
from train_digits import MLP
from train_digits_pmap import BOUND, EPS, difference, train_step  # Both numbers are explained there.

import wdjax

PROCESSES = 2
BATCH_SIZE = 64
LIMIT = 300.0  # Seconds for a training: more than ten times what two slow cores need.


def sharded(tree: Any, mesh: Mesh) -> Any:
    """The shapes of a state with their shardings. An array is split along its first axis if that divides evenly."""

    def layout(leaf: Any) -> jax.ShapeDtypeStruct:
        is_even = leaf.ndim > 0 and leaf.shape[0] % mesh.size == 0
        spec = P("devices") if is_even else P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(layout, tree)


def train(mesh: Mesh, epochs: int, directory: Path) -> dict[str, Any]:
    """Trains to the end, from the checkpoint in the directory if there is one. Saves halfway. All processes call it.

    Returns:
        NumPy arrays, whole on every process: the losses, the parameters at some steps, and the final parameters and
        optimizer state. Also the first step, and the bytes of state that a device holds.
    """
    data = digits(train_size=5 * BATCH_SIZE)
    batches = shuffled_batches(len(data.train_labels), BATCH_SIZE, epochs)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-3, len(batches) // 20, len(batches))
    optimizer = wdjax.adamw(schedule, 1.0, wdjax.weights_only(), eps=EPS)

    def start() -> TrainState:
        params = MLP().init(jax.random.key(0), jnp.zeros((1, 64)))["params"]
        state = TrainState.create(apply_fn=MLP().apply, params=params, tx=optimizer)
        return state.replace(step=jnp.zeros([], jnp.int32))

    template = sharded(jax.eval_shape(start), mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, template)
    everywhere, cut = NamedSharding(mesh, P()), NamedSharding(mesh, P("devices"))
    step = jax.jit(
        lambda state, x, y: train_step(state, x, y, None), out_shardings=(shardings, everywhere), donate_argnums=0
    )
    gather = jax.jit(lambda tree: tree, out_shardings=everywhere)

    def from_this_process(rows: Any) -> jax.Array:
        mine = np.split(np.asarray(rows), jax.process_count())[jax.process_index()]
        return jax.make_array_from_process_local_data(cut, mine)

    with ocp.training.Checkpointer(str(directory)) as checkpointer:
        if checkpointer.latest is None:
            state = jax.jit(start, out_shardings=shardings)()  # No device ever holds more than its part.
        else:
            state = checkpointer.load(checkpointer.latest, template)
        first = int(state.step)
        losses, on_the_way = [], {}
        for number in tqdm(range(first, len(batches)), disable=jax.process_count() > 1):
            images, labels = data.train_images[batches[number]], data.train_labels[batches[number]]
            state, loss = step(state, from_this_process(images), from_this_process(labels))
            losses.append(float(loss))
            done = number + 1
            if done == len(batches) // 2:
                checkpointer.save(done, state)
            if done % max(1, len(batches) // 30) == 0 or done == len(batches):
                on_the_way[done] = jax.device_get(gather(state.params))
    shards = [leaf.addressable_shards[0].data for leaf in jax.tree.leaves((state.params, state.opt_state))]
    return {
        "first": first,
        "losses": losses,
        "on the way": on_the_way,
        "state": jax.device_get(gather((state.params, state.opt_state))),
        "bytes": sum(shard.nbytes for shard in shards),
    }


def work(index: str, count: str, coordinator: str, epochs: str, folder: str) -> None:
    """What each process does. The first one writes the result to a file that is named after the first step."""
    faulthandler.dump_traceback_later(LIMIT, exit=True)  # If it hangs, this shows where, and ends it.
    jax.distributed.initialize(coordinator, int(count), int(index))
    result = train(Mesh(jax.devices(), ("devices",)), int(epochs), Path(folder) / "checkpoints")
    if jax.process_index() == 0:
        (Path(folder) / f"from_{result['first']}.pickle").write_bytes(pickle.dumps(result))


def bits_that_differ(tree: Any, other: Any) -> int:
    """How many arrays of two trees differ, bit by bit (so that NaN equals NaN, and -0 is not 0)."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    arrays = ((np.asarray(a), np.asarray(b)) for a, b in pairs)
    return sum(a.dtype != b.dtype or a.shape != b.shape or a.tobytes() != b.tobytes() for a, b in arrays)


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Trains all three, checks, prints, draws, and returns the rows of the table and of the checks."""
    options = arguments(__doc__, __file__, argv)
    jax.config.update("jax_platforms", "cpu")
    epochs = 4 if options.quick else 60
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        single = train(Mesh(jax.devices()[:1], ("devices",)), epochs, folder / "single")
        for action in "Training", "Restoring":
            print(f"{action} on {PROCESSES} processes x {DEVICES_EACH} devices ...", flush=True)
            run_together(Path(__file__), PROCESSES, [str(epochs), name], LIMIT + 10)
        steps = len(single["losses"])
        whole, resumed = (
            pickle.loads((folder / f"from_{first}.pickle").read_bytes()) for first in (0, steps // 2)
        )  # The second file exists only if the checkpoint was found.

    test = digits(train_size=5 * BATCH_SIZE)
    rows: dict[str, dict[str, float]] = {}
    runs = {f"{PROCESSES} processes": whole, f"{PROCESSES} processes, restored": resumed, "one process": single}
    for name, run in runs.items():
        params = run["state"][0]
        logits: Any = MLP().apply({"params": params}, test.test_images)
        rows[name] = {"last loss": run["losses"][-1], "test acc": float((logits.argmax(-1) == test.test_labels).mean())}
        rows[name] |= {f"|{group}|": float(norm) for group, norm in group_norms(params).items()}
        rows[name] |= {"KiB a device": run["bytes"] / 1024}
    print_table(rows, list(rows["one process"]))

    count = bits_that_differ((whole["state"], whole["losses"][steps // 2 :]), (resumed["state"], resumed["losses"]))
    if count:
        raise AssertionError(f"{count} arrays of the restored run differ from those of the uninterrupted one")
    print(f"\nRestored after {resumed['first']} of {steps} steps: ends equal to the uninterrupted run, bit by bit.")
    at_end = float(difference(single["state"][0], whole["state"][0]))
    if not at_end < BOUND:
        raise AssertionError(f"the runs differ by {at_end:.1e} of an array's largest entry, not by rounding")
    print(f"Difference from one process after {steps} steps: {at_end:.1e} of an array's largest entry.")

    draw(runs, options.out)
    return rows | {"checks": {"first": resumed["first"], "arrays that differ": count, "difference": at_end}}


def draw(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Draws how both runs on several processes differ from the run on one, and the bound of the check."""
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    whole, resumed, one = runs.values()
    for run, color, width, style in (whole, COLORS[1], 6, "-"), (resumed, COLORS[0], 2.5, "--"):
        ways = {n: float(difference(one["on the way"][n], params)) for n, params in run["on the way"].items()}
        visible = [value or np.nan for value in ways.values()]  # A logarithmic axis has no zero.
        axes.semilogy(list(ways), visible, style, color=color, linewidth=width)
        label = "uninterrupted" if run is whole else "restored from the halfway checkpoint"
        axes.annotate(label, (next(iter(ways)), visible[0]), (0, 12), textcoords="offset points", color=color)
    draw_bounds(axes, BOUND)
    steps = len(one["losses"])
    axes.set(xlabel="step", ylabel="largest difference from one process\n(relative to the array's largest, log scale)")
    axes.set(xlim=(0, steps), ylim=(1e-8, 1e-3))
    same = f"Restored halfway, {PROCESSES} processes end with the same bits"
    save(figure, f"{same}.\nTheir weights differ from those of one process by {ways[steps]:.0e}", path)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(*sys.argv[2:])
    else:
        main()
