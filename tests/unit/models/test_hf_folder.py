"""HuggingFace folders: read one tensor at a time, written whole or not at all."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from slime.models.hf_folder import INDEX_FILE, HfReader, save_hf_folder


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    folder = tmp_path / "origin"
    (folder / "extra").mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "torch_dtype": "bfloat16", "dtype": "bfloat16"})
    )
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("x")
    (folder / "extra" / "note.txt").write_text("y")
    (folder / INDEX_FILE).write_text("{}")
    save_file({"old": torch.zeros(1)}, folder / "model-00001-of-00009.safetensors")
    return folder


def _buckets() -> Iterator[list[tuple[str, Tensor]]]:
    yield [("a", torch.arange(6.0).view(2, 3)), ("b", torch.ones(4))]
    yield [("c", torch.arange(12.0).view(4, 3).t())]


def test_what_is_written_is_read_back_from_numbered_shards(origin: Path, tmp_path: Path) -> None:
    save_hf_folder(tmp_path / "out", origin, _buckets(), shard_bytes=45)
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert files == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = json.loads((tmp_path / "out" / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == 4 * (6 + 4 + 12)
    assert index["weight_map"] == {"a": files[0], "b": files[0], "c": files[1]}
    reader = HfReader(tmp_path / "out")
    assert reader.shape("c") == (3, 4)
    for name, tensor in (pair for bucket in _buckets() for pair in bucket):
        assert torch.equal(reader.tensor(name), tensor)


def test_everything_but_weights_comes_along(origin: Path, tmp_path: Path) -> None:
    save_hf_folder(tmp_path / "out", origin, _buckets())
    names = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert names == {
        "config.json", "tokenizer.json", "chat_template.jinja", "extra/note.txt", INDEX_FILE,
        "model-00001-of-00001.safetensors",
    }  # fmt: skip


def test_config_names_the_dtype_that_was_saved(origin: Path, tmp_path: Path) -> None:
    """Otherwise loading with the default dtype would round float32 weights."""
    save_hf_folder(tmp_path / "out", origin, _buckets())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"model_type": "llama", "torch_dtype": "float32", "dtype": "float32"}


def test_a_failure_leaves_no_folder_and_keeps_the_older_one(origin: Path, tmp_path: Path) -> None:
    def failing() -> Iterator[list[tuple[str, Tensor]]]:
        yield [("a", torch.zeros(1))]
        raise RuntimeError("a rank died")

    save_hf_folder(tmp_path / "out", origin, [[("a", torch.ones(1))]])
    with pytest.raises(RuntimeError, match="a rank died"):
        save_hf_folder(tmp_path / "out", origin, failing())
    assert HfReader(tmp_path / "out").tensor("a").item() == 1.0
    save_hf_folder(tmp_path / "out", origin, [[("a", torch.full((1,), 2.0))]])
    assert HfReader(tmp_path / "out").tensor("a").item() == 2.0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["origin", "out"]


def test_a_name_that_comes_twice_is_an_error(origin: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'a' comes twice"):
        save_hf_folder(tmp_path / "out", origin, [[("a", torch.zeros(1))], [("a", torch.zeros(1))]])


def test_the_checkpoint_that_the_run_started_from_is_not_overwritten(origin: Path) -> None:
    with pytest.raises(ValueError, match="would overwrite"):
        save_hf_folder(origin, origin, _buckets())


def test_a_folder_without_safetensors_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="save_pretrained"):
        HfReader(tmp_path)
