"""A corpus of wrong command lines: each breaks one rule, and its error must name the flag and the fix.

`{model}`, `{data}`, `{dir}` and so on stand for files that `make_files` writes.
"""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from slime.config.config import FULLY_ASYNC_ROLLOUT

BASE = {
    "--hf-checkpoint": "{model}",
    "--prompt-data": "{data}",
    "--rm-type": "math",
    "--rollout-batch-size": "4",
    "--n-samples-per-prompt": "8",
    "--num-rollout": "3",
    "--device": "cpu",
    "--cpu-devices": "8",
}
"""A command line that is right."""


@dataclass(frozen=True)
class Wrong:
    """One wrong command line.

    Attributes:
        rule: what it breaks, in words; also the test's name.
        words: what is added to `BASE`.
        flag: must be in the message.
        fix: must be in the message: what to type instead.
        without: flags of `BASE` that are left out.
        loop: `async` for train_async.py.
    """

    rule: str
    words: str
    flag: str
    fix: str
    without: tuple[str, ...] = ()
    loop: str = "sync"

    def command_line(self, files: dict[str, str]) -> list[str]:
        """The words after the program's name."""
        base = [word for flag, value in BASE.items() if flag not in self.without for word in (flag, value)]
        return [_filled(word, files) for word in [*base, *shlex.split(self.words)]]


def right_command_line(files: dict[str, str], words: str = "", without: tuple[str, ...] = ()) -> list[str]:
    """`BASE` with more words, as one would type it."""
    return Wrong("", words, "", "", without).command_line(files)


def _filled(word: str, files: dict[str, str]) -> str:
    for name, value in files.items():
        word = word.replace("{" + name + "}", value)
    return word


TINY_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 1000,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}

_PLUGINS = """
import torch_that_is_not_there  # importing this file would fail


def reward(args, sample):
    return 1.0


async def graded(args, sample, **kwargs):
    return 1.0


async def needs_more(args, sample, temperature):
    return 1.0


def keep(args):
    return True


async def convert(args, samples):
    return {}


def rollout(args, rollout_id, data_source):
    return []


def generate(args, sample, sampling_params):
    return 1.0


class Source:
    def add_samples(self, samples):
        pass


class Judge:
    def __init__(self, model_path):
        self.model_path = model_path

    def compute_reward(self, prompts, responses):
        return []


class Silent:
    pass
"""


def make_model(folder: Path, config: dict[str, object] | None = None, *, chat_template: bool = True) -> Path:
    """A folder that looks like a tiny model's to anything that does not read its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or TINY_QWEN3))
    (folder / "tokenizer.json").write_text("{}")
    template = {"chat_template": "{{ messages }}"} if chat_template else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(template))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def make_rows(path: Path, rows: list[object]) -> Path:
    """A .jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_files(folder: Path) -> dict[str, str]:
    """Writes every file that the corpus names; placeholder -> path."""
    good = [{"prompt": f"{n} + {n} =", "label": str(2 * n)} for n in range(5)]
    chat = [{"prompt": [{"role": "user", "content": "1 + 1?"}], "label": "2"}]
    (folder / "bad.jsonl").write_text('{"prompt": "1 + 1 =", "label": "2"}\n\n{"prompt": "2 + 2 =", label: 4}\n')
    (folder / "empty.jsonl").write_text("")
    (folder / "prompts.txt").write_text("1 + 1 =\n")
    (folder / "my_plugins.py").write_text(_PLUGINS)
    (folder / "broken.py").write_text("def reward(args, sample:\n    pass\n")
    (folder / "roles.yaml").write_text("megatron:\n  - {name: judge, role: judge, overrides: {lr: 1e-5}}\n")
    (folder / "list.yaml").write_text("- max_turns\n")
    (folder / "values.yaml").write_text("rollout_batch_size: many\n")
    (folder / "eval.yaml").write_text("eval:\n  datasets:\n    - {name: aime}\n")
    (folder / "eval_key.yaml").write_text(
        f"eval:\n  datasets:\n    - {{name: aime, path: {folder}/good.jsonl, temprature: 0}}\n"
    )
    (folder / "nothing").mkdir()
    files = {
        "dir": folder,
        "data": make_rows(folder / "good.jsonl", good),
        "chat": make_rows(folder / "chat.jsonl", chat),
        "no_label": make_rows(folder / "no_label.jsonl", [{"prompt": "1 + 1 =", "answer": "2"}]),
        "late": make_rows(folder / "late.jsonl", [*good, {"prompt": "6 + 6 ="}]),
        "number": make_rows(folder / "number.jsonl", [{"prompt": 5, "label": "5"}]),
        "model": make_model(folder / "model"),
        "plain_model": make_model(folder / "plain_model", chat_template=False),
        "gpt2": make_model(folder / "gpt2", TINY_QWEN3 | {"architectures": ["GPT2LMHeadModel"]}),
        "yarn": make_model(folder / "yarn", TINY_QWEN3 | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
        "weightless": make_model(folder / "weightless"),
    }
    (folder / "weightless" / "model.safetensors").unlink()
    return {name: str(path) for name, path in files.items()}


WRONG_COMMAND_LINES = (
    # the command line itself
    Wrong("a flag that does not exist", "--rolout-temperature 1", "--rolout-temperature", "--rollout-temperature"),
    Wrong("an sglang flag that does not exist", "--sglang-mem-fraction 0.8", "--sglang-mem-fraction",
          "--sglang-mem-fraction-static"),
    Wrong("a server's argument that slime sets", "--sglang-tp-size 2", "--sglang-tp-size",
          "--rollout-num-gpus-per-engine"),
    Wrong("an abbreviation", "--rollout-temp 1", "--rollout-temp", "--rollout-temperature"),
    Wrong("a word that belongs to no flag", "--lr 1e-5 oops", "'oops'", "quote a value"),
    Wrong("a number that is none", "--lr fast", "--lr", "1e-6"),
    Wrong("a whole number that is none", "--num-epoch 1.5", "--num-epoch", "whole number"),
    Wrong("a choice that is none", "--advantage-estimator gpro", "--advantage-estimator", "grpo"),
    Wrong("a flag without its value", "--lr", "--lr", "type a value after it"),
    Wrong("a switch with a value", "--colocate=yes", "--colocate", "type --colocate alone"),
    Wrong("JSON that is none", "--apply-chat-template-kwargs {a:1}", "--apply-chat-template-kwargs",
          '{"key": "value"}'),
    Wrong("a list expression that is none", "--moe-layer-freq [0]*x", "--moe-layer-freq", "[0]*3+[1]*58"),
    # what no default can know
    Wrong("everything missing", "", "--hf-checkpoint", "--rollout-batch-size N", tuple(BASE)),
    Wrong("no length of the run", "", "--num-rollout", "--num-epoch N", ("--num-rollout",)),
    Wrong("no reward", "", "--rm-type", "--custom-rm-path FILE", ("--rm-type",)),
    Wrong("no prompts", "", "--prompt-data", "--prompt-data FILE", ("--prompt-data",)),
    # numbers
    Wrong("temperature 0", "--rollout-temperature 0", "--rollout-temperature", "above 0"),
    Wrong("a nucleus of nothing", "--rollout-top-p 0", "--rollout-top-p", "at most 1"),
    Wrong("no likeliest token", "--rollout-top-k 0", "--rollout-top-k", "at least 1"),
    Wrong("a negative interval", "--save-interval -1", "--save-interval", "at least 1"),
    Wrong("a sync every 0 rollouts", "--update-weights-interval 0", "--update-weights-interval", "at least 1"),
    Wrong("an empty buffer", "--async-buffer-size 0", "--async-buffer-size", "at least 1"),
    Wrong("a dual clip below 1", "--eps-clip-c 0.5", "--eps-clip-c", "above 1"),
    Wrong("a prompt as long as the context", "--rollout-max-context-len 64 --rollout-max-prompt-len 64",
          "--rollout-max-prompt-len", "at most 63"),
    Wrong("a learning rate that rises", "--lr 1e-6 --min-lr 1e-5", "--min-lr", "lower the one"),
    # the batch
    Wrong("a global batch that does not divide", "--global-batch-size 5", "--global-batch-size",
          "--global-batch-size 4"),
    Wrong("four numbers that do not multiply out", "--global-batch-size 32 --num-steps-per-rollout 2",
          "--num-steps-per-rollout", "--global-batch-size 16"),
    Wrong("steps that do not divide", "--num-steps-per-rollout 5", "--num-steps-per-rollout",
          "--num-steps-per-rollout 4"),
    Wrong("dynamic batches without a size", "--use-dynamic-batch-size", "--use-dynamic-batch-size",
          "--max-tokens-per-gpu"),
    Wrong("work balance without dynamic batches", "--balance-by-flops", "--balance-by-flops",
          "--use-dynamic-batch-size"),
    Wrong("unfinished samples in a deterministic run", "--partial-rollout --deterministic-mode", "--deterministic-mode",
          "drop one of them"),
    Wrong("unfinished samples of deterministic engines", "--partial-rollout --sglang-enable-deterministic-inference",
          "--sglang-enable-deterministic-inference", "drop one of them"),
    Wrong("fewer samples than ranks", "--actor-num-gpus-per-node 4 --global-batch-size 2 --num-steps-per-rollout 16",
          "--global-batch-size", "use at least 4"),
    Wrong("forward passes that cannot be shared", "--actor-num-gpus-per-node 3", "--micro-batch-size",
          "--use-dynamic-batch-size"),
    Wrong("over-sampling less than a batch", "--over-sampling-batch-size 2", "--over-sampling-batch-size",
          "at least 4"),
    # devices
    Wrong("too few devices", "--actor-num-gpus-per-node 8 --rollout-num-gpus 8", "needs 16 devices",
          "--cpu-devices"),
    Wrong("no engine for the weights", "--rollout-num-gpus 0", "--rollout-num-gpus 0", "--debug-rollout-only"),
    Wrong("a GPU that is not there", "--device cuda --rollout-num-gpus 1", "--device cuda", "--device cpu"),
    Wrong("SGLang that is not there", "--rollout-engine sglang", "--rollout-engine", "--rollout-engine embedded"),
    Wrong("engines that do not come out even", "--rollout-num-gpus 3 --rollout-num-gpus-per-engine 2",
          "--rollout-num-gpus-per-engine", "2 or 4"),
    Wrong("tensor parallel that does not divide the ranks", "--tensor-model-parallel-size 2",
          "--tensor-model-parallel-size", "use 2 ranks"),
    Wrong("tensor parallel that does not divide the heads",
          "--tensor-model-parallel-size 3 --actor-num-gpus-per-node 3", "--tensor-model-parallel-size", "is 2"),
    Wrong("stages that do not divide the layers", "--pipeline-model-parallel-size 3 --actor-num-gpus-per-node 3",
          "--pipeline-model-parallel-size", "--decoder-first-pipeline-num-layers"),
    Wrong("virtual stages that do not divide a stage", "--pipeline-model-parallel-size 2 --actor-num-gpus-per-node 2 "
          "--num-virtual-stages-per-pipeline-rank 3", "--num-virtual-stages-per-pipeline-rank", "use 2"),
    Wrong("layers of a virtual stage that do not divide a stage", "--pipeline-model-parallel-size 2 "
          "--actor-num-gpus-per-node 2 --num-layers-per-virtual-pipeline-stage 3",
          "--num-layers-per-virtual-pipeline-stage 3", "a divisor of that"),
    Wrong("virtual stages without a pipeline", "--num-virtual-stages-per-pipeline-rank 2",
          "--num-virtual-stages-per-pipeline-rank 2", "--pipeline-model-parallel-size 2"),
    Wrong("virtual stages said twice", "--pipeline-model-parallel-size 2 --actor-num-gpus-per-node 2 "
          "--num-virtual-stages-per-pipeline-rank 1 --virtual-pipeline-model-parallel-size 1",
          "--virtual-pipeline-model-parallel-size", "keep one of them"),
    Wrong("no virtual stage", "--pipeline-model-parallel-size 2 --actor-num-gpus-per-node 2 "
          "--num-virtual-stages-per-pipeline-rank 0", "--num-virtual-stages-per-pipeline-rank is 0",
          "--num-virtual-stages-per-pipeline-rank 2"),
    Wrong("layers of a virtual stage beside stages of their own size", "--pipeline-model-parallel-size 2 "
          "--actor-num-gpus-per-node 2 --num-layers-per-virtual-pipeline-stage 1 --decoder-first-pipeline-num-layers 1",
          "--num-layers-per-virtual-pipeline-stage", "--num-virtual-stages-per-pipeline-rank"),
    Wrong("groups of micro-batches without virtual stages", "--pipeline-model-parallel-size 2 "
          "--actor-num-gpus-per-node 2 --microbatch-group-size-per-vp-stage 2",
          "--microbatch-group-size-per-vp-stage 2", "--num-virtual-stages-per-pipeline-rank 2"),
    Wrong("groups of micro-batches that do not fill the pipeline", "--pipeline-model-parallel-size 2 "
          "--actor-num-gpus-per-node 2 --num-virtual-stages-per-pipeline-rank 1 "
          "--microbatch-group-size-per-vp-stage 1", "--microbatch-group-size-per-vp-stage 1", "use 2 or more"),
    Wrong("fp16 on a CPU", "--fp16", "--fp16", "drop the flag"),
    Wrong("turns in the asynchronous loop", "--colocate", "--colocate", "use train.py", loop="async"),
    Wrong("turns with groups in flight", f"--colocate --rollout-function-path {FULLY_ASYNC_ROLLOUT}",
          "--rollout-function-path", "--rollout-num-gpus"),
    Wrong("overlap with the same bits", "--deterministic-mode", "--deterministic-mode", "use train.py", loop="async"),
    Wrong("retraction with the same bits", "--deterministic-mode --pause-generation-mode retract",
          "--pause-generation-mode", "use abort"),
    Wrong("waiting for what is not in flight", "--partial-rollout --stale-samples wait", "--stale-samples wait",
          "use discard or mask", loop="async"),
    Wrong("engines that sleep while they generate", "--offload-rollout", "--offload-rollout", "use train.py",
          loop="async"),
    Wrong("recomputation without its kind", "--recompute-method uniform --recompute-num-layers 1",
          "--recompute-num-layers", "--recompute-granularity full"),
    Wrong("modules without their recomputation", "--recompute-modules mlp", "--recompute-modules",
          "--recompute-granularity selective"),
    Wrong("blocks of no layer", "--recompute-granularity full --recompute-method block --recompute-num-layers 0",
          "--recompute-num-layers is 0", "--recompute-num-layers 1"),
    Wrong("blocks that do not fill a stage",
          "--recompute-granularity full --recompute-method uniform --recompute-num-layers 3",
          "--recompute-num-layers 3", "use 2"),
    # what is passed on to servers
    Wrong("a variable that is a number", """--train-env-vars '{"NCCL_DEBUG": 1}'""", "--train-env-vars",
          """'{"NCCL_DEBUG": "1"}'"""),
    Wrong("both sides and not one of them", "--colocate --offload --no-offload-train", "--no-offload-train",
          "--offload-rollout"),
    Wrong("a server that is named twice", "--rollout-external-engine-addrs 10.0.0.1:80 10.0.0.1:80", "10.0.0.1:80",
          "once"),
    Wrong("a share of a GPU in percent", "--sglang-mem-fraction-static 40", "--sglang-mem-fraction-static",
          "below 1"),
    Wrong("an address of a server", "--sglang-host 0.0.0.0", "--sglang-host", "leave it out"),
    Wrong("a device of a server", "--sglang-device cuda", "--sglang-device cuda", "type --device cuda"),
    Wrong("a port of the router's metrics", "--router-prometheus-port 9000", "--router-prometheus-port",
          "leave it out"),
    Wrong("a deadline of the router alone", "--router-request-timeout-secs 60", "--router-request-timeout-secs",
          "--sglang-router-request-timeout-secs"),
    Wrong("engines that only prefill", "--sglang-disaggregation-mode prefill", "--sglang-disaggregation-mode",
          "--prefill-num-servers N"),
    Wrong("a response as long as the server's context",
          "--sglang-context-length 512 --rollout-max-response-len 512", "--rollout-max-response-len 512",
          "raise the other"),
    Wrong("a context longer than the server's", "--sglang-context-length 512 --rollout-max-context-len 1024",
          "--rollout-max-context-len 1024", "at most 512"),
    Wrong("replies without text", "--sglang-skip-tokenizer-init", "--sglang-skip-tokenizer-init", "drop it"),
    Wrong("full recomputation without its blocks", "--recompute-granularity full", "--recompute-granularity",
          "--recompute-method uniform"),
    # the algorithm
    Wrong("two KL terms", "--kl-coef 0.1 --kl-loss-coef 0.1", "--kl-loss-coef", "set one of them to 0"),
    Wrong("REINFORCE++ without whitening", "--advantage-estimator reinforce_plus_plus", "--advantage-estimator",
          "--normalize-advantages"),
    Wrong("a correction of nothing", "--use-rollout-logprobs --use-tis", "--use-rollout-logprobs", "drop one"),
    Wrong("a KL loss without its pass", "--use-kl-loss --disable-compute-advantages-and-returns", "--use-kl-loss",
          "drop one of the two flags"),
    Wrong("a policy loss without advantages", "--disable-compute-advantages-and-returns",
          "--disable-compute-advantages-and-returns", "--loss-type sft_loss"),
    Wrong("group rewards in an evaluation", "--group-rm --eval-interval 1 --eval-prompt-data a {data}", "--group-rm",
          "--eval-prompt-data"),
    Wrong("mismatch metrics without a function", "--get-mismatch-metrics", "--get-mismatch-metrics",
          "--custom-tis-function-path"),
    Wrong("a custom loss without one", "--loss-type custom_loss", "--loss-type", "--custom-loss-function-path"),
    Wrong("distillation without a place", "--use-opd", "--use-opd", "--opd-type"),
    Wrong("a teacher that is not used", "--opd-teacher-load {model}", "--opd-teacher-load", "--use-opd"),
    Wrong("a teacher that is not there", "--use-opd --opd-type megatron --opd-teacher-load {dir}/none",
          "--opd-teacher-load", "existing folder"),
    Wrong("MTP training without layers", "--enable-mtp-training", "--enable-mtp-training", "--mtp-num-layers"),
    Wrong("trained and frozen at once", "--only-train-params-name-list a --freeze-params-name-list b",
          "--freeze-params-name-list", "keep the one"),
    Wrong("a pattern that is none", "--freeze-params-name-list '['", "--freeze-params-name-list",
          "escape special characters"),
    Wrong("stateless Adam that is saved", "--use-stateless-adam", "--use-stateless-adam", "--no-save-optim"),
    Wrong("a reward that does not exist", "--rm-type maths", "--rm-type", "Did you mean math"),
    Wrong("a reward server without an address", "--rm-type remote_rm", "--rm-type", "--rm-url"),
    Wrong("a mapping as reward", "--rm-type dapo", "--rm-type", "--reward-key score"),
    Wrong("a reference that is not there", "--use-kl-loss --ref-load {dir}/none", "--ref-load", "leave the flag out"),
    # weights, checkpoints, dumps
    Wrong("weights through no files", "--update-weight-transport disk", "--update-weight-transport",
          "--update-weight-disk-dir"),
    Wrong("deltas through the network", "--update-weight-mode delta", "--update-weight-mode",
          "--update-weight-transport disk"),
    Wrong("a released trainer without a checkpoint", "--release-train", "--release-train", "--save DIR"),
    Wrong("a checkpoint that is none", "--load {dir}/nothing", "--load", "leave the flag out"),
    Wrong("exports that overwrite each other", "--save-interval 2 --save-hf export", "--save-hf", "{rollout_id}"),
    Wrong("dumps that overwrite each other", "--save-debug-rollout-data d{rollout_id} --save-debug-train-data "
          "d{rollout_id}", "--save-debug-train-data", "two different paths"),
    Wrong("a run that does nothing", "--debug-rollout-only --debug-train-only", "--debug-rollout-only",
          "drop one of them"),
    # engines
    Wrong("data-parallel engines without attention", "--sglang-dp-size 2", "--sglang-dp-size",
          "--sglang-enable-dp-attention"),
    Wrong("two ways to describe engines", "--prefill-num-servers 1 --rollout-external-engine-addrs h:1",
          "--prefill-num-servers", "keep one of them"),
    Wrong("an address that is none", "--rollout-external-engine-addrs localhost", "--rollout-external-engine-addrs",
          "127.0.0.1:30000"),
    Wrong("a router without its port", "--sglang-router-ip 127.0.0.1", "--sglang-router-ip",
          "--sglang-router-port"),
    Wrong("epochs without a data set", "--num-epoch 1 --disable-rollout-global-dataset", "--num-epoch",
          "--num-rollout N", ("--num-rollout",)),
    # the model
    Wrong("a model that is not there", "--hf-checkpoint {dir}/none", "--hf-checkpoint", "hf download"),
    Wrong("a folder that is no model", "--hf-checkpoint {dir}/nothing", "--hf-checkpoint", "config.json"),
    Wrong("an architecture that is not known", "--hf-checkpoint {gpt2}", "--hf-checkpoint", "LlamaForCausalLM"),
    Wrong("positions scaled by an unknown rule", "--hf-checkpoint {yarn}", "--hf-checkpoint", "Remove rope_scaling"),
    Wrong("a model without weights", "--hf-checkpoint {weightless}", "--hf-checkpoint", "download the whole model"),
    Wrong("no chat template", "--hf-checkpoint {plain_model} --apply-chat-template", "--apply-chat-template",
          "drop the flag"),
    Wrong("flags of another model", "--num-layers 28 --qk-layernorm --rotary-base 1000000", "--num-layers",
          "scripts/models/"),
    # the prompts
    Wrong("prompts that are not there", "--prompt-data {dir}/none.jsonl", "--prompt-data", "existing one"),
    Wrong("prompts in another format", "--prompt-data {dir}/prompts.txt", "--prompt-data", ".jsonl"),
    Wrong("no rows", "--prompt-data {dir}/empty.jsonl", "--prompt-data", "holds no rows"),
    Wrong("a slice that is none", "--prompt-data {data}@[first]", "--prompt-data", "file@[0:100]"),
    Wrong("a slice beyond the end", "--prompt-data {data}@[50:60]", "--prompt-data", "another slice"),
    Wrong("a row that is not JSON", "--prompt-data {dir}/bad.jsonl", "bad.jsonl:3", "correct or remove that line"),
    Wrong("a prompt field that is not there", "--input-key question", "--input-key", "--input-key prompt"),
    Wrong("an answer field that is not there", "--label-key labell", "--label-key", "Did you mean label"),
    Wrong("an answer that is missing later on", "--prompt-data {late}", "late.jsonl:6", "--label-key"),
    Wrong("a reward without an answer", "--prompt-data {no_label}", "--label-key", "'answer'"),
    Wrong("messages without a template", "--prompt-data {chat}", "--prompt-data", "--apply-chat-template"),
    Wrong("a prompt that is a number", "--prompt-data {number}", "number.jsonl:1", "list of messages"),
    # evaluation
    Wrong("tasks that are no pairs", "--eval-interval 1 --eval-prompt-data aime {data} gsm8k", "--eval-prompt-data",
          "pairs of name and file"),
    Wrong("a task twice", "--eval-prompt-data a {data} --eval-prompt-data a {data}", "--eval-prompt-data",
          "a name of its own"),
    Wrong("a task without a file", "--eval-config {dir}/eval.yaml", "--eval-config", "has no path"),
    Wrong("a setting that no task has", "--eval-config {dir}/eval_key.yaml", "--eval-config",
          "Did you mean temperature"),
    Wrong("a task whose file is not there", "--eval-prompt-data aime {dir}/none.jsonl", "evaluation task aime",
          "existing one"),
    # hooks
    Wrong("a module that is not there", "--custom-rm-path no_such_module.reward", "--custom-rm-path", "PYTHONPATH"),
    Wrong("a file that is not there", "--custom-rm-path {dir}/none.py", "--custom-rm-path", "its path from here"),
    Wrong("a path that names nothing", "--custom-rm-path reward", "--custom-rm-path", "file.py:name"),
    Wrong("a file that is not Python", "--custom-rm-path {dir}/broken.py:reward", "--custom-rm-path", "line 1"),
    Wrong("a function that is not there", "--custom-rm-path {dir}/my_plugins.py:rewards", "--custom-rm-path",
          "Did you mean reward"),
    Wrong("a file with many functions", "--custom-rm-path {dir}/my_plugins.py", "--custom-rm-path",
          "my_plugins.py:NAME"),
    Wrong("a generate function that cannot be awaited",
          "--custom-generate-function-path {dir}/my_plugins.py:generate", "--custom-generate-function-path",
          "async def"),
    Wrong("a parameter that slime does not pass", "--custom-rm-path {dir}/my_plugins.py:needs_more",
          "--custom-rm-path", "asks for temperature"),
    Wrong("a filter with too few parameters", "--dynamic-sampling-filter-path {dir}/my_plugins.py:keep",
          "--dynamic-sampling-filter-path", "(args, samples)"),
    Wrong("an async function that is called directly",
          "--custom-convert-samples-to-train-data-path {dir}/my_plugins.py:convert",
          "--custom-convert-samples-to-train-data-path", "def fn(args, samples)"),
    Wrong("a rollout function that cannot evaluate", "--rollout-function-path {dir}/my_plugins.py:rollout",
          "--rollout-function-path", "evaluation"),
    Wrong("a class where a function is called", "--rollout-sample-filter-path {dir}/my_plugins.py:Silent",
          "--rollout-sample-filter-path", "is a class"),
    Wrong("a reward class without a model", "--custom-rm-path {dir}/my_plugins.py:Judge", "--custom-rm-path",
          "--rm-model-path"),
    Wrong("a reward class without a reward", "--custom-rm-path {dir}/my_plugins.py:Silent", "--custom-rm-path",
          "compute_reward"),
    Wrong("a data source that gives nothing", "--data-source-path {dir}/my_plugins.py:Source", "--data-source-path",
          "get_samples"),
    Wrong("a layer spec in one word", "--spec get_spec", "--spec", "two"),
    # files of overrides
    Wrong("a role that does not exist", "--megatron-config-path {dir}/roles.yaml", "--megatron-config-path",
          "actor and critic"),
    Wrong("overrides that are no mapping", "--custom-config-path {dir}/list.yaml", "--custom-config-path",
          "max_turns: 5"),
    Wrong("an override that its flag cannot have", "--custom-config-path {dir}/values.yaml", "rollout_batch_size",
          "whole number"),
    Wrong("overrides that are not there", "--custom-config-path {dir}/none.yaml", "--custom-config-path",
          "existing YAML file"),
    Wrong("a run name that is a path", "--run-name a/b", "--run-name", "--output-dir"),
    # profiling
    Wrong("a trace that nothing writes", "--profile-target train_actor", "--profile-target", "--use-pytorch-profiler"),
    Wrong("a snapshot of nothing", "--memory-snapshot-num-steps 3", "--memory-snapshot-num-steps",
          "--record-memory-history"),
    Wrong("a trace of no rollout", "--use-pytorch-profiler --profile-step-start 1 --profile-step-end 1",
          "--profile-step-start 1", "--profile-step-end 2"),
    Wrong("a trace after the end", "--use-pytorch-profiler", "--num-rollout 3", "--profile-step-start 2"),
    Wrong("a history of the CPU's memory", "--record-memory-history", "--record-memory-history", "drop it"),
    # what is not built
    Wrong("a sequence on several ranks", "--context-parallel-size 2 --actor-num-gpus-per-node 2",
          "--context-parallel-size 2", "use 1"),
    Wrong("experts on several ranks", "--expert-model-parallel-size 2 --actor-num-gpus-per-node 2",
          "--expert-model-parallel-size 2", "use 1"),
    Wrong("experts sliced", "--expert-tensor-parallel-size 2 --actor-num-gpus-per-node 2",
          "--expert-tensor-parallel-size 2", "leave it out"),
    Wrong("a mixture of experts", "--num-experts 8", "--num-experts 8", "choose a dense model"),
    Wrong("a setting of experts", "--moe-grouped-gemm", "--moe-grouped-gemm", "mixtures of experts"),
    Wrong("a router of experts", "--moe-router-topk 8", "--moe-router-topk 8", "mixtures of experts"),
    Wrong("latent attention", "--multi-latent-attention", "--multi-latent-attention", "choose another model"),
    Wrong("a setting of latent attention", "--q-lora-rank 1536", "--q-lora-rank 1536", "latent attention"),
    Wrong("dropout in the layers", "--hidden-dropout 0.1", "--hidden-dropout 0.1", "--hidden-dropout 0.0"),
    Wrong("dropout in the attention", "--attention-dropout 0.1", "--attention-dropout 0.1", "leave the flag out"),
    Wrong("training in fp8", "--fp8-format e4m3", "--fp8-format e4m3", "leave it out"),
    Wrong("gradients in another format", "--main-grads-dtype bf16", "--main-grads-dtype bf16", "leave it out"),
    Wrong("a decay of a schedule that is not there", "--lr-wsd-decay-style linear", "--lr-wsd-decay-style linear",
          "leave it out"),
    Wrong("a schedule that is not there", "--lr-decay-style WSD", "--lr-decay-style WSD", "--lr-decay-style cosine"),
    Wrong("an optimizer that is not there", "--optimizer sgd", "--optimizer sgd", "--optimizer adam"),
    Wrong("another normalization", "--normalization LayerNorm", "--normalization LayerNorm",
          "--normalization RMSNorm"),
    Wrong("learned positions", "--position-embedding-type learned_absolute", "--position-embedding-type",
          "--position-embedding-type rope"),
    Wrong("another attention kernel", "--attention-backend unfused", "--attention-backend unfused",
          "--attention-backend flash"),
    Wrong("an optimizer on every rank", "--no-use-distributed-optimizer", "--no-use-distributed-optimizer",
          "leave the flag out"),
    Wrong("an optimizer on the host", "--optimizer-cpu-offload", "--optimizer-cpu-offload", "leave it out"),
    Wrong("another scale of the softmax", "--softmax-scale 0.3", "--softmax-scale 0.3", "leave it out"),
    Wrong("positions scaled by the flags alone", "--use-rope-scaling", "--use-rope-scaling", "leave the model flags"),
    Wrong("a length in optimizer steps", "--train-iters 100", "--train-iters 100", "leave it out"),
    Wrong("another padding of the vocabulary", "--padded-vocab-size 2048", "--padded-vocab-size 2048", "leave it out"),
    Wrong("larger passes for log-probs", "--max-tokens-per-gpu 512 --log-probs-max-tokens-per-gpu 1024",
          "--log-probs-max-tokens-per-gpu 1024", "leave it out"),
    Wrong("a family by name", "--model-name qwen3", "--model-name qwen3", "config.json"),
    Wrong("the encoding of deltas", "--update-weight-delta-encoding overwrite", "--update-weight-delta-encoding",
          "leave it out"),
    Wrong("the checksum of deltas", "--update-weight-delta-checksum blake3", "--update-weight-delta-checksum",
          "leave it out"),
    Wrong("a kernel of layers that are not there", "--qwen-gdn-backend flashqla", "--qwen-gdn-backend", "leave it out"),
    Wrong("the weight of a loss that is not there", "--mtp-loss-scaling-factor 0.3", "--mtp-loss-scaling-factor",
          "leave it out"),
    Wrong("an iteration of a teacher that is not there", "--opd-teacher-ckpt-step 3", "--opd-teacher-ckpt-step",
          "leave it out"),
)  # fmt: skip
