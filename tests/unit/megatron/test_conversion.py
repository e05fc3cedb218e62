"""A model goes from HuggingFace's format to Megatron's and back, and into a run, without a bit changed."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from slime.models.hf_folder import HfReader
from slime.utils import checkpoint_folder as cf
from tests.distributed import tiny
from tests.distributed.pool import RankPool

TOOLS = Path(__file__).resolve().parents[3] / "tools"


def _run_tool(rank: int, world_size: int, port: int, name: str, words: list[str]) -> Any:
    """The tool in a fork where Megatron is imported: exit code, what it printed, what it said on stderr."""
    import contextlib
    import io

    out, err = io.StringIO(), io.StringIO()
    sys.argv = [f"{name}.py", *words]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as left:
        runpy.run_path(str(TOOLS / f"{name}.py"), run_name="__main__")
    return left.value.code, out.getvalue(), err.getvalue()


def to_megatron(ranks: RankPool, *words: object) -> Any:
    return ranks.run(_run_tool, 1, "convert_hf_to_torch_dist", list(map(str, words)))[0]


def to_hf(ranks: RankPool, *words: object) -> Any:
    return ranks.run(_run_tool, 1, "convert_torch_dist_to_hf", list(map(str, words)))[0]


def _train(rank: int, world_size: int, port: int, args: Any, rollouts: Any) -> Any:
    return tiny.train(args, rank, world_size, port, rollouts)


def _save_both(rank: int, world_size: int, port: int, args: Any) -> None:
    from slime.backends.megatron.trainer import MegatronTrainer

    trainer = MegatronTrainer(args, rank, world_size, "127.0.0.1", port)
    trainer.init()
    trainer.train(0, tiny.shard_of(trainer, tiny.rollout(seed=1)))
    trainer.save(0)
    trainer.save_hf(f"{args.save}/hf")


def same_tensors(ours: Path, theirs: Path) -> bool:
    mine, yours = HfReader(ours), HfReader(theirs)
    assert sorted(mine.names()) == sorted(yours.names())
    return all(
        mine.tensor(name).dtype == yours.tensor(name).dtype and torch.equal(mine.tensor(name), yours.tensor(name))
        for name in mine.names()
    )


@pytest.mark.parametrize(
    ("family", "is_tied", "dtype"), [("llama", True, torch.bfloat16), ("qwen3", False, torch.float32)]
)
def test_there_and_back_is_the_same_folder(
    ranks: RankPool, tmp_path: Path, family: str, is_tied: bool, dtype: torch.dtype
) -> None:
    model = tiny.save_hf_model(tmp_path / "model", family, tie_word_embeddings=is_tied)
    if dtype is torch.bfloat16:
        from transformers import AutoModelForCausalLM

        AutoModelForCausalLM.from_pretrained(model).to(dtype).save_pretrained(model)
    code, out, err = to_megatron(ranks, "--hf-checkpoint", model, "--save", tmp_path / "megatron")
    assert (code, err) == (0, ""), err
    assert "--load" in out
    code, _, err = to_hf(
        ranks, "--input-dir", tmp_path / "megatron", "--output-dir", tmp_path / "back", "--origin-hf-dir", model
    )
    assert (code, err) == (0, ""), err
    assert same_tensors(model, tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_text() and (tmp_path / "back" / "tokenizer_config.json").is_file()
    assert not list(tmp_path.glob(".*")), "nothing unfinished"


def test_a_run_starts_from_a_converted_model_with_its_weights_alone(ranks: RankPool, tmp_path: Path) -> None:
    """In any layout; the run begins at rollout 0, with a new optimizer."""
    model = tiny.save_hf_model(tmp_path / "model", "llama")
    assert to_megatron(ranks, "--hf-checkpoint", model, "--save", tmp_path / "megatron")[0] == 0
    assert cf.find_checkpoint(tmp_path / "megatron") == cf.Checkpoint(tmp_path / "megatron", None)
    direct = ranks.run(_train, 1, tiny.training_args(model), [])[0]
    load = str(tmp_path / "megatron")
    started = ranks.run(_train, 2, tiny.training_args(model, load=load, tensor_model_parallel_size=2), [])[0]
    assert started["start"] == 0
    assert tiny.largest_difference(started["weights"], direct["weights"]) == 0


def test_a_checkpoint_of_a_run_converts_to_what_the_run_exports(ranks: RankPool, tmp_path: Path) -> None:
    """Saved by two tensor-parallel ranks, which pad the vocabulary. transformers loads the export."""
    from transformers import AutoModelForCausalLM

    model = tiny.save_hf_model(tmp_path / "model", "llama")
    args = tiny.training_args(model, save=str(tmp_path / "save"), tensor_model_parallel_size=2, bf16=True)
    ranks.run(_save_both, 2, args)
    words = ["--input-dir", tmp_path / "save" / "iter_0000000", "--output-dir", tmp_path / "hf"]
    assert to_hf(ranks, *words, "--origin-hf-dir", model)[0] == 0
    assert same_tensors(tmp_path / "hf", tmp_path / "save" / "hf")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "save" / "hf", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr(), "tied, as the model is"
    weights = loaded.state_dict()
    reader = HfReader(tmp_path / "hf")
    assert all(torch.equal(weights[name], reader.tensor(name)) for name in reader.names())


def test_mistakes_are_explained(ranks: RankPool, tmp_path: Path) -> None:
    model = tiny.save_hf_model(tmp_path / "model", "llama")
    untied = tiny.save_hf_model(tmp_path / "untied", "llama", tie_word_embeddings=False)
    saved = ["--save", tmp_path / "megatron"]
    code, _, err = to_megatron(ranks, "--hf-checkpoint", model, "--num-layers", 5, *saved)
    assert code == 1 and "--num-layers is 5" in err
    code, _, err = to_megatron(ranks, "--hf-checkpoint", tmp_path / "nowhere", *saved)
    assert code == 1 and "there is no such folder" in err
    code, _, err = to_megatron(ranks, "--hf-checkpoint", model, "--padded-vocab-size", 256, *saved)
    assert code == 1 and "leave it out" in err
    assert to_megatron(ranks, "--hf-checkpoint", model, *saved)[0] == 0
    back = ["--input-dir", tmp_path / "megatron", "--output-dir", tmp_path / "back"]
    code, _, err = to_hf(ranks, *back, "--origin-hf-dir", untied)
    assert code == 1 and "holds no output layer, but config.json" in err
    code, _, err = to_hf(ranks, "--input-dir", model, *back[2:], "--origin-hf-dir", model)
    assert code == 1 and "is no Megatron checkpoint" in err
    assert to_hf(ranks, *back, "--origin-hf-dir", model)[0] == 0
    code, _, err = to_hf(ranks, *back, "--origin-hf-dir", model)
    assert code == 1 and "give -f to replace it" in err
    assert to_hf(ranks, *back, "--origin-hf-dir", model, "-f", "--chunk-size", 20000)[0] == 0
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    (tmp_path / "megatron" / cf.LATEST_FILE).write_text("3\n")
    code, _, err = to_megatron(ranks, "--hf-checkpoint", model, *saved)
    assert code == 1 and "holds checkpoints of a run" in err


@pytest.mark.parametrize("tool", ["convert_hf_to_torch_dist", "convert_torch_dist_to_hf"])
def test_the_tools_explain_themselves(tool: str) -> None:
    shown = subprocess.run([sys.executable, TOOLS / f"{tool}.py", "--help"], capture_output=True, text=True, check=True)
    assert "one process on the CPU" in shown.stdout
