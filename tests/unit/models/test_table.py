"""Names and layouts between HuggingFace and Megatron, as arithmetic on tensors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slime.models import ModelShape, RotaryShape, family_of, known_model_types
from slime.models.shape import UnsupportedModelError
from slime.models.table import EMBEDDING, OUTPUT_LAYER, QueryKeyValue, Same, Stacked, Vocabulary, shard, unshard


def _shape(
    groups: int = 2, heads_per_group: int = 3, head_dim: int = 2, vocab: int = 7, tied: bool = False
) -> ModelShape:
    heads = groups * heads_per_group
    return ModelShape(
        2, heads * head_dim, 8, heads, groups, head_dim, vocab, 64, 1e-6, RotaryShape(head_dim, 10000.0), tied
    )


def test_query_key_value_are_interleaved_by_group() -> None:
    """Two groups of two query heads of one dimension: q0 q1 k0 v0, q2 q3 k1 v1."""
    shape = _shape(groups=2, heads_per_group=2, head_dim=1)
    q, k, v = (torch.tensor(rows)[:, None] for rows in ([0, 1, 2, 3], [10, 11], [20, 21]))
    whole = QueryKeyValue().join([q, k, v], shape)
    assert whole.flatten().tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


def test_gate_and_up_are_sliced_each_for_itself() -> None:
    whole = Stacked().join([torch.arange(4), 10 + torch.arange(4)], _shape())
    assert shard(whole, Stacked(), 0, 2).tolist() == [0, 1, 10, 11]
    assert shard(whole, Stacked(), 1, 2).tolist() == [2, 3, 12, 13]


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 99),
    st.booleans(),
)
def test_joining_slicing_gathering_and_splitting_give_the_same_tensors(
    groups: int, heads_per_group: int, head_dim: int, tp_size: int, seed: int, is_bias: bool
) -> None:
    groups *= tp_size
    shape = _shape(groups, heads_per_group, head_dim, vocab=4 * groups)
    generator = torch.Generator().manual_seed(seed)
    columns = () if is_bias else (4 * tp_size,)
    wholes = {
        QueryKeyValue(): (groups * (heads_per_group + 2) * head_dim, *columns),
        Stacked(): (2 * 3 * tp_size, *columns),
        Vocabulary(): (4 * groups, *columns),
        Same(): (5, *columns),
    }
    if not is_bias:
        wholes[Same(dim=1)] = (5, *columns)
    for layout, whole_shape in wholes.items():
        parts = [torch.randn(size, generator=generator) for size in layout.hf_shapes(whole_shape, shape)]
        whole = layout.join(parts, shape)
        assert tuple(whole.shape) == whole_shape
        slices = [shard(whole, layout, rank, tp_size) for rank in range(tp_size)]
        again = layout.split(unshard(slices, layout), shape)
        assert all(torch.equal(part, other) for part, other in zip(parts, again, strict=True))


@pytest.mark.parametrize("model_type", known_model_types())
def test_a_tied_output_layer_is_read_from_the_embedding(model_type: str) -> None:
    family = family_of({"model_type": model_type})
    assert family.hf_names(OUTPUT_LAYER, _shape(tied=True)) == family.hf_names(EMBEDDING, _shape())
    assert family.hf_names(OUTPUT_LAYER, _shape(tied=False)) == ("lm_head.weight",)
    assert family.is_ignored("lm_head.weight", _shape(tied=True))
    assert not family.is_ignored("lm_head.weight", _shape(tied=False))


def test_an_unknown_model_type_is_answered_with_those_that_are_known() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'mamba'; known are llama, qwen2, qwen3"):
        family_of({"model_type": "mamba"})


def test_a_tensor_that_no_table_has_is_named() -> None:
    with pytest.raises(KeyError, match="linear_qkv.scale"):
        family_of({"model_type": "llama"}).find("decoder.layers.0.self_attention.linear_qkv.scale")
