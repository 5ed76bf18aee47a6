"""One compiled program for a sweep against one for each rate, and ways to run it once it is compiled.

With JAX_NUM_CPU_DEVICES=2 in the environment, there is a row for two devices.
"""

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

import wdjax

from ._tables import Row, Table, as_control, at_least
from ._timing import Ratio, interleaved, timed

RUNS = 64
DECAYS = np.geomspace(1e-3, 1.0, RUNS // 4)
RATES = np.geomspace(3e-4, 3e-3, 4)
Train = Callable[..., jax.Array]


def network(*widths: int, steps: int, batch: int = 32) -> Train:
    """A function that trains a network of dense layers with AdamW on random data and returns the training loss."""
    x = jax.random.normal(jax.random.key(1), (512, widths[0]))
    y = jax.random.randint(jax.random.key(2), (512,), 0, widths[-1])

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        for i, layer in enumerate(params):
            x = (jax.nn.gelu(x) if i else x) @ layer["kernel"] + layer["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(x, y).mean()

    def train(key: jax.Array, weight_decay: Any, learning_rate: Any) -> jax.Array:
        optimizer = wdjax.adamw(learning_rate, weight_decay, wdjax.weights_only())
        for_weights, for_rows = jax.random.split(key)
        keys = jax.random.split(for_weights, len(widths) - 1)
        sizes = zip(keys, widths[:-1], widths[1:], strict=True)
        params = [{"kernel": jax.random.normal(k, (n, m)) / n**0.5, "bias": jnp.zeros(m)} for k, n, m in sizes]

        def step(carry: Any, rows: jax.Array) -> tuple[Any, None]:
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, x[rows], y[rows]), state, params)
            return (optax.apply_updates(params, updates), state), None

        rows = jax.random.randint(for_rows, (steps, batch), 0, len(y))
        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), rows)
        return loss(params, x, y)

    return train


# From small networks, as for the digits, to networks so large that plain vmap loses on CPUs.
NETWORKS: dict[str, Callable[[], Train]] = {
    "8-8-4, 200 steps": lambda: network(8, 8, 4, steps=200, batch=8),
    "64-32-10, 100 steps": lambda: network(64, 32, 10, steps=100),
    "64-64-64-10, 100 steps": lambda: network(64, 64, 64, 10, steps=100),
    "64-256-256-10, 30 steps": lambda: network(64, 256, 256, 10, steps=30),
}


def comparisons(quick: bool) -> list[Callable[[], Table]]:
    return [functools.partial(compiling, quick), functools.partial(steady, quick)]


# A sweep compiles its training anew. With this, it keeps the program, so that only its running is timed.
keeping_programs = mock.patch("wdjax.sweeps._program", functools.cache(wdjax.sweeps._program))


def swept(train: Train, **options: Any) -> np.ndarray:
    return wdjax.sweep(train, weight_decay=DECAYS, learning_rate=RATES, **options).results["loss"]


def settings() -> list[tuple[Any, Any]]:
    return [(wd, lr) for wd in DECAYS for lr in RATES]


def compiling(quick: bool) -> Table:
    """The whole waiting time: tracing, compiling and training."""
    measured = 4 if quick else RUNS
    rows: list[Row] = []
    for name in list(NETWORKS)[1:2]:
        baked, together = [], []
        for _ in range(2 if quick else 3):
            train, seconds = NETWORKS[name](), 0.0
            # Evenly spaced if not all are run.
            for weight_decay, learning_rate in settings()[:: RUNS // measured]:
                alone = jax.jit(
                    functools.partial(train, weight_decay=float(weight_decay), learning_rate=float(learning_rate))
                )
                seconds += timed(lambda alone=alone: float(alone(jax.random.key(0))))[1]
            baked.append(seconds * RUNS / measured)
            # A new function, so nothing is compiled yet.
            together.append(timed(functools.partial(swept, NETWORKS[name]()))[1])
        ratio = Ratio.of([a / b for a, b in zip(baked, together, strict=True)])
        row: Row = {
            "network": name,
            "programs measured": measured,
            "a program each, s": float(np.median(baked)),
            "sweep, s": float(np.median(together)),
            "times sooner": ratio,
        }
        rows.append(row | at_least(ratio, 16))
    return Table(
        f"{RUNS} runs, compiling included: `sweep` against a program for each run, with its rates baked in",
        "If fewer programs were measured than there are runs, their time is scaled up.",
        rows,
    )


@keeping_programs
def steady(quick: bool) -> Table:
    """With everything compiled before."""
    rows: list[Row] = []
    for name in list(NETWORKS)[1:2] if quick else NETWORKS:
        train = NETWORKS[name]()
        one = jax.jit(lambda seed, wd, lr, train=train: train(jax.random.key(seed), wd, lr))
        # The control is compiled separately.
        same = jax.jit(lambda seed, wd, lr, train=train: train(jax.random.key(seed), wd, lr))
        mapped = jax.jit(jax.vmap(lambda wd, lr, train=train: train(jax.random.key(0), wd, lr)))
        arguments = [(np.uint32(0), wd, lr) for wd, lr in np.array(settings(), np.float32)]
        columns = np.array(settings(), np.float32).T

        def in_turn(program: Any, arguments: Any = arguments) -> np.ndarray:
            return np.array([float(program(*of_run)) for of_run in arguments])

        ways: dict[str, Callable[[], Any]] = {
            "one after the other": functools.partial(in_turn, one),
            "control": functools.partial(in_turn, same),
            "sweep": functools.partial(swept, train),
            "sweep, chunk=4": functools.partial(swept, train, chunk=4),
            "sweep, chunk=16": functools.partial(swept, train, chunk=16),
            "vmap": lambda mapped=mapped, columns=columns: np.asarray(mapped(*columns)),
        }
        if jax.local_device_count() > 1:
            devices = jax.local_devices()
            ways[f"sweep, {len(devices)} devices"] = functools.partial(swept, train, devices=devices)
        for way in ways.values():
            np.testing.assert_allclose(way().ravel(), ways["one after the other"](), rtol=1e-3)
        runs = {way: functools.partial(_seconds_of_call, call) for way, call in ways.items()}
        times = interleaved(runs, rounds=9 if quick else 15, block=0.3)
        control = times.ratio("control", "one after the other")
        for way in ways:
            ratio = None if way == "one after the other" else times.ratio(way, "one after the other")
            row: Row = {"network": name, "way": way, "ms": 1e3 * times.median(way), "ratio": ratio}
            rows.append(row | (as_control(ratio, control) if ratio and way == "sweep" else {}))
    return Table(
        f"{RUNS} runs, everything compiled before: time as a multiple of one run after the other",
        "One after the other is one compiled program with the rates as arguments, called for each run.",
        rows,
    )


def _seconds_of_call(call: Callable[[], Any], calls: int) -> float:
    return timed(lambda: [call() for _ in range(calls)])[1] / calls
