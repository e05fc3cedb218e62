"""The process behind grading_worker: reads questions from stdin and writes replies to stdout, one JSON object a line.

It has one thread, so CPU time can be limited by a kernel timer that ends the process even inside a C function.
Nothing that a model wrote is run: see safe_expression and `disarm_reasoning_gym`.
"""

import json
import os
import resource
import signal
import sys
from functools import cache
from types import ModuleType
from typing import Any

from slime.rollout.rm_hub.safe_expression import UnsafeExpression, evaluate_literal, parse_expression

BOARD_TASKS = frozenset({"arc_agi", "rearc"})
"""Tasks whose verifier compares with a tuple of tuples, which JSON turns into lists."""


def sympy_equal(given: str, truth: str) -> bool | None:
    """See grading_worker; None when either text is no expression that may be parsed."""
    import sympy

    try:
        difference = parse_expression(truth) - parse_expression(given)
        return bool(sympy.simplify(difference) == 0)
    except Exception:  # SymPy raises every type there is on text that is no mathematics
        return None


def math_verify_equal(given: str, truth: str) -> bool | None:
    """See grading_worker; the label is the reference side, since Math-Verify's comparison is not symmetric."""
    math_verify = load("math_verify")
    configs = [math_verify.LatexExtractionConfig(boxed_match_priority=0)]
    sides = [
        math_verify.parse(f"\\boxed{{{text}}}", configs, parsing_timeout=None, raise_on_error=False)
        for text in (truth, given)
    ]
    if not all(sides):
        return None
    return bool(math_verify.verify(*sides, timeout_seconds=None, raise_on_error=False))


def reasoning_gym_score(task: str, answer: str, entry: dict[str, Any]) -> float:
    """See grading_worker."""
    if task in BOARD_TASKS:
        metadata = entry["metadata"]
        entry = entry | {"metadata": metadata | {"output": tuple(tuple(row) for row in metadata["output"])}}
    return float(reasoning_gym_scorer(task)(answer, entry))


@cache
def reasoning_gym_scorer(task: str) -> Any:
    reasoning_gym = load("reasoning_gym")
    try:
        return reasoning_gym.get_score_answer_fn(task)
    except ValueError:
        known = ", ".join(sorted(sys.modules["reasoning_gym.factory"].DATASETS))
        raise ValueError(f"reasoning-gym has no task {task!r}. It has: {known}.") from None


@cache
def load(name: str) -> ModuleType:
    """Imports a grader's package, disarmed; a missing one is an error that says what to install."""
    try:
        module = __import__(name)
    except ImportError as error:
        package = name.replace("_", "-")
        raise ImportError(f"the package {package} is missing ({error}); install it: pip install {package}") from error
    if name == "reasoning_gym":
        disarm_reasoning_gym()
    return module


def disarm_reasoning_gym() -> None:
    """Gives reasoning-gym's verifiers our parsers in the place of `eval` and SymPy's `parse_expr`.

    In 0.1.25 the verifiers of string_insertion, spiral_matrix, binary_matrix and n_queens pass the model's answer to
    `eval`, those of countdown, puzzle24, polynomial_multiplication and both integrations to `parse_expr`, which
    evaluates it as well. This can go when they no longer do.
    """
    import sympy

    sympy.parse_expr = guarded_parse_expr
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "reasoning_gym":
            module.__dict__["eval"] = evaluate_literal
            if getattr(module.__dict__.get("parse_expr"), "__module__", "").startswith("sympy."):
                module.__dict__["parse_expr"] = guarded_parse_expr


def guarded_parse_expr(text: str, local_dict: dict[str, Any] | None = None, **_: Any) -> Any:
    """Stands for sympy.parse_expr on text that a model wrote."""
    return parse_expression(text, implicit_products=False, symbols=local_dict)


FUNCTIONS = {f.__name__: f for f in (sympy_equal, math_verify_equal, reasoning_gym_score)}


def warm_up(function: str, arguments: list[Any]) -> None:
    """Imports what a question needs before its time starts to count."""
    if function == "sympy_equal":
        parse_expression("1")
    elif function == "math_verify_equal":
        load("math_verify")
    else:
        reasoning_gym_scorer(arguments[0])


def answer(question: dict[str, Any], cpu_limit_s: float) -> dict[str, Any]:
    """{"result": ...} or {"error": text}."""
    name, arguments = question["function"], question["arguments"]
    try:
        warm_up(name, arguments)
        if question.get("is_asked_later"):
            return {"result": None}
        signal.setitimer(signal.ITIMER_PROF, cpu_limit_s)
        return {"result": FUNCTIONS[name](*arguments)}
    except UnsafeExpression:
        return {"result": None}
    except MemoryError:
        os._exit(1)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main() -> None:
    cpu_limit_s, memory_bytes = float(sys.argv[1]), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent; the closed pipe ends this process
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not look like a reply
    for line in sys.stdin:
        replies.write(json.dumps(answer(json.loads(line), cpu_limit_s)) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
