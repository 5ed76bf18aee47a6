"""Where a rate leads: the size at which decay and noise balance, and how far one step turns the weights there.

Decay shrinks a weight in each step, and the noise in the gradients moves it away. In the end, both balance, whatever
the start was. The formulas hold for gradients of pure noise, and for a timescale that is long against Adam's own memory
of 1 / (1 - b1) steps: at 100 steps and b1=0.9 the weights end 5 % smaller. `examples/monitor_equilibrium.py` measures
how near real training comes.
"""

from .._engine.types import Number
from ._numbers import converting, is_known, positive
from .conversions import Converted


@converting
def equilibrium_rms(weight_decay: Number, learning_rate: Number) -> Converted:
    """The root mean square that AdamW's weights come to under noisy gradients.

    Rule:   sqrt(learning_rate / (2 * weight_decay))
    Units:  those of the weights. weight_decay is that of `decoupled_decay`, learning_rate the one of the same steps.
    Source: Kosson et al. 2024, arXiv 2305.17212. It takes about `timescale(weight_decay, learning_rate)` steps.

    Args:
        weight_decay: the rate, > 0: a number or 0-d array.
        learning_rate: the optimizer's learning rate, > 0.

    Returns: a float; an array if an argument is an array.
    Raises: TypeError, ValueError for arguments that are not such numbers.

    Example:

        >>> import wdjax.rates
        >>> wdjax.rates.equilibrium_rms(0.5, learning_rate=0.01)
        0.1
    """
    write = "equilibrium_rms(0.1, learning_rate=1e-3)"
    rate = 2 * positive("weight_decay", weight_decay, write)
    return (positive("learning_rate", learning_rate, write) / rate) ** 0.5


@converting
def equilibrium_angle(weight_decay: Number, learning_rate: Number, b1: Number = 0.9) -> Converted:
    """The angle by which one step of AdamW turns the weights in equilibrium.

    Rule:   sqrt(2 * learning_rate * weight_decay * (1 - b1) / (1 + b1))
    Units:  radians per step. weight_decay and learning_rate as in `equilibrium_rms`.
    Source: Kosson et al. 2024, arXiv 2305.17212, as their `RotationalAdamW` computes it. `wdjax.monitor` measures the
            same angle. Without the factor of b1, which is 1 / 19 at 0.9, the angle would come out 4.4 times as large.

    Args:
        weight_decay, learning_rate: as `equilibrium_rms`.
        b1: Adam's decay of the first moment, at least 0 and less than 1.

    Returns: a float; an array if an argument is an array.
    Raises: TypeError, ValueError for arguments that are not such numbers.

    Example:

        >>> import wdjax.rates
        >>> round(wdjax.rates.equilibrium_angle(0.5, learning_rate=0.01), 4)
        0.0229
    """
    write = "equilibrium_angle(0.1, learning_rate=1e-3, b1=0.9)"
    memory = positive("b1", b1, write, or_zero=True)
    if is_known(memory) and memory >= 1:
        raise ValueError(f"equilibrium_angle: b1 must be less than 1, got {b1}. Write {write}.")
    rate = 2 * positive("learning_rate", learning_rate, write) * positive("weight_decay", weight_decay, write)
    return (rate * (1 - memory) / (1 + memory)) ** 0.5
