"""Names, digests and loading: the proof is about the memory that computes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from slime.backends.embedded.attention import ShapeProbe
from slime.backends.embedded.linear import DenseMatrix, PackedMatrix, can_pack
from slime.backends.embedded.model import ServedModel
from slime.backends.embedded.weights import TensorInfo, WeightError, load_folder
from slime.weight_sync.digest import tensor_digest
from tests.contracts.engine.tiny_model import save_tiny_model

has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
dtypes = [torch.float32] + ([torch.bfloat16] if has_bf16 else [])
SHAPES = {
    "llama-tied": ("llama", {}),
    "llama-untied-odd": ("llama", dict(tie_word_embeddings=False, hidden_size=72, head_dim=24, intermediate_size=101)),
    "qwen2-bias": ("qwen2", {}),
    "qwen3": ("qwen3", dict(hidden_size=40, head_dim=12)),
    "qwen3_moe": ("qwen3_moe", dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)),
    "glm4_moe": (
        "glm4_moe",
        dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, n_group=1, topk_group=1),
    ),
}


@pytest.fixture
def model(tiny_llama: Path) -> ServedModel:
    """A model of its own, whose weights a test may change; packed where the CPU can."""
    return ServedModel(tiny_llama, dtypes[-1])


def logits(model: ServedModel) -> torch.Tensor:
    return model.logits([5, 6, 7], [0, 1, 2], None, ShapeProbe(), None)


@pytest.mark.parametrize("dtype", dtypes, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_digests_are_those_of_the_checkpoints_bytes(tmp_path: Path, shape: str, dtype: torch.dtype):
    folder = save_tiny_model(tmp_path / shape, SHAPES[shape][0], **SHAPES[shape][1])
    model = ServedModel(folder, dtype)
    checkpoint = load_file(folder / "model.safetensors")
    digests = model.weights.digests()
    assert set(digests) == set(checkpoint) == set(model.weights.names())
    for name, tensor in checkpoint.items():
        served = model.weights.read(name)
        assert torch.equal(served, tensor.to(served.dtype)), name
        assert digests[name] == tensor_digest(tensor.to(served.dtype).contiguous()), name


def test_a_value_flipped_in_any_served_memory_changes_its_digest(model: ServedModel):
    """Parameters that are read as they are, and every packed matrix, among them the copy that a tied head makes."""
    before = model.weights.digests()
    for name, places in model.weights.places.items():
        for place in places:
            if hasattr(place, "memory"):
                memory = place.memory.tensor()
                kept = memory.clone()
                memory.view(-1)[0] += 1.0
                after = model.weights.digests()
                memory.copy_(kept)
            else:
                matrix = place.linear.matrix
                kept = matrix.dense().clone()
                wrong = kept.clone()
                wrong[place.linear.starts[place.part], 0] += 1.0
                matrix.write(0, wrong)
                matrix.flush()
                after = model.weights.digests()
                matrix.write(0, kept)
                matrix.flush()
            assert [n for n in before if after[n] != before[n]] == [name]
    assert model.weights.digests() == before


def test_parts_of_a_stacked_matrix_may_come_in_different_calls(model: ServedModel, tiny_llama: Path):
    weights = model.weights
    checkpoint = load_file(tiny_llama / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"
    before = weights.digests()
    doubled = checkpoint[name].to(weights.dtype) * 2
    assert weights.write([(name, doubled)]) == 1
    after = weights.digests()
    assert after[name] == tensor_digest(doubled)
    assert [n for n in before if after[n] != before[n]] == [name]


def test_new_weights_compute(model: ServedModel, tiny_llama: Path):
    first = logits(model).clone()
    checkpoint = load_file(tiny_llama / "model.safetensors")
    model.weights.write((name, tensor * 0.5) for name, tensor in checkpoint.items())
    assert not torch.equal(logits(model), first)
    load_folder(model.weights, tiny_llama, is_tied=True)
    assert torch.equal(logits(model), first)


def test_released_weights_come_back_only_by_loading_all_of_them(model: ServedModel, tiny_llama: Path):
    weights, first = model.weights, logits(model).clone()
    weights.release()
    assert weights.missing() == weights.names()
    assert all(memory.parameter.numel() == 0 for memory in weights._parameters)
    assert all(linear.matrix.product is not None for linear in weights._linears)
    with pytest.raises(WeightError, match="released and not loaded again"):
        weights.digests()
    checkpoint = load_file(tiny_llama / "model.safetensors")
    names = sorted(checkpoint)
    for name in names[:-1]:
        weights.write([(name, checkpoint[name])])
    assert weights.missing() == names[-1:]
    with pytest.raises(WeightError, match="released and not loaded again"):
        weights.read(names[-1])
    weights.write([(names[-1], checkpoint[names[-1]])])
    assert weights.missing() == []
    assert torch.equal(logits(model), first)


def test_wrong_tensors_are_refused_before_anything_is_written(model: ServedModel):
    weights, name = model.weights, model.weights.names()[0]
    for info, words in (
        (TensorInfo("model.nothing", weights.dtype, (1,)), "serves no tensor named 'model.nothing'"),
        (TensorInfo(name, weights.dtype, (3, 4)), r"came as \[3, 4\] but is served as"),
        (TensorInfo(name, torch.float64, weights.shape(name)), "came as torch.float64 but is served as"),
    ):
        with pytest.raises(WeightError, match=words):
            weights.check_infos([info], same_dtype=True)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "lacks 1 tensors of the served model, such as model.norm"),
        (lambda tensors: tensors.update(extra=torch.zeros(2)), "serves no tensor named 'extra'"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.zeros(7)}), r"came as \[7\]"),
    ],
    ids=["missing", "unknown", "misshapen"],
)
def test_a_wrong_folder_leaves_the_weights_as_they_are(
    model: ServedModel, tiny_llama: Path, tmp_path: Path, damage, words: str
):
    tensors = {name: tensor * 2 for name, tensor in load_file(tiny_llama / "model.safetensors").items()}
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    before = model.weights.digests()
    with pytest.raises(WeightError, match=words):
        load_folder(model.weights, tmp_path, is_tied=True)
    assert model.weights.digests() == before


def test_a_folder_without_weights_is_an_error_with_its_name(model: ServedModel, tmp_path: Path):
    with pytest.raises(WeightError, match=f"{tmp_path}: no \\*.safetensors file"):
        load_folder(model.weights, tmp_path, is_tied=True)


@pytest.mark.parametrize("kind", [DenseMatrix, PackedMatrix])
@pytest.mark.parametrize("dtype", dtypes, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 64), (97, 31), (33, 130)])
def test_storing_changes_no_byte(shape: tuple[int, int], dtype: torch.dtype, kind: type):
    if kind is PackedMatrix and not can_pack(dtype):
        pytest.skip("oneDNN does not multiply this dtype on this CPU")
    matrix = kind(*shape, dtype)
    rows = torch.randn(shape).to(dtype)
    matrix.write(shape[0] // 2, rows[shape[0] // 2 :])
    matrix.flush()
    matrix.write(0, rows[: shape[0] // 2])
    matrix.flush()
    assert torch.equal(matrix.dense(), rows)
    x = torch.randn(2, shape[1]).to(dtype)
    tolerance = dict(atol=1e-5, rtol=1e-5) if dtype == torch.float32 else dict(atol=0.1, rtol=0.05)
    torch.testing.assert_close(matrix.product(x, None), x @ rows.T, **tolerance)
