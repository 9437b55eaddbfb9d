"""Converts between adapter_config.json, peft's description of an adapter, and the adapter section of the settings."""

import json
import os
import re
from pathlib import Path

from pydantic import ValidationError

from megavlm.base.errors import UserError
from megavlm.base.json_files import read_json
from megavlm.base.quoting import quoted, shortened
from megavlm.config.adapter_section import AdapterSettings
from megavlm.convert.peft_names import linears, targets_of
from megavlm.model.shapes import Shapes

ADAPTER_CONFIG = "adapter_config.json"
# Keys that peft writes but that do not change the results of the adapter.
_ABOUT = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "init_weights", "peft_version"),
    *("revision", "task_type", "megatron_core", "qalora_group_size"),
}
# Initialisations that leave the base model unchanged. Others (pissa, olora, corda, loftq) change its weights.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_READ = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "lora_dropout", "rank_pattern", "alpha_pattern"),
    *("target_modules", "target_parameters", "n_frequency", "scaling", "random_loc_seed"),
    *("modules_to_save", "ensure_weight_tying"),
}


def config_of(adapter: AdapterSettings, shapes: Shapes, base: str | None = None) -> dict:
    """The content of adapter_config.json. ``base``: name or folder of the Hugging Face model."""
    every, targets = linears(shapes).values(), targets_of(adapter, shapes)
    ends = lambda target, *, experts: any(
        x.name == target or x.name.endswith("." + target) for x in every if bool(x.experts) == experts
    )
    # "proj" alone would also match the patch embedding's convolution under peft's rule for names
    modules = ["attn.proj" if target == "proj" else target for target in targets if ends(target, experts=False)]
    common = {
        "base_model_name_or_path": base,
        "bias": "none",
        "inference_mode": True,
        "target_modules": modules,
        "task_type": None,
        # peft would train a copy of a tied embedding apart from the output layer
        **({"modules_to_save": adapter.modules_to_save} if adapter.modules_to_save else {}),
        **({"ensure_weight_tying": True} if shapes.tied and adapter.modules_to_save else {}),
    }
    if adapter.type == "fourierft":
        return common | {
            "peft_type": "FOURIERFT",
            "n_frequency": adapter.frequencies,
            "scaling": adapter.scaling,
            "random_loc_seed": adapter.seed,
        }
    parameters = [target for target in targets if ends(target, experts=True)]
    return common | {
        "peft_type": "LORA",
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rslora,
        "use_dora": adapter.type == "dora",
        "rank_pattern": adapter.rank_pattern,
        "alpha_pattern": adapter.alpha_pattern,
        **({"target_parameters": parameters} if parameters else {}),
    }


def write_config(file: Path, adapter: AdapterSettings, shapes: Shapes, base: str | None = None) -> None:
    """Writes adapter_config.json; see ``config_of``."""
    file.write_text(json.dumps(config_of(adapter, shapes, base), indent=2) + "\n", encoding="utf-8")


def read_config(folder: Path, shapes: Shapes) -> AdapterSettings:
    """The settings of the adapter in ``folder``, which peft or megavlm has written.

    Raises:
        UserError: there is no adapter_config.json, or it describes an adapter that megavlm does not support.
    """
    file = folder / ADAPTER_CONFIG
    if not os.path.lexists(file):
        raise UserError(f"{folder} holds no adapter: {ADAPTER_CONFIG} is missing", "give another folder")
    config = read_json(file, "give another folder")
    kind = config.get("peft_type")
    if kind not in ("LORA", "FOURIERFT"):
        raise UserError(
            f"{file} is of type {shortened(kind)}; allowed: LORA (with or without DoRA), FOURIERFT",
            "give another adapter",
        )
    odd = {key: value for key, value in config.items() if value and key not in _ABOUT | _READ and value != "none"}
    if odd.get("init_lora_weights") in _INITS:
        odd.pop("init_lora_weights", None)
    if odd:
        raise UserError(f"{file} has {quoted(odd)}, which megavlm does not support", "train the adapter without it")
    try:
        return _settings(config, shapes)
    except (AttributeError, KeyError, TypeError, ValueError, re.error) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else repr(error)
        raise UserError(f"{file} cannot be used: {shortened(reason)}", "give another folder") from None


def _settings(config: dict, shapes: Shapes) -> AdapterSettings:
    modules = config.get("target_modules") or []
    if isinstance(modules, str):  # a regular expression for complete names
        modules = [x.name for x in linears(shapes).values() if not x.experts and re.fullmatch(modules, x.name)]
    targets = list(dict.fromkeys([*modules, *(config.get("target_parameters") or [])]))
    if config["peft_type"] == "FOURIERFT":
        values = {
            "type": "fourierft",
            "frequencies": config["n_frequency"],
            "scaling": float(config["scaling"]),
            "seed": config["random_loc_seed"],
        }
    else:
        values = {
            "type": "dora" if config.get("use_dora") else "lora",
            "rank": config["r"],
            "alpha": float(config["lora_alpha"]),
            "rslora": config.get("use_rslora", False),
            "dropout": float(config.get("lora_dropout", 0.0)),
            "rank_pattern": config.get("rank_pattern") or {},
            "alpha_pattern": {k: float(v) for k, v in (config.get("alpha_pattern") or {}).items()},
        }
    return AdapterSettings(targets=targets, modules_to_save=config.get("modules_to_save") or [], **values)
