"""Five models of timm: the layer-wise multipliers that timm gives each parameter, and the tables that say the same."""

import json
import re
from pathlib import Path

import wdjax
from wdjax import by_depth, by_path

DATA = Path(__file__).parent / "data"
FACTOR = 0.75
TABLES: dict[str, wdjax.Rules] = {
    "beitv2_base_patch16_224": by_depth(
        "blocks/*", FACTOR, first=("cls_token", "patch_embed"), last=("fc_norm", "head")
    ),
    "eva02_tiny_patch14_224": by_depth(
        "blocks/*", FACTOR, first=("cls_token", "pos_embed", "patch_embed"), last="fc_norm"
    ),
    "regnety_016": by_depth("s*/b*", FACTOR, first="stem", last="head"),
    "convnextv2_tiny": by_depth(
        re.compile(r"stages/(\d+)/(?:blocks/(\d+)|downsample)/.*"),  # A downsampling belongs to the block after it.
        FACTOR,
        first="stem",
        last="head",
    ),
    "swinv2_tiny_window8_256": by_path(
        {"norm/*": FACTOR},  # timm takes the last norm to the last block.
        default=by_depth(
            re.compile(r"layers/(\d+)/(?:blocks/(\d+)|downsample)/.*"),
            FACTOR,
            first="patch_embed",
            last="head",
        ),
    ),
}


def recorded(model: str) -> dict[str, float]:
    """The multiplier of each parameter, by its path."""
    pairs = json.loads((DATA / "layer_decay" / f"{model}.json").read_text())["multipliers"]
    return {path.replace(".", "/"): multiplier for multiplier, paths in pairs for path in paths}


def decayed(model: str) -> dict[str, bool]:
    """Whether timm's own rule decays each parameter, by its path."""
    data = json.loads((DATA / "masks" / "torch" / f"timm_{model}.json").read_text())
    path, rule = data["columns"].index("path"), data["columns"].index("timm_weight_decay")
    return {row[path].replace(".", "/"): bool(row[rule]) for row in data["rows"]}
