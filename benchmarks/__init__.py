"""What decay costs in bytes, kernels, time, tracing, compiling and dispatch, on parameter trees of real models.

    python -m benchmarks.run --quick          # a quick look at all of them, in some minutes
    python -m benchmarks.run --only step      # one of them, in full
    python -m benchmarks.run --docs           # all of them, in full; updates the tables of the documentation

| module | what it compares |
|---|---|
| `decay` | the compiled step with and without decay: bytes, kernels, state, memory, time |
| `groups` | ten rates by path against one; Optax's ways to have ten rates; a rate for each of 1,000 arrays |
| `tracing` | seconds to trace, lower and compile; the size of the program; the un-jitted update; recompilations |
| `dispatch` | the host's time for a jitted step on tiny arrays, and how many arrays the state has |
| `step` | the whole step against Optax, the memory's bandwidth and `torch.optim.AdamW` |
| `sweeps` | 64 runs with different rates: one program for all, or one for each |
| `at_scale` | the update of 70 billion parameters, compiled for 256 devices that do not exist |

How to read the tables. Times of different runs are never compared. The competitors take turns in random order, on the
same arrays. A ratio is the median over rounds of the quotients within a round, with the quartiles in brackets. Each
table of times has a control: the first row, built and compiled once more. The distance of its ratio from 1.00 is noise.
Bytes are from XLA's own cost analysis of the optimized program. Kernels are the instructions that it runs. Both are
exact, and tests check them (tests/test_cost.py). `met` is yes, no, or noise if the target lies between the quartiles.
A median below the upper quartile of the control meets "1.00 ± noise".

To add comparisons, write a module in this folder with a function `comparisons(quick: bool) -> list[Callable[[],
Table]]`, and add its name to `run.NAMES`. Each function makes one `_tables.Table`. `run` gives the module its own
process, and continues if a function fails. `quick` is for a quick look, with fewer rounds and smaller trees.
"""
