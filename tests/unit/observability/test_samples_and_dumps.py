"""What the model said can be read, and a dumped rollout comes back as it was."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slime.observability.debug_dumps import (
    build_train_dump,
    load_debug_rollout_data,
    save_debug_rollout_data,
    save_debug_train_data,
)
from slime.observability.samples import write_eval_samples, write_samples
from slime.utils.types import Sample


def a_sample(index: int = 0, **fields: Any) -> Sample:
    values: dict[str, Any] = {
        "index": index,
        "group_index": index // 2,
        "prompt": "2 + 2 =",
        "tokens": [1, 2, 3, 4, 5],
        "response": "4 – vier",
        "response_length": 2,
        "label": "4",
        "reward": 1.0,
        "weight_versions": ["1", "2"],
        "status": Sample.Status.COMPLETED,
    }
    return Sample(**(values | fields))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_rollout_is_one_readable_file(tmp_path: Path) -> None:
    path = write_samples(tmp_path, 12, [[a_sample(0), a_sample(1, reward={"score": float("nan"), "acc": True})]])
    assert path == tmp_path / "samples" / "rollout_000012.jsonl"
    first, second = rows_of(path)
    assert first["prompt"] == "2 + 2 =" and first["response"] == "4 – vier" and first["label"] == "4"
    assert (first["prompt_length"], first["response_length"], first["reward"]) == (3, 2, 1.0)
    assert first["weight_versions"] == ["1", "2"] and first["status"] == "completed"
    assert second["reward"] == {"score": None, "acc": True}
    assert "vier" in path.read_text(encoding="utf-8") and "\\u" not in path.read_text(encoding="utf-8")


def test_a_response_without_text_is_decoded_when_there_is_a_tokenizer(tmp_path: Path) -> None:
    tokenizer = Namespace(decode=lambda ids: f"<{ids}>")
    (row,) = rows_of(write_samples(tmp_path, 0, [a_sample(response="")], tokenizer))
    assert row["response"] == "<[4, 5]>"


def test_each_task_of_an_evaluation_has_its_file(tmp_path: Path) -> None:
    data = {"gsm8k": {"samples": [a_sample(0)]}, "my/task": {"samples": [a_sample(1)]}, "none": {"rewards": [1]}}
    assert [path.name for path in write_eval_samples(tmp_path, 3, data)] == [
        "eval_000003_gsm8k.jsonl",
        "eval_000003_my_task.jsonl",
    ]
    assert write_eval_samples(tmp_path, -1, data)[0].name == "eval_initial_gsm8k.jsonl"


def test_a_chat_prompt_and_an_odd_label_are_still_one_line(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi\nthere"}]
    (row,) = rows_of(write_samples(tmp_path, 0, [a_sample(prompt=chat, label={1})]))
    assert row["prompt"] == chat and row["label"] == "{1}"


def test_numbers_of_numpy_and_torch_are_written_as_numbers(tmp_path: Path) -> None:
    sample = a_sample(tokens=[1, np.int64(2), torch.tensor(3)], rollout_log_probs=torch.tensor([-0.5, -0.25]))
    sample.reward, sample.label = np.float32(0.5), np.arange(2)
    (row,) = rows_of(write_samples(tmp_path, 0, [sample]))
    assert (row["tokens"], row["log_probs"], row["reward"]) == ([1, 2, 3], [-0.5, -0.25], 0.5)
    assert row["label"] == "array([0, 1])"


def test_what_is_no_number_is_written_as_it_presents_itself(tmp_path: Path) -> None:
    """A label with a field `item`, and a number that JSON lacks beside text that UTF-8 lacks."""
    odd = a_sample(label=Namespace(item="apple"), response="\ud800", rollout_log_probs=torch.tensor([float("nan")]))
    (row,) = rows_of(write_samples(tmp_path, 0, [odd]))
    assert row["label"] == "Namespace(item='apple')" and row["log_probs"] == [None]


def test_a_dumped_rollout_comes_back_as_it_was(tmp_path: Path) -> None:
    template = str(tmp_path / "dump" / "{rollout_id}.pt")
    original = a_sample(
        7,
        rollout_log_probs=[-0.5, -0.25],
        rollout_routed_experts=np.arange(8, dtype=np.int32).reshape(4, 2, 1),
        metadata={"rm_type": "math", "nested": {"x": [1, (2, 3)]}, "score": np.float64(0.5)},
        spec_info=Sample.SpecInfo(1, 2, 3, 4),
        status=Sample.Status.TRUNCATED,
    )
    original.source = "gsm8k"  # type: ignore[attr-defined]
    save_debug_rollout_data(template, 3, [[original]])
    (loaded,) = load_debug_rollout_data(template, 3)
    assert torch.equal(loaded.rollout_routed_experts, torch.arange(8, dtype=torch.int32).reshape(4, 2, 1))
    loaded.rollout_routed_experts = original.rollout_routed_experts = None
    assert loaded == original and loaded.source == "gsm8k"  # type: ignore[attr-defined]
    assert loaded.metadata["nested"] == {"x": [1, (2, 3)]}


def test_evaluations_have_their_own_dump(tmp_path: Path) -> None:
    template = str(tmp_path / "{rollout_id}.pt")
    assert save_debug_rollout_data(template, 3, [a_sample()], evaluation=True).name == "eval_3.pt"
    assert load_debug_rollout_data(template, 3, evaluation=True)[0].label == "4"
    with pytest.raises(FileNotFoundError, match="no dump of rollout 3"):
        load_debug_rollout_data(template, 3)


def test_images_survive_a_dump(tmp_path: Path) -> None:
    image_module = pytest.importorskip("PIL.Image")
    image = image_module.new("RGB", (3, 2), (10, 20, 30))
    template = str(tmp_path / "{rollout_id}.pt")
    save_debug_rollout_data(template, 0, [a_sample(multimodal_inputs={"images": [image]})])
    (loaded,) = load_debug_rollout_data(template, 0)
    assert loaded.multimodal_inputs is not None
    assert loaded.multimodal_inputs["images"][0].getpixel((1, 1)) == (10, 20, 30)


def test_what_a_dump_cannot_hold_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"sample 1\.metadata\.client is a Namespace"):
        save_debug_rollout_data(str(tmp_path / "x.pt"), 0, [a_sample(0), a_sample(1, metadata={"client": Namespace()})])
    assert list(tmp_path.iterdir()) == []


def test_loading_a_dump_never_runs_its_code(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (marker,)

    torch.save({"rollout_id": 0, "samples": [Attack()]}, tmp_path / "0.pt")
    with pytest.raises(Exception, match=r"(?i)weights.?only"):
        load_debug_rollout_data(str(tmp_path / "{rollout_id}.pt"), 0)
    assert not marker.exists()


@pytest.mark.parametrize(("share", "kept"), [(0.5, [0, 1, 7, 8, 9]), (0.4, [0, 1, 8, 9]), (1, list(range(10)))])
def test_a_subsample_is_taken_from_both_ends(tmp_path: Path, share: float, kept: list[int]) -> None:
    template = str(tmp_path / "{rollout_id}.pt")
    save_debug_rollout_data(template, 0, [a_sample(i) for i in range(10)])
    assert [sample.index for sample in load_debug_rollout_data(template, 0, subsample=share)] == kept


def test_a_subsample_of_nothing_or_more_than_all_is_an_error(tmp_path: Path) -> None:
    template = str(tmp_path / "{rollout_id}.pt")
    save_debug_rollout_data(template, 0, [a_sample()])
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match="share above 0"):
            load_debug_rollout_data(template, 0, subsample=share)


def test_a_train_dump_lists_the_samples_in_rollout_order(tmp_path: Path) -> None:
    def shard(rank: int, partition: list[int]) -> dict[str, Any]:
        data = {
            "partition": partition,
            "tokens": [torch.tensor([p, p]) for p in partition],
            "advantages": [torch.tensor([float(p)]) for p in partition],
            "sample_indices": [100 + p for p in partition],
            "raw_reward": [0.0, 1.0, 2.0, 3.0],
            "micro_batch_indices": [[0], [1]],
            "num_microbatches": [2],
            "global_batch_sizes": [4],
        }
        return {"rank": rank * 2, "data_parallel_rank": rank, "rollout_data": data}

    dump = build_train_dump(5, 0, [shard(0, [0, 3]), shard(1, [2, 1])])
    path = save_debug_train_data(str(tmp_path / "{rollout_id}_{rank}.pt"), dump)
    assert path.name == "5_0.pt"
    loaded = torch.load(path, weights_only=True)
    assert loaded["format_version"] == 2 and loaded["raw_reward"] == [0.0, 1.0, 2.0, 3.0]
    rows = loaded["samples"]
    assert [row["rollout_position"] for row in rows] == [0, 1, 2, 3]
    assert [row["data_parallel_rank"] for row in rows] == [0, 1, 1, 0]
    assert [row["sample_index"] for row in rows] == [100, 101, 102, 103]
    assert [int(row["tokens"][0]) for row in rows] == [0, 1, 2, 3]
    assert all("micro_batch_indices" not in row and "raw_reward" not in row for row in rows)
    assert loaded["dp_shards"][1]["partition"] == [2, 1] and loaded["dp_shards"][1]["rank"] == 2
