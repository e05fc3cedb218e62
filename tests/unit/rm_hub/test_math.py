"""Mathematical answers: what is equal, what is not, and what nobody may run."""

import os
import queue
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from slime.rollout.rm_hub import grading_worker
from slime.rollout.rm_hub.deepscaler import get_deepscaler_rule_based_reward
from slime.rollout.rm_hub.latex_text import is_words, latex_to_text, normalize_expression
from slime.rollout.rm_hub.math_utils import (
    _strip_string,
    _symbolic_verdict,
    extract_answer,
    extract_boxed_answer,
    grade_answer_mathd,
    grade_answer_sympy,
    grade_answer_verl,
    last_boxed_only_string,
    mathd_normalize_answer,
    remove_boxed,
)
from slime.rollout.rm_hub.safe_expression import UnsafeExpression, evaluate_literal, parse_expression


def boxed(answer: str) -> str:
    return f"Therefore the answer is $\\boxed{{{answer}}}$."


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{5}", "5"),
        (r"first \boxed{1} then \boxed{\frac{1}{2}} done", r"\frac{1}{2}"),
        (r"\fbox{7}", "7"),
        (r"\boxed{a{b}c}", "a{b}c"),
        (r"\boxed{}", ""),
        (r"\boxed{unclosed", None),
        (r"\boxed 5", None),
        ("no box", None),
        ("", None),
    ],
)
def test_the_last_box_is_the_answer(text: str, answer: str | None) -> None:
    assert extract_boxed_answer(text) == answer


def test_boxes_are_taken_apart_exactly() -> None:
    assert last_boxed_only_string(r"a \boxed{1} b \boxed{2} c") == r"\boxed{2}"
    assert remove_boxed(r"\boxed{2}") == "2"
    assert remove_boxed("2") is None and remove_boxed(None) is None and remove_boxed(r"\boxed{2") is None
    assert extract_answer("5") is None and extract_answer(r"\boxed{5}") == "5"


@pytest.mark.parametrize(
    ("raw", "normal"),
    [
        ("0.5", r"\frac{1}{2}"),
        (".7", "0.7"),
        ("3/4", r"\frac{3}{4}"),
        (r"\dfrac34", r"\frac{3}{4}"),
        (r"\tfrac1{72}", r"\frac{1}{72}"),
        (r"\sqrt3", r"\sqrt{3}"),
        (r"\left(1, 2\right)", "(1,2)"),
        ("x = 5", "5"),
        ("total = 5", "total=5"),
        (r"90^\circ", "90"),
        (r"90^{\circ}", "90"),
        (r"\$5", "5"),
        (r"50\%", "50"),
        (r"5\text{ meters}", "5"),
        ("a \n b", "ab"),
        (r"\leftarrow", r"\leftarrow"),
        ("", ""),
    ],
)
def test_the_normal_form_of_the_math_benchmark(raw: str, normal: str) -> None:
    assert _strip_string(raw) == normal


def test_a_whole_text_is_unwrapped() -> None:
    assert mathd_normalize_answer(r" \text{Monday} ") == "Monday"
    assert mathd_normalize_answer(None) is None
    assert grade_answer_mathd(r"\frac12", "1/2") and not grade_answer_mathd("1", "2")


EQUAL = [
    ("1/2", r"\frac{1}{2}"),
    ("0.5", r"\frac12"),
    ("0.25", r"\frac{1}{4}"),
    ("2.50", "2.5"),
    ("5.0", "5"),
    ("10,000", "10000"),
    (r"10{,}000", "10000"),
    ("5 million", "5000000"),
    (r"2.5\text{ billion}", "2500000000"),
    (r"3\frac{1}{2}", r"\frac{7}{2}"),
    (r"-3\frac{1}{2}", "-7/2"),
    (r"\sqrt{12}", r"2\sqrt{3}"),
    (r"2\sqrt3", r"\sqrt{12}"),
    ("x^2+2x+1", "(x+1)^2"),
    ("xy", "yx"),
    (r"\frac{x+1}{2}", r"\frac{x}{2}+\frac12"),
    (r"\sin x", r"\sin(x)"),
    (r"\frac{\pi}{3}", r"\pi/3"),
    ("(1,2)", "(1, 2)"),
    (r"\left(\frac12, 3\right)", "(0.5, 3)"),
    (r"(-\infty, 3)", r"(-\infty,3)"),
    (r"\text{Red}", "red"),
    (r"12\text{ cm}^2", "12"),
    (r"12 \text{ inches}", "12"),
    (r"$7$", "7"),
    ("7.", "7"),
]
NEEDS_MATH_VERIFY = [
    (r"\{1,2\}", r"\{2,1\}"),
    ("1,2", "2,1"),
    (r"x^{2}+2x+1", "(x+1)^2"),
    (r"\sqrt[3]{8x}", r"2\sqrt[3]{x}"),
    ("y=2x+1", "2x+1=y"),
    (r"[0,1]\cup[2,3]", r"[2,3]\cup[0,1]"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}"),
    (r"\frac{1}{x^{10}}", "x^{-10}"),
]
DIFFERENT = [
    ("4", "5"),
    (r"\frac{2}{4}", r"\frac{1}{2}"),
    ("4/2", "2"),
    (r"2^{10}", "1024"),
    (r"\sqrt{25}", "5"),
    ("(1,2)", "(2,1)"),
    ("(1,2]", "(1,2)"),
    ("(1,2,3)", "(1,2)"),
    ("(1,2)", "3"),
    ("red", "der"),
    ("abc", "cab"),
    ("x+1", "x+2"),
    (r"\{1,2\}", r"\{1,3\}"),
    ("y=2x+1", "y=2x+2"),
    ("3.14", r"\pi"),
    ("1e5", "100000"),
    ("", "5"),
    (" ", "5"),
    ("NaN", "5"),
    ("True", "1"),
    ("１", "2"),
]


@pytest.mark.parametrize(("given", "truth"), EQUAL + NEEDS_MATH_VERIFY)
def test_equal_answers_are_right(given: str, truth: str) -> None:
    assert grade_answer_verl(boxed(given), truth)


@pytest.mark.parametrize(("given", "truth"), DIFFERENT)
def test_other_answers_are_wrong(given: str, truth: str) -> None:
    assert not grade_answer_verl(boxed(given), truth)


@pytest.mark.parametrize(("given", "truth"), NEEDS_MATH_VERIFY)
def test_math_verify_is_asked_only_for_what_the_rules_leave_undecided(given: str, truth: str) -> None:
    assert _symbolic_verdict(given, truth) is None
    assert not grade_answer_sympy(given, truth)


@pytest.mark.parametrize(("given", "truth"), [pair for pair in DIFFERENT if "=" not in pair[0] and "{1" not in pair[0]])
def test_the_rules_decide_without_math_verify_where_they_can(given: str, truth: str) -> None:
    assert _symbolic_verdict(given, truth) is False


def test_an_answer_needs_its_box_and_a_label_does_not() -> None:
    assert not grade_answer_verl("the answer is 5", "5")
    assert grade_answer_verl(boxed("5"), r"so \boxed{5}")
    assert grade_answer_verl(boxed("5"), 5) and grade_answer_verl(boxed("0"), "0")
    assert not grade_answer_verl(boxed(""), "") and not grade_answer_verl(boxed("None"), None)


ATTACKS = [
    "__import__('os').system('touch {marker}')",
    "exec(chr(95))",
    "().__class__.__bases__",
    "sympify(open)",
    r"\text{__import__('os').system('touch {marker}')}",
    "x.subs(x,1)",
    "lambda: 1",
    "9^9^9^9",
    "9^{9^{9^{9}}}",
    "9**9**9**9",
    r"\frac{1}{" * 200,
    "(" * 5000,
    "{" * 5000,
    "1" * 100_000,
    "1 " * 50_000,
    "\\frac1 " * 20_000,
    "1/0",
    "\\frac{1}{0}",
    "\x00",
    "💥" * 50,
    "\\",
    "^",
    "-" * 300,
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_adversarial_answer_is_wrong_and_runs_nothing(attack: str, tmp_path: Any) -> None:
    marker = tmp_path / "ran"
    started = time.monotonic()
    assert not grade_answer_verl(f"\\boxed{{{attack.replace('{marker}', str(marker))}}}", "5")
    assert not grade_answer_verl(boxed("5"), attack.replace("{marker}", str(marker)))
    assert not marker.exists()
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    "text", ["__import__", "x.y", "open('f')", "a[0]", "f'x'", "9^9^9", "1" * 101, "x" * 301, "import os", "sympify(x)"]
)
def test_only_plain_expressions_are_parsed(text: str) -> None:
    with pytest.raises(UnsafeExpression):
        parse_expression(text, implicit_products=False)


def test_expressions_are_read_as_mathematicians_write_them() -> None:
    import sympy

    x, y = sympy.symbols("x y")
    assert parse_expression("2x^2 + xy") == 2 * x**2 + x * y
    assert parse_expression("xsinx") == x * sympy.sin(x)
    assert parse_expression("sqrt2") == sympy.sqrt(2)
    assert parse_expression("3*(4+5)", implicit_products=False) == 27
    assert parse_expression("C + k", implicit_products=False, symbols={"C": x, "k": y}) == x + y


@pytest.mark.parametrize(
    ("text", "value"), [("[1, 'a', (2,)]", [1, "a", (2,)]), ("(0x1F << 2) - 3", 121), ("-5", -5), ("{1, 2}", {1, 2})]
)
def test_literals_are_read_without_eval(text: str, value: Any) -> None:
    assert evaluate_literal(text) == value


@pytest.mark.parametrize("text", ["__import__('os')", "[x for x in (1,)]", "1 << 10**9", "'a' * 10**9", "a", "f()"])
def test_what_is_no_literal_is_refused(text: str) -> None:
    with pytest.raises((ValueError, SyntaxError)):
        evaluate_literal(text)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        (r"\frac{1}{2}", "1/2"),
        (r"\frac{x+1}{\frac{1}{2}}", "(x+1)/(1/2)"),
        (r"7\frac{3}{4}", "(7+3/4)"),
        (r"2 \cdot \pi", "2*pi"),
        ("1,234,567", "1234567"),
        ("1,2", "1,2"),
        (r"3 \text{ or } 4", "3,4"),
        ("+5", "5"),
        ("05", "5"),
        (r"{42}", "42"),
        (r"\frac", "frac"),
    ],
)
def test_latex_as_plain_text(text: str, plain: str) -> None:
    assert normalize_expression(text) == plain


def test_words_are_told_from_mathematics() -> None:
    assert is_words("monday") and is_words("the cat") and is_words("xyz")
    assert not any(map(is_words, ("x", "xy", "sin x", "2xsinx", "pi", "3or4", r"\alpha")))
    assert not is_words(latex_to_text(r"\begin{pmatrix} 1 \end{pmatrix}"))


def test_grading_works_from_many_threads_at_once() -> None:
    pairs = [(f"(x+{n})^2", f"x^2+{2 * n}x+{n * n}") for n in range(2, 18)]
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda pair: grade_answer_verl(boxed(pair[0]), pair[1]), pairs))
    assert results == [True] * len(pairs)
    assert len(grading_worker._started) <= grading_worker.NUM_WORKERS


def test_warming_up_asks_every_worker_and_leaves_all_of_them_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: queue.Queue[tuple[Any, dict[str, Any]]] = queue.Queue()

    class Worker:
        def ask(self, question: dict[str, Any]) -> dict[str, Any]:
            asked.put((self, question))
            if question["function"] == "reasoning_gym_score":
                raise OSError("no more processes")
            return {"error": "no such package"}

    started: list[Any] = []
    idle: queue.LifoQueue[Any] = queue.LifoQueue()
    monkeypatch.setattr(grading_worker, "NUM_WORKERS", 3)
    monkeypatch.setattr(grading_worker, "_Worker", Worker)
    monkeypatch.setattr(grading_worker, "_started", started)
    monkeypatch.setattr(grading_worker, "_idle", idle)
    grading_worker.warm_up(("sympy_equal",), ("reasoning_gym_score", "chess"))
    questions = [asked.get(timeout=10) for _ in range(6)]
    assert len(started) == 3
    assert {idle.get(timeout=10) for _ in range(3)} == set(started)
    for worker in started:
        own = [question for who, question in questions if who is worker]
        assert [question["function"] for question in own] == ["sympy_equal", "reasoning_gym_score"]
        assert all(question["is_asked_later"] for question in own)


@pytest.mark.parametrize(("function", "package"), [("sympy_equal", "sympy"), ("math_verify_equal", "math_verify")])
def test_a_question_that_is_asked_later_only_imports(function: str, package: str) -> None:
    program = (
        "import sys\nfrom slime.rollout.rm_hub.grading_child import answer\n"
        f"question = {{'function': {function!r}, 'arguments': [], 'is_asked_later': True}}\n"
        f"before = {package!r} in sys.modules\nprint(before, answer(question, 5.0), {package!r} in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False {'result': None} True"


def test_a_worker_that_takes_too_long_is_replaced(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(grading_worker, "_killed", type(grading_worker._killed)())
    grading_worker.sympy_equal.cache_clear()
    slow = "+".join(f"sin(x+{n})^9*cos(x^{n % 7 + 2}+y)^9" for n in range(8))
    assert grading_worker.sympy_equal(slow, "x") is None
    assert "was stopped after" in caplog.text
    assert grading_worker.sympy_equal("x+x", "2x") is True


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_is_killed_or_stopped_from_outside_costs_no_answer(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """A reward must not depend on whether the kernel, short of memory, chose the grading child."""
    monkeypatch.setattr(grading_worker, "NUM_WORKERS", 1)
    grading_worker.stop_workers()
    assert grading_worker.sympy_equal("x+x", f"2x+{number.value}") is False  # it has imported what it needs
    monkeypatch.setattr(grading_worker, "WALL_LIMIT_S", 3.0 if number == signal.SIGSTOP else 120.0)
    (worker,) = grading_worker._started
    assert worker._process is not None
    os.kill(worker._process.pid, number)
    if number == signal.SIGKILL:
        os.waitid(os.P_PID, worker._process.pid, os.WEXITED | os.WNOWAIT)  # its end of the pipe is closed
    monkeypatch.setattr(
        grading_worker._Worker, "_start", with_time_to_start(grading_worker._Worker._start, monkeypatch)
    )
    assert grading_worker.sympy_equal("x+x+x", f"3x+{number.value}-{number.value}") is True
    assert "asking again (1 of 3)" in caplog.text


def with_time_to_start(start: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The next worker has all the time that it needs."""

    def start_with_time(worker: Any) -> Any:
        monkeypatch.setattr(grading_worker, "WALL_LIMIT_S", 120.0)
        return start(worker)

    return start_with_time


def test_an_answer_over_which_every_worker_is_lost_counts_as_wrong(
    monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(grading_worker._Worker, "ask", lose)
    assert grading_worker.reasoning_gym_score("chain_sum", "never asked before", {}) == 0.0
    assert caplog.text.count("asking again") == grading_worker.MAX_LOST_WORKERS


def lose(*_: Any) -> None:
    raise grading_worker._WorkerLostError("was killed by SIGKILL")


def test_workers_end_when_their_parent_does() -> None:
    import subprocess
    import sys

    code = (
        "import os\nfrom slime.rollout.rm_hub import grading_worker\n"
        "assert grading_worker.sympy_equal('x+x', '2x')\n"
        "print(grading_worker._started[0]._process.pid, flush=True)\nos._exit(0)\n"
    )
    reply = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    pid = int(reply.stdout)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and _is_running(pid):
        time.sleep(0.1)
    assert not _is_running(pid)


def _is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("response", "label", "reward"),
    [
        (f"<think>hm</think>{boxed('5')}", "5", 1),
        (f"<think>{boxed('5')}</think> the answer is 5", "5", 0),
        (f"<think>a</think><think>b</think>{boxed('5')}", "5", 1),
        (f"###Response {boxed('5')}", "5", 1),
        (boxed("5"), "5", 0),
        (f"</think>{boxed('5')}", "", 0),
        (f"</think>{boxed('5')}", r"\boxed{5}", 1),
        (f"</think>{boxed('5')}", 5, 1),
        (f"</think>{boxed('2.5')}", 2.5, 1),
        (f"</think>{boxed('1')} and {boxed('6')}", "5", 0),
    ],
)
def test_deepscaler_grades_the_solution_after_the_reasoning(response: str, label: Any, reward: int) -> None:
    assert get_deepscaler_rule_based_reward(response, label) == reward


def test_deepscaler_refuses_a_label_that_is_no_text_or_number() -> None:
    with pytest.raises(TypeError, match=r"not list: \['5'\]"):
        get_deepscaler_rule_based_reward("</think>", ["5"])
