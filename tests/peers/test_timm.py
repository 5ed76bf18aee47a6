"""timm's own layer-wise learning rates, on its own models, beside `by_depth` and `scale_by_path`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from peer import peer, peer_timm
from slow import slow_but
from timm_models import FACTOR, TABLES, recorded

import wdjax

torch, timm = peer("torch"), peer_timm()
optim, scheduler = peer("timm.optim"), peer("timm.scheduler")

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("x64")]  # Peers: Optax's bias correction.

STEPS, LEARNING_RATE, WEIGHT_DECAY = 50, 1e-2, 0.05
Groups = list[dict[str, Any]]


def groups_of(model: str) -> Groups:
    """timm's groups, with the paths of the parameters in place of these."""
    with torch.device("meta"):
        built = timm.create_model(model, pretrained=False)
    path_of = {id(p): name.replace(".", "/") for name, p in built.named_parameters()}
    excluded = built.no_weight_decay() if hasattr(built, "no_weight_decay") else ()
    groups = optim.param_groups_layer_decay(built, WEIGHT_DECAY, no_weight_decay_list=excluded, layer_decay=FACTOR)
    return [{**group, "params": [path_of[id(p)] for p in group["params"]]} for group in groups]


@pytest.mark.parametrize("model", TABLES)
def test_the_multiplier_of_every_parameter_is_timms_lr_scale(model: str) -> None:
    theirs = {path: group["lr_scale"] for group in groups_of(model) for path in group["params"]}
    assert theirs == recorded(model)
    ours = TABLES[model].values({path: jnp.ones(1) for path in theirs})
    assert ours.keys() == theirs.keys()
    for path, scale in theirs.items():
        np.testing.assert_allclose(ours[path], scale, rtol=1e-14, err_msg=path)


@pytest.mark.parametrize(
    "model", slow_but(["beitv2_base_patch16_224", "convnextv2_tiny", "regnety_016"], "beitv2_base_patch16_224")
)
def test_adamw_under_timms_scheduler_takes_the_same_steps(model: str) -> None:
    # From each group one parameter for each top-level name, of two numbers.
    groups = [
        {**group, "params": sorted({path.partition("/")[0]: path for path in group["params"]}.values())}
        for group in groups_of(model)
    ]
    paths = [path for group in groups for path in group["params"]]
    rng = np.random.default_rng(0)
    start = {path: rng.normal(size=2) for path in paths}
    grads = {path: rng.normal(size=(STEPS, 2)) for path in paths}
    theirs = their_steps(groups, start, grads)

    decays = wdjax.by_path({tuple(group["params"]): group["weight_decay"] for group in groups})
    adamw = wdjax.adamw(lambda count: jnp.asarray(cosine())[count], decays)
    optimizer = optax.chain(adamw, wdjax.scale_by_path(TABLES[model]))
    params = jax.tree.map(jnp.asarray, start)

    def step(carry: Any, grads: Any) -> Any:
        params, state = carry
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    ours = jax.jit(lambda carry: jax.lax.scan(step, carry, grads)[1])((params, optimizer.init(params)))
    for path in paths:
        np.testing.assert_allclose(ours[path], theirs[path], rtol=1e-13, atol=1e-13, err_msg=path)
    # And not because all of them go the same way.
    plain = their_steps([{**group, "lr_scale": 1.0} for group in groups], start, grads)
    assert max(np.abs(plain[path] - theirs[path]).max() for path in paths) > 0.1


def cosine() -> np.ndarray:
    return LEARNING_RATE * 0.5 * (1 + np.cos(np.pi * np.arange(STEPS) / STEPS))


def their_steps(groups: Groups, start: dict[str, np.ndarray], grads: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    params = {path: torch.nn.Parameter(torch.tensor(value)) for path, value in start.items()}
    optimizer = torch.optim.AdamW(
        [{**group, "params": [params[path] for path in group["params"]]} for group in groups], lr=LEARNING_RATE
    )
    # timm's scheduler multiplies each group's learning rate by its lr_scale. Without it, lr_scale does nothing.
    schedule = scheduler.CosineLRScheduler(optimizer, t_initial=STEPS)
    after = []
    for t in range(STEPS):
        for path, p in params.items():
            p.grad = torch.tensor(grads[path][t])
        optimizer.step()
        schedule.step(t + 1)
        after.append({path: p.detach().numpy().copy() for path, p in params.items()})
    return {path: np.array([each[path] for each in after]) for path in params}
