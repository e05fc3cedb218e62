"""Which families there are, by the `model_type` of config.json."""

from collections.abc import Mapping
from typing import Any

from slime.models import llama, qwen2, qwen3
from slime.models.shape import UnsupportedModelError
from slime.models.table import Family

_FAMILIES: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in (llama, qwen2, qwen3)}


def known_model_types() -> list[str]:
    """Every `model_type` that can be trained."""
    return sorted(_FAMILIES)


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a model, from its config.json."""
    model_type = config.get("model_type")
    if model_type not in _FAMILIES:
        raise UnsupportedModelError(
            f"config.json says model_type = {model_type!r}; known are {', '.join(known_model_types())}. "
            "A new family is a table in slime/models."
        )
    return _FAMILIES[model_type]
