"""Many runs with different weight decay and learning rate, compiled once: which rate is best, and how certain is that?

The compiled program trains a chunk of runs at a time on each device, and is called until all runs are done. So the
chunk bounds the memory, progress can be shown between calls, and the devices share the runs without communication.

The answer of a sweep is a set of settings, not one number: a few seeds tell only which settings are worse than another
one. The others may be the best (`Best`). What can be swept can also be differentiated with respect to its rates.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from .._engine import checks
from .._engine.text import shown
from ._found import Best as Best
from ._found import Sweep as Sweep
from ._found import check_real

_WRITE = "sweep(train, weight_decay=[0.0, 0.01, 0.1], learning_rate=[1e-3], seeds=5)"
_RATES = ("weight_decay", "strength", "learning_rate", "wd", "lam", "lr")


def sweep(
    train: Callable[..., Any],
    *,
    seeds: int | Sequence[int] = 1,
    chunk: int | None = None,
    devices: Sequence[Any] | None = None,
    progress: Callable[[range], Iterable[int]] = iter,
    **values: Any,
) -> Sweep:
    """Trains once for each combination of values and each seed, with one compilation for all.

    The result is

        result[i, j, ..., s] = train(jax.random.key(seeds[s]), name_1=values_1[i], name_2=values_2[j], ...)

    `train` is a whole training function that `jax.jit` can trace. It makes the order of the data, the parameters and
    the optimizer itself, loops with `jax.lax.scan`, and returns its measurements at the end. Each call of `sweep`
    traces and compiles it once, as it is then, and keeps nothing of it. Values are traced 0-d arrays of JAX's default
    float dtype, and seeds are traced keys. Every setting gets the same keys, and so the same weights and batches if
    `train` draws them.

    Args:
        train: `train(key, **values)`, which returns a scalar loss, or a dictionary of the loss and other results, such
            as scalars, curves and parameters. It gets the values in the order in which they are given. The loss is
            real.
        seeds: the number of seeds, counted from 0, or the seeds themselves.
        chunk: how many runs each device trains at once, under `jax.vmap`. None means all runs on GPUs and TPUs, and one
            on CPUs, where each run then gives the same bits as alone. On CPUs, only small networks gain from 4 or 8.
        devices: the devices of this process that share the runs; None for JAX's default device.
        progress: a wrapper for the loop over the calls of the program, which yields all that it gets, in order:
            `progress=tqdm.tqdm`.
        **values: a list of finite numbers for each argument of `train` that differs between runs. Arguments with the
            names of rates in wdjax must not be negative. If the settings are not a grid, sweep over `trial=range(n)`
            and let `train` look up the rates.

    Returns: a `sweeps.Sweep` with `.results`, `.best()` and `.table()`.
    Raises: TypeError if `train` cannot be called with these names, or returns something else; ValueError for other
            arguments that are not as above.

    Example:

        >>> import jax, jax.numpy as jnp, optax, wdjax
        >>> def train(key, weight_decay, learning_rate):
        ...     optimizer = wdjax.sgdw(learning_rate, weight_decay)
        ...     params = jax.random.normal(key, (3,))
        ...     def step(carry, _):
        ...         params, state = carry
        ...         updates, state = optimizer.update(params - 1.0, state, params)  # The loss is |params - 1|^2 / 2.
        ...         return (optax.apply_updates(params, updates), state), None
        ...     (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=200)
        ...     return jnp.sum((params - 0.5) ** 2)  # A validation loss. Its minimum is at weight_decay = 1.
        >>> found = wdjax.sweep(train, weight_decay=[0.0, 0.5, 1.0, 2.0], learning_rate=[0.1], seeds=4)
        >>> found.results["loss"].shape
        (4, 1, 4)
        >>> found.best().values
        {'weight_decay': 1.0, 'learning_rate': 0.1}
    """
    tried = {name: _checked_values(name, given) for name, given in values.items()}
    if not tried:
        raise ValueError(f"sweep: no values were given. Write {_WRITE}.")
    call = f"train(key, {', '.join(f'{name}=...' for name in tried)})"
    try:
        inspect.signature(train).bind(None, **tried)
    except TypeError as error:
        raise TypeError(f"sweep: the training function cannot be called as {call}: {error}. Write {_WRITE}.") from None
    numbers = _checked_seeds(seeds)
    shared = _checked_devices(devices)
    if chunk is not None and (not checks.is_whole(chunk) or chunk < 1):
        raise ValueError(f"sweep: chunk must be an integer > 0, got {shown(chunk)}. Write chunk=8, or leave it out.")

    grid = np.meshgrid(*tried.values(), numbers, indexing="ij")
    *columns, of_seeds = (axis.ravel() for axis in grid)
    total = of_seeds.size
    share = -(-total // len(shared))
    at_once = min(share, chunk or (1 if shared[0].platform == "cpu" else share))
    # Calls of equal size, so that as few runs as possible are computed only to fill the last call.
    calls = -(-share // at_once)
    size = -(-share // calls) * len(shared)

    outputs: list[Any] = []
    mesh = Mesh(np.array(shared), ("runs",))
    program = _program(train, mesh, tuple(tried))
    try:
        for call in _each_call(progress, calls):
            rows = np.minimum(np.arange(call * size, (call + 1) * size), total - 1)
            with jax.set_mesh(mesh):  # The caller may have set another mesh.
                outputs.append(program(of_seeds[rows].astype(np.uint32), [column[rows] for column in columns]))
            # The device gets its next work before the host waits for the last results. They don't pile up there.
            outputs[-2:-1] = jax.device_get(outputs[-2:-1])
        outputs = jax.device_get(outputs)
    except jax.errors.JaxRuntimeError as error:
        # Some releases of JAX say only the second.
        if "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error):
            each = size // len(shared)
            error.add_note(f"sweep: each device trained {each} runs at once. Write sweep(..., chunk={each // 2 or 1}).")
        raise

    shape = (*map(len, tried.values()), len(numbers))
    results = jax.tree.map(lambda *parts: np.concatenate(parts)[:total].reshape(*shape, *parts[0].shape[1:]), *outputs)
    return Sweep(tried, numbers, results)


def _program(train: Callable[..., Any], mesh: Mesh, names: tuple[str, ...]) -> Any:
    """The compiled program: the results of one run for each seed, from the values of each name. The devices share them.

    It is a new function for each sweep, so that jit keeps nothing of `train`, which may read what changes later.
    """

    def one(seed: jax.Array, values: Sequence[jax.Array]) -> dict[str, Any]:
        # A dictionary as an argument of jit would be sorted by its keys.
        return _checked_result(train(jax.random.key(seed), **dict(zip(names, values, strict=True))))

    def on_one_device(seeds: jax.Array, values: Sequence[jax.Array]) -> Any:
        if len(seeds) > 1:
            return jax.vmap(one)(seeds, values)
        # A single run without vmap has the same operations as the run alone, and so the same bits.
        result = one(seeds[0], [value[0] for value in values])
        return jax.tree.map(lambda x: jnp.asarray(x)[None], result)

    runs = PartitionSpec("runs")
    # Runs don't communicate, and `train` may be anything, so checks of what varies over devices are off.
    return jax.jit(jax.shard_map(on_one_device, mesh=mesh, in_specs=runs, out_specs=runs, check_vma=False))


def _each_call(progress: Any, calls: int) -> Iterator[int]:
    """The numbers of the calls, through the caller's wrapper, which must yield them all in order."""
    wrapped = progress(range(calls)) if callable(progress) else None
    if not isinstance(wrapped, Iterable):
        given = f"one that returned {shown(wrapped)}" if callable(progress) else shown(progress)
        raise TypeError(f"sweep: progress must be a function that wraps a loop, got {given}. Write progress=tqdm.tqdm.")
    done = 0
    for call in wrapped:
        if call != done:
            break
        yield call
        done += 1
    if done < calls:
        raise ValueError(
            f"sweep: progress must yield all of range({calls}) in order, as tqdm.tqdm does, but number {done} was "
            "missing. Its results would be missing too. For fewer runs, give fewer values or seeds."
        )


def _checked_values(name: str, given: Any) -> np.ndarray:
    write = f"{name}=[0.0, 0.01, 0.1]" if name in _RATES else f"{name}=[0.0, 1.0]"
    try:
        values = np.asarray(given)
        values = np.empty(0) if np.iscomplexobj(values) else values.astype(np.float64)
    except (TypeError, ValueError):
        values = np.empty(0)
    if values.ndim != 1 or not values.size:
        raise ValueError(
            f"sweep: {name} must be a list of at least one real number, got {shown(given)}. Write {write}."
        )
    wrong = values[~np.isfinite(values) | ((values < 0) & (name in _RATES))]
    if wrong.size:
        raise ValueError(f"sweep: {name} must be finite and not negative, got {wrong[0]}. Write {write}.")
    return values


def _checked_seeds(seeds: Any) -> np.ndarray:
    is_count = isinstance(seeds, (int, np.integer)) and not isinstance(seeds, bool)
    numbers = np.arange(max(seeds, 0)) if is_count else np.asarray(seeds)
    if numbers.ndim != 1 or not numbers.size or numbers.dtype.kind not in "iu":
        raise ValueError(f"sweep: seeds must be a count > 0 or a list of integers, got {shown(seeds)}. Write seeds=5.")
    if len(set(numbers.tolist())) < numbers.size or numbers.min() < 0 or numbers.max() >= 2**32:
        raise ValueError(
            f"sweep: seeds must be different and between 0 and 2**32 - 1, got {shown(seeds)}. Write seeds=5."
        )
    return numbers


def _checked_devices(devices: Any) -> tuple[Any, ...]:
    found = tuple(jnp.zeros([]).devices() if devices is None else devices)
    if not found or any(device.process_index != jax.process_index() for device in found):
        write = "Write devices=jax.local_devices(), and give each process its own values or seeds."
        raise ValueError(f"sweep: devices must be some of this process, got {shown(devices)}. {write}")
    return found


def _checked_result(result: Any) -> dict[str, Any]:
    if isinstance(result, (int, float, complex, np.ndarray, np.generic, jax.Array)) and jnp.shape(result) == ():
        result = {"loss": result}
    if isinstance(result, dict) and result and all(isinstance(name, str) for name in result):
        check_real("sweep", "loss", result.get("loss"))
        return result
    shown = f"an array of shape {jnp.shape(result)}" if isinstance(result, jax.Array) else type(result).__name__
    raise TypeError(
        f"sweep: train must return a scalar, or a dictionary of arrays by name, but it returned {shown}. "
        'Write return loss, or return {"loss": loss, "curve": losses}.'
    )
