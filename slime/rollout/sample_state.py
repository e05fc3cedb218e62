"""Samples as plain data that a file can hold and `torch.load(weights_only=True)` reads back: nothing is unpickled."""

import io
from typing import Any

from slime.utils.processing_utils import load_image
from slime.utils.types import Sample

_IMAGE = "__image_png__"
_SAMPLE = "__sample__"


def to_state(value: Any, where: str = "") -> Any:
    """`value` made of numbers, text, bytes, tensors, lists, tuples and dicts; arrays become tensors, images PNG.

    Raises:
        TypeError: something else is in it, and where.
    """
    import torch

    if value is None or isinstance(value, bool | int | float | str | bytes | torch.Tensor):
        return value.detach().cpu() if isinstance(value, torch.Tensor) else value
    if isinstance(value, Sample):
        return {_SAMPLE: to_state(value.to_dict(), f"{where}sample {value.index}")}
    if isinstance(value, dict):
        return {to_state(key, where): to_state(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = (to_state(item, f"{where}[{i}]") for i, item in enumerate(value))
        return tuple(items) if isinstance(value, tuple) else list(items)
    module = type(value).__module__.partition(".")[0]
    if module == "numpy":
        return torch.as_tensor(value) if getattr(value, "shape", ()) else value.item()
    if module == "PIL":
        buffer = io.BytesIO()
        value.save(buffer, format="PNG")
        return {_IMAGE: buffer.getvalue()}
    raise TypeError(
        f"{where or 'The state'} holds a {type(value).__qualname__}, which cannot be saved safely. Keep numbers, text, "
        "lists, dicts, tensors and images in samples and metadata."
    )


def from_state(state: Any) -> Any:
    """The inverse of `to_state`."""
    if isinstance(state, dict):
        if _SAMPLE in state:
            return Sample.from_dict(from_state(state[_SAMPLE]))
        if _IMAGE in state:
            return load_image(state[_IMAGE])
        return {key: from_state(item) for key, item in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(from_state(item) for item in state)
    return state
