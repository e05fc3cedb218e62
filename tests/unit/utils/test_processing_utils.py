"""Images in every form that rows hold them, and the arguments of a processor."""

import base64
import io

import pytest
from PIL import Image

from slime.utils.processing_utils import (
    build_processor_kwargs,
    encode_image_for_rollout_engine,
    load_image,
    load_processor,
    process_vision_info,
)


@pytest.fixture
def image():
    return Image.new("RGBA", (2, 3), (1, 2, 3, 255))


def test_an_image_is_sent_as_png_and_comes_back_the_same(image):
    url = encode_image_for_rollout_engine(image)
    assert url.startswith("data:image/png;base64,")
    back = load_image(url)
    assert (back.mode, back.size, back.getpixel((0, 0))) == ("RGB", (2, 3), (1, 2, 3))


@pytest.mark.parametrize("form", ["path", "url", "bytes", "dict", "image"])
def test_images_are_read_in_every_form(image, tmp_path, form):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    file = tmp_path / "image.png"
    file.write_bytes(buffer.getvalue())
    forms = {
        "path": str(file),
        "url": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode(),
        "bytes": buffer.getvalue(),
        "dict": {"bytes": buffer.getvalue()},
        "image": image,
    }
    prompt = [
        {"role": "system", "content": "look"},
        {"role": "user", "content": [{"type": "text", "text": "?"}, {"type": "image", "image": forms[form]}]},
    ]
    info = process_vision_info(prompt, processor=None)
    assert [i.getpixel((1, 2)) for i in info["images"]] == [(1, 2, 3)]
    assert info["videos"] is None


def test_text_has_no_images():
    assert process_vision_info([{"role": "user", "content": "hi"}], None) == {"images": None, "videos": None}
    with pytest.raises(TypeError, match="not int"):
        load_image(3)


def test_a_processor_returns_lists_of_ids_and_tensors_of_the_rest():
    kwargs = build_processor_kwargs({"images": [1], "images_kwargs": {"max_pixels": 9}})
    assert kwargs == {
        "images": [1],
        "text_kwargs": {"return_tensors": None, "return_mm_token_type_ids": False},
        "audio_kwargs": {"return_tensors": "pt"},
        "images_kwargs": {"max_pixels": 9, "return_tensors": "pt"},
        "videos_kwargs": {"return_tensors": "pt"},
    }


def test_a_text_model_has_no_processor(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert load_processor(str(tmp_path)) is None
