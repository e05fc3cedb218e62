"""Command lines of launch scripts and of the guide parse, and `args` has what plug-ins read."""

import json
import pickle
import shlex
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest

from slime.arguments import build_args, get_slime_extra_args_provider, megatron_fields, parse_args, slime_validate_args
from slime.arguments.parser import FlagParser
from slime.config import ConfigError, Machine
from tests.unit.arguments.wrong_command_lines import TINY_QWEN3, make_model, make_rows, right_command_line

SCRIPTS = sorted((Path(__file__).resolve().parents[3] / "scripts" / "models").glob("*.sh"))
# script -> architecture, and (layers, hidden, MLP, heads, groups, rotary base, eps, tied) of the published config.json
PUBLISHED = {
    "llama3.1-8B-Instruct": ("LlamaForCausalLM", 32, 4096, 14336, 32, 8, 500000, 1e-5, False),
    "llama3.2-3B-Instruct": ("LlamaForCausalLM", 28, 3072, 8192, 24, 8, 500000, 1e-5, True),
    "llama3.2-3B-Instruct-amd": ("LlamaForCausalLM", 28, 3072, 8192, 24, 8, 500000, 1e-5, True),
    "qwen2.5-0.5B": ("Qwen2ForCausalLM", 24, 896, 4864, 14, 2, 1000000, 1e-6, True),
    "qwen2.5-1.5B": ("Qwen2ForCausalLM", 28, 1536, 8960, 12, 2, 10000, 1e-6, True),
    "qwen2.5-3B": ("Qwen2ForCausalLM", 36, 2048, 11008, 16, 2, 1000000, 1e-6, True),
    "qwen2.5-7B": ("Qwen2ForCausalLM", 28, 3584, 18944, 28, 4, 1000000, 1e-6, False),
    "qwen2.5-32B": ("Qwen2ForCausalLM", 64, 5120, 27648, 40, 8, 1000000, 1e-5, False),
    "qwen3-0.6B": ("Qwen3ForCausalLM", 28, 1024, 3072, 16, 8, 1000000, 1e-6, True),
    "qwen3-1.7B": ("Qwen3ForCausalLM", 28, 2048, 6144, 16, 8, 1000000, 1e-6, True),
    "qwen3-4B": ("Qwen3ForCausalLM", 36, 2560, 9728, 32, 8, 1000000, 1e-6, True),
    "qwen3-4B-Instruct-2507": ("Qwen3ForCausalLM", 36, 2560, 9728, 32, 8, 5000000, 1e-6, True),
    "qwen3-8B": ("Qwen3ForCausalLM", 36, 4096, 12288, 32, 8, 1000000, 1e-6, False),
    "qwen3-14B": ("Qwen3ForCausalLM", 40, 5120, 17408, 40, 8, 1000000, 1e-6, False),
    "qwen3-32B": ("Qwen3ForCausalLM", 64, 5120, 25600, 64, 8, 1000000, 1e-6, False),
}

VOCABULARY = {"qwen2.5-7B": 152064, "qwen2.5-32B": 152064}  # the others' go by their family


def model_args(script: Path) -> list[str]:
    """The array that a script defines, as bash expands it."""
    command = f"source {shlex.quote(str(script))}; printf '%s\\n' ${{MODEL_ARGS[@]}}"
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout.split()


def published_model(folder: Path, name: str) -> Path:
    """A model folder with the published numbers of a script's model."""
    architecture, layers, hidden, mlp, heads, groups, base, eps, is_tied = PUBLISHED[name]
    config = TINY_QWEN3 | {
        "architectures": [architecture], "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": mlp,
        "num_attention_heads": heads, "num_key_value_heads": groups, "rope_theta": base, "rms_norm_eps": eps,
        "tie_word_embeddings": is_tied, "head_dim": 128 if architecture != "Qwen2ForCausalLM" else hidden // heads,
        "vocab_size": 151936,
    }  # fmt: skip
    if name.startswith("llama"):
        factor = 8.0 if "3.1" in name else 32.0
        config["rope_scaling"] = {"rope_type": "llama3", "factor": factor}
    return make_model(folder / name, config)


def test_every_published_model_has_a_script() -> None:
    assert {script.stem for script in SCRIPTS} >= PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_script_describes_the_published_model(
    name: str, files: dict[str, str], tmp_path: Path, laptop: Machine
) -> None:
    script = next(s for s in SCRIPTS if s.stem == name)
    words = right_command_line(files, f"--hf-checkpoint {published_model(tmp_path, name)}")
    args = build_args([*words, *model_args(script)], machine=laptop)
    _, layers, hidden, mlp, heads, groups, base, eps, is_tied = PUBLISHED[name]
    assert (args.num_layers, args.hidden_size, args.ffn_hidden_size) == (layers, hidden, mlp)
    assert (args.num_attention_heads, args.num_query_groups) == (heads, groups)
    assert (args.rotary_base, args.norm_epsilon) == (base, eps)
    assert args.untie_embeddings_and_output_weights is not is_tied
    assert args.swiglu and not args.add_bias_linear and args.normalization == "RMSNorm"
    assert args.vocab_size == VOCABULARY.get(name, 128256 if name.startswith("llama") else 151936)
    assert args.kv_channels == (hidden // heads if name.startswith("qwen2.5") else 128)
    assert args.qk_layernorm is name.startswith("qwen3") and args.add_qkv_bias is name.startswith("qwen2.5")
    assert args.use_rope_scaling is name.startswith("llama")


def test_a_model_script_and_config_json_give_the_same_args(
    files: dict[str, str], tmp_path: Path, laptop: Machine
) -> None:
    """The script's flags may be left out: the shape is then read."""
    script = next(s for s in SCRIPTS if s.stem == "qwen3-4B")
    words = right_command_line(files, f"--hf-checkpoint {published_model(tmp_path, 'qwen3-4B')}")
    told, read = (build_args([*words, *more], machine=laptop) for more in (model_args(script), []))
    told_fields, read_fields = (megatron_fields(args) for args in (told, read))
    assert told_fields == read_fields


GUIDE = {
    "quick start": """--actor-num-nodes 1 --actor-num-gpus-per-node 4 --rollout-num-gpus 4 --advantage-estimator grpo
        --use-kl-loss --kl-loss-coef 0.001 --rollout-batch-size 32 --n-samples-per-prompt 8 --global-batch-size 256
        --num-rollout 3000 --prompt-data {data}""",
    "standard": """--actor-num-nodes 1 --actor-num-gpus-per-node 8 --rollout-num-gpus 8 --advantage-estimator grpo
        --use-kl-loss --kl-loss-coef 0.001 --prompt-data {data} --input-key prompt --label-key label
        --apply-chat-template --rollout-batch-size 32 --n-samples-per-prompt 8 --global-batch-size 256
        --num-rollout 3000 --save-interval 100 --eval-interval 50""",
    "colocated": """--colocate --actor-num-gpus-per-node 8 --sglang-mem-fraction-static 0.4 --rollout-batch-size 32
        --num-rollout 1 --prompt-data {data}""",
    "kinds of arguments": """--tensor-model-parallel-size 2 --pipeline-model-parallel-size 1 --colocate
        --actor-num-gpus-per-node 8 --sglang-mem-fraction-static 0.8 --sglang-context-length 8192
        --sglang-log-level INFO --rollout-batch-size 32 --n-samples-per-prompt 8 --global-batch-size 256
        --num-rollout 3000 --prompt-data {data}""",
    "problems": """--use-fault-tolerance --sglang-mem-fraction-static 0.85 --rollout-batch-size 16
        --update-weights-interval 5 --colocate --recompute-activations --micro-batch-size 1 --sequence-parallel
        --num-data-workers 4 --streaming-data --num-rollout 3 --prompt-data {data}""",
    "evaluation": """--eval-prompt-data aime {data} --eval-prompt-data gsm8k {data} --n-samples-per-eval-prompt 16
        --eval-interval 5 --colocate --rollout-batch-size 8 --num-rollout 3 --prompt-data {data}""",
    "multi-turn": """--custom-generate-function-path {dir}/custom_generate.py --max-turns 5 --prompt-data {chat}
        --colocate --rollout-batch-size 8 --num-rollout 3""",
    "custom reward": """--custom-rm-path {dir}/custom_rm.py --rm-model-path judge --prompt-data {data}
        --colocate --rollout-batch-size 8 --num-rollout 3""",
}
GUIDE_FILES = {
    "custom_generate.py": '''
async def custom_generate(args, samples, evaluation=False):
    """Multi-turn generation with tool calling."""
    for sample in samples:
        for turn in range(args.max_turns):
            response = await generate_single(sample.prompt)
        sample.response = response
    return samples


async def generate_single(conversation): ...
''',
    "custom_rm.py": """
class CustomRewardModel:
    def __init__(self, model_path):
        self.model = load_model(model_path)

    def compute_reward(self, prompts, responses):
        return self.model(prompts, responses).tolist()


def load_model(path): ...
""",
}


@pytest.mark.parametrize("name", GUIDE)
def test_the_guides_command_lines_run_on_gpus(name: str, files: dict[str, str]) -> None:
    """What no default can know comes through CKPT_ARGS, as the guide's arrays do."""
    machine = Machine(cores=64, num_gpus=16, has_sglang=True)
    for file, text in GUIDE_FILES.items():
        (Path(files["dir"]) / file).write_text(text)
    words = GUIDE[name]
    for placeholder, path in files.items():
        words = words.replace("{" + placeholder + "}", path)
    ckpt_args = ["--hf-checkpoint", files["model"], *([] if "--custom-rm-path" in words else ["--rm-type", "math"])]
    args = build_args([*words.split(), *ckpt_args], machine=machine)
    assert args.rollout_batch_size * args.n_samples_per_prompt == args.global_batch_size * args.num_steps_per_rollout
    assert (args.device, args.rollout_engine, args.bf16) == ("cuda", "sglang", True)


def test_the_guides_asynchronous_line_runs(files: dict[str, str]) -> None:
    words = right_command_line(
        files, "--actor-num-gpus-per-node 8 --rollout-num-gpus 8 --async-buffer-size 4 --update-weights-interval 2",
        ("--device", "--cpu-devices"),
    )  # fmt: skip
    args = build_args(words, loop="async", machine=Machine(cores=64, num_gpus=16, has_sglang=True))
    assert (args.async_buffer_size, args.update_weights_interval) == (4, 2)


def test_a_whole_recipe_parses(files: dict[str, str]) -> None:
    """Flags of the published launch scripts, all together."""
    words = right_command_line(files, """
        --ref-load {model} --load {dir}/ckpt --save {dir}/ckpt --save-interval 20 --rollout-shuffle
        --rollout-max-response-len 8192 --rollout-temperature 1 --over-sampling-batch-size 8 --balance-data
        --dynamic-sampling-filter-path slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std
        --eval-interval 20 --eval-prompt-data aime {data} --n-samples-per-eval-prompt 16 --eval-top-p 0.7
        --sequence-parallel --pipeline-model-parallel-size 1 --context-parallel-size 1 --expert-model-parallel-size 1
        --expert-tensor-parallel-size 1 --recompute-granularity full --recompute-method uniform
        --recompute-num-layers 1 --use-dynamic-batch-size --max-tokens-per-gpu 9216
        --advantage-estimator grpo --use-kl-loss --kl-loss-coef 0.00 --kl-loss-type low_var_kl --entropy-coef 0.00
        --eps-clip 0.2 --eps-clip-high 0.28 --optimizer adam --lr 1e-6 --lr-decay-style constant --weight-decay 0.1
        --adam-beta1 0.9 --adam-beta2 0.98 --use-wandb --wandb-project p --wandb-group g
        --sglang-mem-fraction-static 0.7 --sglang-cuda-graph-max-bs-decode 16 --router-policy consistent_hashing
        --attention-dropout 0.0 --hidden-dropout 0.0 --accumulate-allreduce-grads-in-fp32
        --attention-softmax-in-fp32 --attention-backend flash --no-check-for-nan-in-loss-and-grad --use-tis
        --num-gpus-per-node 8 --colocate --actor-num-gpus-per-node 8 --n-samples-per-prompt 8
        --global-batch-size 32 --transformer-impl transformer_engine --log-passrate
    """, ("--device", "--cpu-devices"))  # fmt: skip
    args = build_args(words, machine=Machine(cores=64, num_gpus=8, has_sglang=True))
    fields = megatron_fields(args)
    assert fields["grad_reduce_in_fp32"] is True
    assert fields["check_for_nan_in_grad"] is False
    assert (fields["adam_beta2"], fields["weight_decay"], fields["attention_backend"]) == (0.98, 0.1, "flash")
    assert fields["layernorm_epsilon"] == args.layernorm_epsilon == args.norm_epsilon == 1e-6
    assert fields["gated_linear_unit"] and fields["use_distributed_optimizer"]
    assert args.sglang_mem_fraction_static == 0.7
    assert args.sglang_tp_size == args.sglang_tensor_parallel_size == 1


def test_a_mixture_of_experts_is_described_by_its_flags() -> None:
    """Its architecture cannot be trained yet, but the flags of its script are known."""
    from slime.arguments.parser import read_command_line

    words = """--moe-layer-freq [0]*3+[1]*58 --num-experts 256 --moe-router-topk 8 --moe-grouped-gemm
        --moe-router-load-balancing-type seq_aux_loss --multi-latent-attention --q-lora-rank 1536 --no-rope-fusion
        --moe-aux-loss-coeff 0 --moe-router-dtype fp32 --spec slime_plugins.models.glm5.glm5 get_glm5_spec"""
    line = read_command_line(words.split())
    line.problems.raise_if_any()
    assert line.values["moe_layer_freq"] == [0] * 3 + [1] * 58
    assert line.values["moe_router_load_balancing_type"] == "seq_aux_loss"
    assert line.values["moe_aux_loss_coeff"] == 0.0
    assert line.values["spec"] == ["slime_plugins.models.glm5.glm5", "get_glm5_spec"]


# ---- what args has ----


def test_only_what_was_said_or_forced_reaches_megatrons_configs(files: dict[str, str], laptop: Machine) -> None:
    fields = megatron_fields(build_args(right_command_line(files, "--adam-beta1 0.8"), machine=laptop))
    assert fields["adam_beta1"] == 0.8
    assert "adam_beta2" not in fields, "the dataclass's own default holds"
    assert fields["num_layers"] == 4, "config.json says so"
    assert fields["lr"] == 1e-6, "slime's default, not the dataclass's None"
    assert fields["hidden_dropout"] == 0.0


def test_args_are_flat_mutable_and_can_be_sent_to_an_actor(files: dict[str, str], laptop: Machine) -> None:
    args = build_args(right_command_line(files), machine=laptop)
    args.something_of_a_plugin = 1
    assert vars(pickle.loads(pickle.dumps(args))) == vars(args)
    assert not hasattr(args, "offload")
    assert args.plan.placement.num_engines == args.rollout_num_engines


def test_without_engines_there_are_no_engine_attributes(files: dict[str, str], laptop: Machine) -> None:
    args = build_args(right_command_line(files, "--debug-train-only --sglang-mem-fraction-static 0.5"), machine=laptop)
    assert not [name for name in vars(args) if name.startswith(("sglang_", "router_"))]


def test_flags_of_a_plugin_come_first_and_slimes_defaults_win(files: dict[str, str], laptop: Machine) -> None:
    def add(parser: FlagParser) -> FlagParser:
        parser.add_argument("--my-flag", type=int, default=3)
        parser.add_argument("--rollout-seed", type=int, default=7)
        return parser

    args = build_args(right_command_line(files, "--my-flag 4"), add, machine=laptop)
    assert (args.my_flag, args.rollout_seed) == (4, 42)
    assert build_args(right_command_line(files), add, machine=laptop).my_flag == 3


def test_a_plugins_misspelt_flag_is_suggested(files: dict[str, str], laptop: Machine) -> None:
    with pytest.raises(ConfigError, match="--my-flags: there is no such flag. Did you mean --my-flag"):
        build_args(
            right_command_line(files, "--my-flags 4"),
            lambda parser: parser.add_argument("--my-flag") and parser,
            machine=laptop,
        )


def test_a_yaml_file_overrules_the_command_line_before_anything_is_derived(
    files: dict[str, str], tmp_path: Path, laptop: Machine
) -> None:
    path = tmp_path / "more.yaml"
    path.write_text(
        "lr: 1e-5\nnormalize_advantages: true\nmax_turns: 5\nn_samples_per_prompt: 2\nsearch_url: http://127.0.0.1:1\n"
    )
    args = build_args(right_command_line(files, f"--custom-config-path {path}"), machine=laptop)
    assert (args.lr, args.max_turns, args.search_url) == (1e-5, 5, "http://127.0.0.1:1")
    assert args.global_batch_size == 8


def test_a_slice_of_the_prompts_may_count_from_the_end(files: dict[str, str], laptop: Machine) -> None:
    args = build_args(right_command_line(files, "--prompt-data {data}@[-2:]"), machine=laptop)
    assert args.prompt_data.endswith("@[-2:]")


def test_only_the_first_hundred_rows_are_read(files: dict[str, str], tmp_path: Path, laptop: Machine) -> None:
    rows: list[object] = [{"prompt": "1", "label": "1"}] * 100 + ["not a row"]
    path = make_rows(tmp_path / "long.jsonl", rows)
    build_args(right_command_line(files, f"--prompt-data {path}"), machine=laptop)
    with pytest.raises(ConfigError, match="long.jsonl:101"):
        build_args(right_command_line(files, f"--prompt-data {path}@[1:]"), machine=laptop)


def test_parquet_rows_are_checked_like_json(files: dict[str, str], tmp_path: Path, laptop: Machine) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "1 + 1", "label": "2"}]), path)
    assert build_args(right_command_line(files, f"--prompt-data {path}"), machine=laptop).label_key == "label"
    with pytest.raises(ConfigError, match=r"rows.parquet:1: the row has no field 'question'"):
        build_args(right_command_line(files, f"--prompt-data {path} --input-key question"), machine=laptop)


def test_a_row_may_name_its_own_reward(files: dict[str, str], tmp_path: Path, laptop: Machine) -> None:
    path = make_rows(tmp_path / "own.jsonl", [{"prompt": "1", "label": "1", "metadata": {"rm_type": "math"}}])
    args = build_args(right_command_line(files, f"--prompt-data {path}", ("--rm-type",)), machine=laptop)
    assert args.rm_type is None


def test_a_notebook_may_use_the_parser_and_the_rules_on_their_own(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slime.config.machine._num_gpus", lambda environ: 0)
    parser = get_slime_extra_args_provider()(FlagParser())
    args = parser.parse_args(right_command_line(files, "--eps-clip 0.3"))
    assert isinstance(args, Namespace)
    assert args.lr == 1e-6
    slime_validate_args(args)
    assert (args.eps_clip_high, args.global_batch_size, args.num_layers) == (0.3, 32, 4)


def test_parse_args_takes_the_plugins_function_alone(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", *right_command_line(files, "--mine 1")])
    args = parse_args(lambda parser: parser.add_argument("--mine", type=int) and parser)
    assert args.mine == 1
    assert capsys.readouterr().err.startswith("train.py: cpu (--device cpu), embedded engine (no GPU)")


def test_hf_config_of_a_vision_model_is_its_text_config(tmp_path: Path, files: dict[str, str], laptop: Machine) -> None:
    inner = {k: v for k, v in TINY_QWEN3.items() if k != "architectures"}
    folder = make_model(tmp_path / "vl", {"architectures": ["Qwen3ForCausalLM"], "text_config": inner})
    assert json.loads((folder / "config.json").read_text())["text_config"]["num_hidden_layers"] == 4
    assert build_args(right_command_line(files, f"--hf-checkpoint {folder}"), machine=laptop).num_layers == 4
