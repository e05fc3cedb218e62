"""Tokenizers, processors and images: what stands between a prompt as people write it and what a model reads."""

import base64
import importlib
import io
import json
import logging
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

DEFAULT_PATCH_SIZE = 14


def load_tokenizer(path: str, **kwargs: Any) -> Any:
    """The tokenizer of a HuggingFace folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, **kwargs)


def load_processor(path: str, **kwargs: Any) -> Any | None:
    """The processor of a multimodal model's folder; None for a model that reads text only."""
    folder = Path(path)
    files = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
    if folder.is_dir() and not any((folder / name).is_file() for name in files):
        return None
    import transformers

    try:
        processor = transformers.AutoProcessor.from_pretrained(path, **kwargs)
    except (OSError, ValueError):
        # GLM-4V folders of some versions name no processor class that AutoProcessor knows.
        if "glm4v" not in _model_type(folder):
            raise
        processor = transformers.Glm4vProcessor.from_pretrained(path, **kwargs)
    if isinstance(processor, transformers.PreTrainedTokenizerBase) or not hasattr(processor, "tokenizer"):
        return None  # AutoProcessor falls back to the tokenizer, or to a bare image processor
    return processor


def _model_type(folder: Path) -> str:
    config = folder / "config.json"
    if not config.is_file():
        return ""
    return str(json.loads(config.read_text()).get("model_type", ""))


def build_processor_kwargs(multimodal_inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    """Arguments of a processor's call: lists for text, torch tensors for everything else."""
    kwargs = dict(multimodal_inputs or {})
    kwargs["text_kwargs"] = {
        **kwargs.get("text_kwargs", {}),
        "return_tensors": None,
        "return_mm_token_type_ids": False,
    }
    for name in ("audio_kwargs", "images_kwargs", "videos_kwargs"):
        kwargs[name] = {**kwargs.get(name, {}), "return_tensors": "pt"}
    return kwargs


def process_vision_info(prompt: list[dict[str, Any]], processor: Any) -> dict[str, Any]:
    """The images and videos of a message list, in order: {"images": [PIL image] | None, "videos": list | None}.

    An image item holds a path, a `data:` URL, bytes, or a PIL image. Videos need the package `qwen-vl-utils`.
    """
    items = [item for message in prompt if isinstance(message["content"], list) for item in message["content"]]
    images = [load_image(item["image"]) for item in items if item.get("type") == "image"]
    videos = None
    if any(item.get("type") == "video" for item in items):
        videos = _load_videos(prompt, processor)
    return {"images": images or None, "videos": videos}


def load_image(source: Any) -> Any:
    """An RGB PIL image from a path, a `data:` URL, bytes, {"bytes": ...} or a PIL image."""
    from PIL import Image

    if isinstance(source, dict):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    if isinstance(source, bytes):
        return Image.open(io.BytesIO(source)).convert("RGB")
    if not isinstance(source, str | Path):
        raise TypeError(f"An image must be a path, a data: URL, bytes or a PIL image, not {type(source).__name__}.")
    text = str(source)
    if text.startswith("data:"):
        return Image.open(io.BytesIO(base64.b64decode(text.partition(",")[2]))).convert("RGB")
    return Image.open(text.removeprefix("file://")).convert("RGB")


def _load_videos(prompt: list[dict[str, Any]], processor: Any) -> Any:
    try:
        read_vision = importlib.import_module("qwen_vl_utils").process_vision_info
    except ImportError as error:
        raise ImportError(
            "The prompt holds a video, which the package qwen-vl-utils reads: pip install qwen-vl-utils"
        ) from error
    image_processor = getattr(processor, "image_processor", None)
    patch_size = getattr(image_processor, "patch_size", None) or DEFAULT_PATCH_SIZE
    return read_vision(prompt, image_patch_size=patch_size)[1]


def encode_image_for_rollout_engine(image: Any) -> str:
    """An image as the `data:` URL that engines read: PNG, RGB."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
