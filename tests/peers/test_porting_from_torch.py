"""docs/how_to/from_pytorch.md: its PyTorch and its JAX, each run as it is printed, train to the same weights.

A template for the comparison of another port: the same weights and batches in float64, and `farthest` at the end.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from peer import peer
from slow import slow_but
from test_docs import CELL

import wdjax

torch, nnx = peer("torch"), peer("flax.nnx")

pytestmark = pytest.mark.peers

PAGE = (Path(__file__).parents[2] / "docs" / "how_to" / "from_pytorch.md").read_text()
CELLS = [code for _, code in CELL.findall(PAGE)]
TORCH = re.findall(r"^```python\n(.*?)^```$", PAGE, re.S | re.M)
DIGITS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
Weights = dict[str, np.ndarray]


class Programs(NamedTuple):
    """What the names of both programs mean at their ends."""

    torch: dict[str, Any]
    jax: dict[str, Any]


@pytest.fixture(scope="module")
def programs() -> Iterator[Programs]:
    x64, default = jax.config.jax_enable_x64, torch.get_default_dtype()
    theirs, ours = {"__name__": "theirs"}, {"__name__": "ours"}
    exec(CELLS[0], theirs)  # The same numbers on both sides.
    for block in TORCH:
        exec(block, theirs)
    ours["start"] = theirs["start"]
    for cell in CELLS:
        exec(cell, ours)
    yield Programs(theirs, ours)
    jax.config.update("jax_enable_x64", x64)
    torch.set_default_dtype(default)


def test_the_weights_are_the_same(programs: Programs) -> None:
    theirs, ours = programs
    end = ours["to_torch"](ours["model"])
    assert end.keys() == theirs["end"].keys() - {"lm_head.weight"}  # It is tied: the table of tokens.
    assert theirs["STEPS"] >= 50
    assert ours["farthest"](end, theirs["end"]) <= 1e-12
    # And not because nothing happens: weights move, and the clip acts in some steps and not in others.
    assert ours["farthest"](theirs["start"], theirs["end"]) > 0.1
    assert min(theirs["norms"]) < 0.9
    assert max(theirs["norms"]) > 1.1


def test_the_loss_and_the_gradient_of_the_first_batch(programs: Programs) -> None:
    theirs, ours = programs
    assert float(ours["loss"]) == pytest.approx(theirs["first_loss"].item(), rel=1e-12)
    assert ours["first"].keys() == theirs["first_grads"].keys()
    assert ours["farthest"](ours["first"], theirs["first_grads"]) <= 1e-12


def test_a_parameter_that_the_jax_model_lacks(programs: Programs) -> None:
    ours = programs.jax
    end = ours["to_torch"](ours["model"])
    with pytest.raises(AssertionError, match=r"not in the JAX model: {'wpe.weight'}"):
        ours["farthest"]({name: value for name, value in end.items() if name != "wpe.weight"}, end)


# Another model: biases, a head that is not tied, and positions without a layer.
OTHER_TORCH = {
    "bias=False": "bias=True",
    "        self.lm_head.weight = self.wte.weight\n": "",
    "nn.Embedding(BLOCK, DIM)": "nn.Parameter(torch.zeros(BLOCK, DIM))",
    "self.wpe(torch.arange(x.shape[1]))": "self.wpe",
}
OTHER_JAX = {
    "use_bias=False": "use_bias=True",
    "Embed(BLOCK, DIM, rngs=rngs)": "nnx.Param(jnp.zeros((BLOCK, DIM)))",
    "self.wpe(jnp.arange(x.shape[1]))[None]": "self.wpe[...][None]",
    "        self.ln_f = LayerNorm(DIM, rngs=rngs)\n": (
        "        self.ln_f = LayerNorm(DIM, rngs=rngs)\n        self.lm_head = Linear(DIM, VOCAB, rngs=rngs)\n"
    ),
    "self.wte.attend(self.ln_f(h))": "self.lm_head(self.ln_f(h))",
    'NOT_COMPARED = {"lm_head.weight"}': "NOT_COMPARED = set()",
}
OTHER_RULES = {
    'by_name = wdjax.only("kernel", "embedding")': 'by_name = wdjax.only("kernel", "embedding", "wpe")',
    "by_role = wdjax.weights_only()": 'by_role = wdjax.by_path({"wpe": True}, default=wdjax.weights_only())',
}


def changed(blocks: list[str], changes: dict[str, str]) -> list[str]:
    for old, new in changes.items():
        assert any(old in block for block in blocks), old
        blocks = [block.replace(old, new) for block in blocks]
    return blocks


def test_another_model(programs: Programs) -> None:
    theirs, ours = {"__name__": "theirs"}, {"__name__": "ours"}
    for block in [CELLS[0], *changed(TORCH, OTHER_TORCH)]:
        exec(block, theirs)
    ours["start"] = theirs["start"]
    cells = changed(CELLS[: next(i for i, cell in enumerate(CELLS) if "import linen" in cell)], OTHER_JAX)
    check = next(i for i, cell in enumerate(cells) if "assert not difference" in cell)
    for cell in cells[:check]:
        exec(cell, ours)
    with pytest.raises(AssertionError, match=r"^wpe: 0 → 0.1, by is_matrix$"):
        exec(cells[check], ours)
    for cell in changed(cells[check:], OTHER_RULES):
        exec(cell, ours)
    end, torch_end = ours["to_torch"](ours["model"]), theirs["end"]
    assert end.keys() == torch_end.keys()
    assert {"wpe", "lm_head.weight", "lm_head.bias"} < end.keys()
    without = ours["without_key_biases"]
    assert ours["farthest"](without(end), without(torch_end)) <= 1e-12
    assert max(theirs["norms"]) > 1.1
    size = re.search(r"this is a\s+difference of about ([^.]*)\.", PAGE)
    assert size is not None
    noise = ours["farthest"](end, torch_end)
    said = float(size[1].replace("·10", "e").translate(DIGITS))
    assert said / 10 < noise < said * 10, noise


def test_what_the_page_says_of_multi_head_attention(programs: Programs) -> None:
    """Its kernels from PyTorch's packed weight, its axes and its float32."""
    ours = programs.jax
    heads, dim = ours["HEADS"], ours["DIM"]
    layer = nnx.MultiHeadAttention(
        heads, dim, dim, use_bias=False, decode=False, param_dtype=float, dtype=float, rngs=nnx.Rngs(0)
    )
    packed, out = (ours["start"][f"h.0.attn.{name}.weight"] for name in ("c_attn", "c_proj"))
    kernels = np.moveaxis(packed.T.reshape(dim, 3, heads, -1), 1, 0)
    for name, kernel in zip(("query", "key", "value"), kernels, strict=True):
        getattr(layer, name).kernel[...] = kernel
    layer.out.kernel[...] = out.T.reshape(heads, -1, dim)
    x = np.random.default_rng(0).normal(size=(2, ours["BLOCK"], dim))
    mask = nnx.make_causal_mask(jnp.ones(x.shape[:2]))
    theirs = programs.torch["model"].h[0].attn
    with torch.no_grad():
        theirs.c_attn.weight[:] = torch.from_numpy(packed)
        theirs.c_proj.weight[:] = torch.from_numpy(out)
        expected = theirs(torch.from_numpy(x)).numpy()
    difference = np.abs(layer(jnp.asarray(x), mask=mask) - expected).max() / np.abs(expected).max()
    assert 1e-12 < difference < 1e-6  # The softmax is in float32.
    biased = nnx.MultiHeadAttention(heads, dim, dim, decode=False, rngs=nnx.Rngs(0))
    assert biased.query.bias.shape == (heads, dim // heads)


def test_the_bias_of_the_keys_has_no_gradient(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = programs.jax
    monkeypatch.setitem(ours, "Linear", partial(ours["Linear"], use_bias=True))
    grads = nnx.jit(nnx.grad(ours["loss_fn"]))(ours["GPT"](nnx.Rngs(0)), ours["xs"][0, 0], ours["ys"][0, 0])
    queries, keys, values = np.abs(grads["h"][0]["attn"]["c_attn"]["bias"][...]).reshape(3, -1).max(axis=1)
    assert keys < 1e-15 < 1e-6 < min(queries, values)


class Port:
    """The page's port, in which one thing may be left out."""

    def __init__(self, programs: Programs, patch: pytest.MonkeyPatch) -> None:
        self.page, self.patch = programs.jax, patch
        self.model = partial(self.page["GPT"], nnx.Rngs(0))
        self.clip, self.schedule = self.page["clip_grad_norm"], self.page["schedule"]
        self.mask, self.b2 = self.page["by_name"], 0.95
        self.wrap: Callable[..., Any] | None = None

    def difference(self, end: Weights) -> float:
        page, model = self.page, self.model()
        page["from_torch"](model, page["start"])
        tx = optax.chain(self.clip(1.0), wdjax.adamw(self.schedule, 0.1, self.mask, b1=0.9, b2=self.b2))
        if self.wrap is not None:
            tx = self.wrap(tx, page["MICRO"])
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        for xs, ys in zip(page["xs"], page["ys"], strict=True):
            if self.wrap is None:
                page["train_step"](model, optimizer, xs, ys)
                continue
            for micro in range(page["MICRO"]):
                page["train_step"](model, optimizer, xs[micro : micro + 1], ys[micro : micro + 1])
        return page["farthest"](page["to_torch"](model), end)


def epsilon(port: Port) -> None:
    port.patch.setitem(port.page, "LayerNorm", partial(port.page["LayerNorm"], epsilon=1e-6))


def approximate(port: Port) -> None:
    port.patch.setitem(port.page, "gelu", jax.nn.gelu)


def everything(port: Port) -> None:
    port.mask = None


def positions(port: Port) -> None:
    port.mask = wdjax.by_path({"wpe": False}, default=port.mask)


def b2(port: Port) -> None:
    port.b2 = 0.999


def shifted(port: Port) -> None:
    schedule = port.schedule
    port.schedule = lambda count: schedule(count + 1)


def clip(port: Port) -> None:
    port.clip = optax.clip_by_global_norm


def embedding(port: Port) -> None:
    port.patch.setitem(port.page, "Embed", partial(port.page["Embed"], param_dtype=jnp.float32))


def attention(port: Port) -> None:
    port.patch.setitem(port.page, "causal_attention", partial(jax.nn.dot_product_attention, is_causal=True))


def warmup(port: Port) -> None:
    port.schedule = port.page["warmup_cosine"]


def multi_steps(port: Port) -> None:
    port.wrap = optax.MultiSteps


LEFT_OUT = {
    "`LayerNorm(eps=1e-5)`": epsilon,
    "`F.gelu` is exact": approximate,
    "two groups": everything,
    "`wpe` in the first group": positions,
    "`betas=(0.9, 0.95)`": b2,
    "first step `get_lr(0)`": shifted,
    "`clip_grad_norm_`": clip,
    "`nn.Embedding`": embedding,
    "attention": attention,
    "`get_lr`": warmup,
    "`loss / MICRO`": multi_steps,
}
SAYS = {
    row[0]: float(row[2].replace("·10", "e").translate(DIGITS))
    for table in re.findall(r"^\|[^\n]*left out \|\n\|[-|]*\n((?:\|[^\n]*\n)*)", PAGE, re.M)
    for row in ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
}
SINCE_0_2_8 = "accumulator_dtype" in optax.MultiSteps.__init__.__code__.co_varnames


def test_the_page_has_a_row_for_each() -> None:
    assert SAYS.keys() == LEFT_OUT.keys()


@pytest.mark.parametrize("row", slow_but(LEFT_OUT, "`clip_grad_norm_`", "`nn.Embedding`", "`loss / MICRO`"))
def test_how_much_it_costs_to_leave_it_out(programs: Programs, row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    port = Port(programs, monkeypatch)
    LEFT_OUT[row](port)
    difference = port.difference(programs.torch["end"])
    if row == "`loss / MICRO`" and not SINCE_0_2_8:
        assert difference <= 1e-12
    elif SAYS[row] > 1e-5:
        assert difference == pytest.approx(SAYS[row], rel=0.5)
    else:  # Rounding in float32, which depends on the compiler.
        assert SAYS[row] / 10 < difference < SAYS[row] * 10


@pytest.mark.skipif(not SINCE_0_2_8, reason="an option of Optax 0.2.8")
def test_multi_steps_that_accumulate_in_float64(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    port = Port(programs, monkeypatch)
    port.wrap = partial(optax.MultiSteps, accumulator_dtype=jnp.float64)
    assert port.difference(programs.torch["end"]) <= 1e-12


RNG = np.random.default_rng(0)
INPUTS, TARGETS, START = RNG.normal(size=(6, 4)), RNG.normal(size=(6, 3)), RNG.normal(size=(4, 3))
LR, WD = 0.02, 0.1
OPTIMIZERS = dict(re.findall(r"^\| `(\w+\(p, lr.*?\))` \| `(.*?)` \|$", PAGE, re.M))


def with_torch(call: str) -> np.ndarray:
    w = torch.tensor(START, requires_grad=True)
    optimizer = eval(f"torch.optim.{call}", {"torch": torch, "p": [w], "lr": LR, "wd": WD})
    for _ in range(60):
        optimizer.zero_grad()
        ((torch.tensor(INPUTS) @ w - torch.tensor(TARGETS)) ** 2).mean().backward()
        optimizer.step()
    return w.detach().numpy()


def with_jax(call: str) -> np.ndarray:
    l2 = wdjax.add_l2_to_grads(WD)
    tx = eval(call, {"wdjax": wdjax, "optax": optax, "l2": l2, "lr": LR, "wd": WD})

    def step(carry: Any, _: Any) -> Any:
        w, state = carry
        gradient = jax.grad(lambda w: jnp.mean((INPUTS @ w - TARGETS) ** 2))(w)
        updates, state = tx.update(gradient, state, w)
        return (optax.apply_updates(w, updates), state), None

    w = jnp.asarray(START)
    (w, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=60))((w, tx.init(w)))
    return np.asarray(w)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("call", OPTIMIZERS)
def test_the_table_of_optimizers(call: str) -> None:
    difference = np.abs(with_torch(call) - with_jax(OPTIMIZERS[call])).max()
    assert difference <= (1e-9 if call.startswith("Adagrad") else 1e-12)
    assert np.abs(with_torch(call) - with_torch(call.replace("wd", "0.5 * wd"))).max() > 1e-3


DIFFERENT = {
    "SGD(p, lr, 0.9, dampening=0.9)": "optax.chain(optax.ema(0.9, debias=False), optax.scale_by_learning_rate(lr))",
    "NAdam(p, lr)": "optax.nadam(lr)",
    "Adam(p, lr, amsgrad=True)": "optax.chain(optax.scale_by_amsgrad(), optax.scale_by_learning_rate(lr))",
    "Muon(p, lr)": "optax.contrib.muon(lr)",
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("call", DIFFERENT)
def test_optimizers_that_differ(call: str) -> None:
    assert np.abs(with_torch(call) - with_jax(DIFFERENT[call])).max() > 1e-4
    assert len(OPTIMIZERS) == 6
