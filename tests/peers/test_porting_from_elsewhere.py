"""docs/how_to/tables_from_elsewhere.md: its whole optimizers beside timm's own, and Hugging Face's in PyTorch."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from peer import peer, peer_timm

import wdjax

torch = peer("torch")

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("x64")]

PAGE = (Path(__file__).parents[2] / "docs" / "how_to" / "tables_from_elsewhere.md").read_text()
CELL = re.compile(r"^```\{code-cell\} python\n((?::[^\n]*\n)*)(.*?)^```$", re.S | re.M)
STEPS = 40
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def page() -> Iterator[dict[str, Any]]:
    """The names that the page defines up to the section on lists."""
    namespace: dict[str, Any] = {"__name__": "tables_from_elsewhere"}
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        for _, code in CELL.findall(PAGE.partition("## Lists of names")[0]):
            exec(code, namespace)
        yield namespace


def ours(optimizer: Any, start: dict[str, np.ndarray], grads: list[dict[str, np.ndarray]]) -> Any:
    params: Any = jax.tree.map(jnp.asarray, start)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for grad in grads:
        updates, state = update(jax.tree.map(jnp.asarray, grad), state, params)
        params = optax.apply_updates(params, updates)
    return jax.tree.map(np.asarray, params)


def farthest(a: Any, b: Any) -> float:
    """The largest difference. In 40 steps of warmup the weights move by about 1e-3."""
    return max(float(np.abs(a[path] - b[path]).max()) for path in b)


def gradients(start: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    return [{path: RNG.normal(size=value.shape) for path, value in start.items()} for _ in range(STEPS)]


def train(params: dict[str, Any], optimizer: Any, grads: list[Any], before: Callable[[], Any], after: Any) -> Any:
    for count, grad in enumerate(grads):
        for path, param in params.items():
            param.grad = torch.tensor(grad[path])
        before()
        optimizer.step()
        after(count + 1)
    return {path: param.detach().numpy() for path, param in params.items()}


def test_timm(page: dict[str, Any]) -> None:
    timm = peer_timm()
    optim, scheduler = peer("timm.optim"), peer("timm.scheduler")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=4, embed_dim=8, num_heads=2, num_classes=3)
    params = {name.replace(".", "/"): param for name, param in model.double().named_parameters()}
    start = {path: RNG.normal(size=tuple(param.shape)) for path, param in params.items()}
    for path, param in params.items():
        param.data = torch.tensor(start[path])
    # As the page says it.
    optimizer = optim.create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    cosine = {"lr_min": 1e-5, "warmup_t": 500, "warmup_lr_init": 1e-6}
    schedule = scheduler.CosineLRScheduler(optimizer, 10_000, **cosine, t_in_epochs=False)
    grads = gradients(start)
    want = train(params, optimizer, grads, lambda: None, schedule.step_update)
    assert farthest(ours(page["timm_optimizer"], start, grads), want) < 1e-12
    assert farthest(start, want) > 1e-4
    no_layers = optax.chain(wdjax.adamw(page["timm_cosine"], 0.05, page["timm_mask"]))
    assert farthest(ours(no_layers, start, grads), want) > 1e-5
    for step in (0, 1, 499, 500, 501, 5_000, 9_999, 10_000):
        schedule.step_update(step)
        of_head = max(group["lr"] for group in optimizer.param_groups)
        np.testing.assert_allclose(page["timm_cosine"](step), of_head, rtol=1e-12)


def test_hugging_face(page: dict[str, Any]) -> None:
    paths = wdjax.paths.canonical_paths(page["vit"])
    start = {path: RNG.normal(size=leaf.shape) for path, leaf in zip(paths, jax.tree.leaves(page["vit"]), strict=True)}
    params = {path: torch.tensor(value, requires_grad=True) for path, value in start.items()}

    def group(decays: bool) -> list[Any]:
        chosen = (path for path in paths if ("bias" in path or "norm" in path) != decays)
        return [params[path] for path in chosen]

    groups = [{"params": group(True), "weight_decay": 0.01}, {"params": group(False), "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=5e-5, betas=(0.9, 0.999), eps=1e-8)

    def linear(step: int) -> float:
        return step / 500 if step < 500 else max(0.0, (10_000 - step) / 9_500)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, linear)
    grads = gradients(start)
    clip = lambda: torch.nn.utils.clip_grad_norm_(params.values(), 1.0)  # noqa: E731
    want = train(params, optimizer, grads, clip, lambda _: schedule.step())
    got = ours(page["trainer_optimizer"], start, grads)
    assert farthest(got, want) < 1e-9  # PyTorch clips with the norm plus 1e-6.
    assert farthest(start, want) > 1e-5
    without = optax.chain(optax.clip_by_global_norm(1.0), wdjax.adamw(page["learning_rate"], 0.0))
    assert farthest(ours(without, start, grads), want) > 1e-7


def test_timms_cosine_is_lower_at_the_end_of_the_warmup(page: dict[str, Any]) -> None:
    assert 0.99e-3 < page["timm_cosine"](500) < page["timm_cosine"](499) < 1e-3
