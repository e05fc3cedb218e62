"""Model families: what HuggingFace calls their tensors and settings and what Megatron does, one file a family."""

from slime.models.families import family_of, known_model_types
from slime.models.shape import ModelShape, RotaryShape
from slime.models.table import Family

__all__ = ["Family", "ModelShape", "RotaryShape", "family_of", "known_model_types"]
