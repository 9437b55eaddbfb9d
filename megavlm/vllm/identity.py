"""Whether a server of vLLM serves the model that is trained, with what the run needs."""

from typing import Any

from megavlm.base.errors import UserError
from megavlm.base.json_files import parse_json
from megavlm.base.quoting import quoted
from megavlm.config.settings import Settings
from megavlm.vllm.environment import check_versions, logprobs_mode

_PARTS = ("text_config", "vision_config")
# Fields that say nothing of the model: how it was made, or is stored.
_OTHER = {"dtype", "torch_dtype", "transformers_version", "initializer_range", "use_cache", "attn_implementation"}


def check_identity(told: dict[str, Any], settings: Settings, url: str) -> None:
    """Raises UserError if a server that says ``told`` of itself is not one for the run."""
    where = f"the server of vLLM at {url}"
    check_versions(told["versions"], where)
    ours = parse_json((settings.model.hf / "config.json").read_text(encoding="utf-8"))
    if different := _differences(ours, told["config"]):
        raise UserError(
            f"{where} serves another model than {settings.model.hf}: {different[0]}"
            + (f", and {len(different) - 1} more fields of config.json" if different[1:] else ""),
            "start it with the same model.hf",
        )
    length, mode = settings.data.seq_length, logprobs_mode(settings.rollout.temperature)
    for name, is_so, wanted in (
        ("max_model_len", told["max_model_len"] >= length, f"data.seq_length = {length}"),
        ("logprobs_mode", told["logprobs_mode"] == mode, f"{mode} (rollout.temperature)"),
    ):
        if not is_so:
            raise UserError(f"{where} was started with {name} {told[name]}, but the run needs {wanted}",
                            "start it with the configuration of the run")  # fmt: skip


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """The fields of the models' shapes that differ."""
    pairs = [("", {"model_type": ours.get("model_type")}, {"model_type": theirs.get("model_type")})]
    pairs += [(f"{part}.", ours.get(part, {}), theirs.get(part, {})) for part in _PARTS]
    return [
        f"{prefix}{name} is {quoted(left.get(name))} here and {quoted(right.get(name))} there"
        for prefix, left, right in pairs
        for name in sorted((left.keys() | right.keys()) - _OTHER)
        if left.get(name) != right.get(name)
    ]
