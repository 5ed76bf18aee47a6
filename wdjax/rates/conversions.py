"""From what you know to a rate, and back: the memory of AdamW, normalized rates, L2 under momentum, a Gaussian prior.

The arguments are numbers or 0-d arrays, which may be traced, as in `wdjax.sweep`. Of a learning-rate schedule, give the
peak.
"""

from typing import Any

from .._engine.text import shown
from .._engine.types import Number
from ._numbers import converting, is_known, positive

Converted = Any  # A float; an array if an argument is an array.


@converting
def from_timescale(steps: Number, learning_rate: Number) -> Converted:
    """The weight decay with which AdamW's weights are an average over this many steps.

    AdamW's weights are an exponential moving average of its past directions, divided by weight_decay. In this average,
    the latest direction has the weight learning_rate * weight_decay. The timescale is the inverse of that.

    Rule:   weight_decay = 1 / (steps * learning_rate)
    Place:  the weight_decay of `decoupled_decay` and `adamw`. With learning_rate=1.0, that of `independent_decay`.
    Units:  per step and per unit of learning rate.
    Source: Wang & Aitchison 2025, arXiv 2405.13698.

    Args:
        steps: the timescale, > 0. After this many steps, the share of a past direction has fallen to 1 / e. From a
            timescale in epochs: steps = epochs * examples / batch.
        learning_rate: the optimizer's learning rate, > 0. Of a schedule, the peak.

    Returns: a float; an array if an argument is an array.
    Raises: TypeError, ValueError for arguments that are not such numbers.

    Example:

        >>> import wdjax, wdjax.rates
        >>> wdjax.rates.from_timescale(10_000, learning_rate=1e-3)
        0.1
        >>> optimizer = wdjax.adamw(1e-3, wdjax.rates.from_timescale(10_000, 1e-3), wdjax.weights_only())
    """
    write = "from_timescale(10_000, learning_rate=1e-3)"
    return 1 / (positive("steps", steps, write) * positive("learning_rate", learning_rate, write))


@converting
def timescale(weight_decay: Number, learning_rate: Number) -> Converted:
    """The number of steps that AdamW averages over: the inverse of `from_timescale`.

    Rule:   steps = 1 / (weight_decay * learning_rate)
    Units:  steps. weight_decay is that of `decoupled_decay`. For that of `independent_decay`, write learning_rate=1.0.
    Source: as `from_timescale`.

    Args, Returns, Raises: as `from_timescale`, with weight_decay > 0: without decay, nothing is ever forgotten.

    Example:

        >>> import wdjax.rates
        >>> wdjax.rates.timescale(0.1, learning_rate=1e-3)
        10000.0
    """
    write = "timescale(0.1, learning_rate=1e-3)"
    return 1 / (positive("weight_decay", weight_decay, write) * positive("learning_rate", learning_rate, write))


@converting
def from_tokens(tokens: Number, learning_rate: Number, *, batch: Number, fraction: Number) -> Converted:
    """The weight decay with which AdamW averages over a fraction of a run, given in tokens.

    Rule:   weight_decay = batch / (learning_rate * tokens * fraction)
    Place:  as `from_timescale`, with steps = fraction * tokens / batch.
    Units:  per step and per unit of learning rate. Examples may stand for tokens, in tokens and batch alike.
    Source: Bergsma et al. 2025, "Power Lines", arXiv 2505.13738, where the fraction is tau = batch / (learning_rate *
            weight_decay * tokens). They find that its best value does not depend on the batch, and falls as a power of
            the number of tokens per parameter.

    Args:
        tokens: the tokens of the whole run, > 0.
        learning_rate: the optimizer's learning rate, > 0. Of a schedule, the peak.
        batch: the tokens of one step, > 0.
        fraction: the timescale as a fraction of the run, > 0.

    Returns, Raises: as `from_timescale`.

    Example:

        >>> import wdjax.rates
        >>> round(wdjax.rates.from_tokens(2e9, 1e-3, batch=500_000, fraction=0.25), 6)
        1.0
    """
    write = "from_tokens(2e9, 1e-3, batch=500_000, fraction=0.25)"
    run = positive("tokens", tokens, write) * positive("fraction", fraction, write)
    return positive("batch", batch, write) / (positive("learning_rate", learning_rate, write) * run)


@converting
def from_normalized(weight_decay: Number, *, batch: Number, examples: Number, epochs: Number) -> Converted:
    """The rate per step of the AdamW paper's normalized weight decay, which should suit runs of any length.

    Rule:   weight_decay * sqrt(batch / (examples * epochs))
    Place:  `independent_decay`; under a schedule, through `relative`, which the paper also multiplies by.
    Units:  per step.
    Source: Loshchilov & Hutter 2019, and the authors' code, which divides by the square root of the number of steps. It
            suggests 0.025 and 0.05 for CIFAR-10.

    Args:
        weight_decay: the normalized weight decay, > 0.
        batch: the examples of one step, > 0.
        examples: the examples of one epoch, > 0.
        epochs: the epochs of the run. With warm restarts, those until the next restart. > 0.

    Returns, Raises: as `from_timescale`.

    Example:

        >>> import wdjax.rates
        >>> wdjax.rates.from_normalized(0.05, batch=100, examples=10_000, epochs=100)
        0.0005
    """
    write = "from_normalized(0.05, batch=128, examples=50_000, epochs=100)"
    steps = positive("examples", examples, write) * positive("epochs", epochs, write) / positive("batch", batch, write)
    return positive("weight_decay", weight_decay, write) / steps**0.5


@converting
def from_l2(weight_decay: Number, momentum: Number, dampening: Number = 0.0) -> Converted:
    """The decoupled weight decay that removes as much, in the long run, as L2 in the gradient of SGD with momentum.

    The momentum repeats the pull of L2 in later steps. A decay after the momentum is not repeated, so it is larger.

    Rule:   weight_decay * (1 - dampening) / (1 - momentum)
    Place:  the weight_decay of `decoupled_decay` and `sgdw`, instead of that of `add_l2_to_grads` and `sgd_l2`.
    Units:  per step and per unit of learning rate. With zero gradient, it is the asymptotic rate of L2, to first order
            in learning_rate * weight_decay. In the first steps L2 is weaker, until the momentum has built up.
    Source: SGDS, Xie et al., NeurIPS 2023, arXiv 2011.11152, by its code.

    Args:
        weight_decay: the L2 coefficient, >= 0: PyTorch's `SGD(weight_decay=...)`.
        momentum: from 0 to less than 1, with or without Nesterov's form.
        dampening: that of PyTorch's `SGD`, from 0 to 1. Optax has none.

    Returns, Raises: as `from_timescale`.

    Example:

        >>> import wdjax.rates
        >>> round(wdjax.rates.from_l2(5e-4, momentum=0.9), 6)
        0.005
    """
    write = "from_l2(5e-4, momentum=0.9)"
    number, momentum, dampening = (
        positive(name, value, write, or_zero=True)
        for name, value in (("weight_decay", weight_decay), ("momentum", momentum), ("dampening", dampening))
    )
    if is_known(momentum) and momentum >= 1:
        raise ValueError(f"from_l2: momentum must be from 0 to less than 1, got {shown(momentum)}. Write {write}.")
    if is_known(dampening) and dampening > 1:
        raise ValueError(f"from_l2: dampening must be from 0 to 1, got {shown(dampening)}. Write {write}.")
    return number * (1 - dampening) / (1 - momentum)


@converting
def from_prior(scale: Number, examples: Number, noise: Number = 1.0) -> Converted:
    """The weight decay that corresponds to a Gaussian prior with this standard deviation.

    The minimum of the mean loss with this penalty is the maximum of the posterior.

    Rule:   weight_decay = noise**2 / (examples * scale**2)
    Place:  `l2_penalty`, or `add_l2_to_grads` with any optimizer that reaches the minimum. Under Adam, a decay in the
            update is not a penalty, and leads to other weights.
    Units:  of a loss that is the mean over examples. For a sum over examples, write examples=1.
    Source: Bayes' rule. In scikit-learn's `BayesianRidge`, scale is 1 / sqrt(lambda_) and noise 1 / sqrt(alpha_). In
            its `LogisticRegression`, C is scale**2.

    Args:
        scale: the standard deviation of a weight around its anchor under the prior, > 0.
        examples: the size of the data, > 0.
        noise: for half the squared error, the standard deviation of the targets around the prediction, > 0. For a
            negative log-likelihood, such as cross-entropy, 1.

    Returns, Raises: as `from_timescale`.

    Example:

        >>> import wdjax.rates
        >>> wdjax.rates.from_prior(0.5, examples=1000)
        0.004
    """
    write = "from_prior(0.1, examples=1000)"
    of_data = positive("noise", noise, write) ** 2 / positive("examples", examples, write)
    return of_data / positive("scale", scale, write) ** 2


@converting
def prior_scale(weight_decay: Number, examples: Number, noise: Number = 1.0) -> Converted:
    """The standard deviation of the Gaussian prior that a weight decay means: the inverse of `from_prior`.

    Rule:   scale = noise / sqrt(examples * weight_decay)
    Units:  those of the weights.
    Source: as `from_prior`.

    Args, Returns, Raises: as `from_prior`, with weight_decay > 0: no decay means a prior without a scale.

    Example:

        >>> import wdjax.rates
        >>> wdjax.rates.prior_scale(0.1, examples=1000)
        0.1
    """
    write = "prior_scale(0.1, examples=1000)"
    noise = positive("noise", noise, write)
    return noise / (positive("examples", examples, write) * positive("weight_decay", weight_decay, write)) ** 0.5
