"""Of Megatron's flags those that the trainer obeys pass, and all others are refused."""

import ast
from pathlib import Path

import pytest

from slime.arguments import parse_args
from slime.arguments.flag_tables import table
from slime.arguments.megatron_check import AS_ALWAYS, LATENT, PASSED_ON, READ, READ_AT_START, WITHOUT_EFFECT
from slime.arguments.parser import slime_flags
from slime.config.megatron import FUSIONS
from slime.config.model_shape import COMPARED
from slime.config.unbuilt import UNBUILT
from tests.unit.arguments.test_right_command_lines import PUBLISHED, SCRIPTS, model_args, published_model
from tests.unit.arguments.test_unbuilt import dests_read_in
from tests.unit.arguments.wrong_command_lines import right_command_line

PACKAGE = Path(__file__).parents[3] / "slime"
TABLE = {flag.dest: flag for flag in reversed(table("megatron"))}
OF_INTERLEAVING_ALONE = {"microbatch_group_size_per_vp_stage"}


def test_the_flags_that_count_as_read_are_those_that_the_source_reads() -> None:
    files = [
        file for file in PACKAGE.rglob("*.py") if file.relative_to(PACKAGE).parts[0] not in ("config", "arguments")
    ]
    own = {flag.dest for flag in slime_flags()}
    read = set().union(*(dests_read_in(file) for file in files)) & TABLE.keys() - own
    dense = {dest for dest in read if not dest.startswith("moe_")} - LATENT - OF_INTERLEAVING_ALONE
    assert dense - UNBUILT.keys() - AS_ALWAYS.keys() - COMPARED.keys() - WITHOUT_EFFECT - PASSED_ON == READ


def test_what_is_read_at_the_start_is_read_by_slimes_configuration() -> None:
    text = "".join((PACKAGE / "config" / file).read_text() for file in ("megatron.py", "rules/parallel.py"))
    assert all(f'megatron.get("{dest}")' in text for dest in READ_AT_START)


def test_what_is_passed_on_is_a_field_that_the_trainer_does_not_set_itself() -> None:
    tree = ast.parse((PACKAGE / "backends" / "megatron" / "config.py").read_text())
    (function,) = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "transformer_config"]
    (call,) = [n for n in ast.walk(function) if isinstance(n, ast.Call) and ast.unparse(n.func) == "dict"]
    ours = {keyword.arg for keyword in call.keywords}
    assert "hidden_dropout" in ours
    for dest in PASSED_ON:
        assert TABLE[dest].fields, f"{dest} is no field"
        assert not ours & set(TABLE[dest].fields), f"{dest} is overruled"


def test_no_flag_is_judged_twice() -> None:
    sets = [READ, READ_AT_START, PASSED_ON, WITHOUT_EFFECT, AS_ALWAYS.keys(), UNBUILT.keys(), COMPARED.keys()]
    names = [name for names in sets for name in names]
    assert sorted(names) == sorted(set(names))
    megatron = [name for names in (READ, READ_AT_START, PASSED_ON, WITHOUT_EFFECT, AS_ALWAYS) for name in names]
    assert set(megatron) <= TABLE.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_script_of_a_model_is_not_refused(name: str, files: dict[str, str], tmp_path: Path) -> None:
    script = next(s for s in SCRIPTS if s.stem == name)
    words = right_command_line(files, f"--hf-checkpoint {published_model(tmp_path, name)}")
    assert parse_args([*words, *model_args(script)]).num_layers == PUBLISHED[name][1]


RECIPE = """--attention-dropout 0.0 --hidden-dropout 0.0 --accumulate-allreduce-grads-in-fp32
    --attention-softmax-in-fp32
    --attention-backend flash --no-check-for-nan-in-loss-and-grad --use-distributed-optimizer --bf16 --seq-length 4096
    --context-parallel-size 1 --expert-model-parallel-size 1 --expert-tensor-parallel-size 1 --no-rope-fusion
    --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-swiglu-fusion --transformer-impl
    transformer_engine --optimizer adam --lr-decay-style constant --weight-decay 0.1 --adam-beta2 0.98 --swiglu
    --make-vocab-size-divisible-by 1 --normalization RMSNorm --position-embedding-type rope --disable-bias-linear
    --no-position-embedding --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel
    --actor-num-gpus-per-node 4"""
RECOMPUTATIONS = (
    "--recompute-activations --micro-batch-size 1 --sequence-parallel",
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "--recompute-granularity selective --recompute-modules core_attn mlp",
)


@pytest.mark.parametrize("words", [RECIPE, *RECOMPUTATIONS])
def test_the_flags_of_dense_recipes_are_not_refused(words: str, files: dict[str, str]) -> None:
    assert parse_args(right_command_line(files, words)).device == "cpu"


def test_every_other_flag_is_refused(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """All of them that take a number, on one command line, each with a number that is not its default."""
    judged = READ | READ_AT_START | PASSED_ON | WITHOUT_EFFECT | AS_ALWAYS.keys() | COMPARED.keys() | set(FUSIONS)
    own = {flag.dest for flag in slime_flags()}
    others = [f for f in TABLE.values() if f.dest not in judged | own and f.value_type in ("int", "float")]
    others = [f for f in others if f.kind == "value" and not f.choices and "parallel_size" not in f.dest]
    others = [f for f in others if "virtual" not in f.dest]
    words = " ".join(f"{flag.names[0]} 7" for flag in others)
    with pytest.raises(SystemExit):
        parse_args(right_command_line(files, words))
    message = capsys.readouterr().err
    assert len(others) > 60
    assert [flag.names[0] for flag in others if f"{flag.names[0]} 7" not in message] == []
