"""What decay costs: in bytes, kernels, time, tracing, compiling and dispatch, on parameter trees of real models.

    python -m benchmarks.run --quick          # a look at all of it, in some minutes
    python -m benchmarks.run --only step      # one of them, in full
    python -m benchmarks.run --docs           # all, in full, and the tables of docs/benchmarks.md anew

| module | what it compares |
|---|---|
| `decay` | the compiled step with decay and without: bytes, kernels, state, memory, time |
| `groups` | ten rates by path and one; Optax's ways to ten rates beside it; a rate for each of 1,000 arrays |
| `tracing` | seconds to trace, lower and compile, the size of the program, the un-jitted update; who recompiles when |
| `dispatch` | the host's time for a jitted step on tiny arrays, and how many arrays the state has |
| `step` | the whole step against Optax, the memory's bandwidth and `torch.optim.AdamW` |
| `sweeps` | 64 trainings that differ in their rates: one program, and one for each |
| `at_scale` | the update of 70 billion parameters, compiled for 256 devices that are not there |

How to read the tables. Times are never compared across runs: the competitors take turns in random order, on the same
arrays, and a ratio is the median over rounds of the quotients within a round, with the quartiles in brackets. Each
table of times has a control, the same thing as the first row built and compiled once more: what its ratio differs from
1.00 is noise. Bytes are those of XLA's own cost analysis of the optimized program, kernels the instructions that it
runs; both are exact, and tests hold them (tests/test_cost.py). `met` is yes, no, or noise where the quartiles have the
target between them; "1.00 ± noise" is met by a median below the upper quartile of the control.

To add comparisons: a module in this folder with a function `comparisons(quick: bool) -> list[Callable[[], Table]]`, and
its name in `run.NAMES`. Each function makes one `_tables.Table`; `run` gives the module a process of its own, and goes
on where a function fails. `quick` is for a look: fewer rounds, smaller trees.
"""
