"""`--rm-type reasoning_gym`: answers to reasoning-gym's procedural tasks, graded by the task's own verifier.

The verifier runs in a worker process (grading_worker), which gives it safe parsers for what the model wrote.
"""

import json
from collections.abc import Mapping
from typing import Any

from slime.rollout.rm_hub import grading_worker
from slime.rollout.rm_hub.plain_answers import extract_answer_tag

PREFIX = "reasoning_gym"
FULL_SCORE = 1.0


def compute_reasoning_gym_reward(
    response: str, label: Any, metadata: Mapping[str, Any] | None = None, *, task: str | None = None, prompt: Any = ""
) -> float:
    """The reward of an answer: 1.0 for a full score, else 0.0.

    The answer is what the last `<answer>` tag holds, else the whole response.

    Args:
        label: the reference answer, used where the metadata has no entry.
        metadata: `source_dataset`, the task's name; `entry`, reasoning-gym's item (a dict or its JSON);
            `score_threshold`, the score from which an answer earns 1.0 (default 1.0); `partial_credit`, true to
            earn the score itself.
        task: the task's name, from `reasoning_gym:<task>`; wins over the metadata.

    Raises:
        ValueError: no task is named.
        GradingError: reasoning-gym is not installed, or does not know the task.
    """
    data = metadata or {}
    entry = _entry(data, label, prompt)
    name = task or data.get("source_dataset") or entry["metadata"].get("source_dataset")
    if not name:
        raise ValueError(
            "Which reasoning-gym task is it? Use --rm-type reasoning_gym:<task>, or metadata['source_dataset']."
        )
    tagged = extract_answer_tag(response)
    answer = response.strip() if tagged is None else tagged
    score = grading_worker.reasoning_gym_score(str(name), answer, entry)
    if data.get("partial_credit"):
        return score
    return float(score >= float(data.get("score_threshold", FULL_SCORE)))


def _entry(data: Mapping[str, Any], label: Any, prompt: Any) -> dict[str, Any]:
    """reasoning-gym's item: as the metadata gives it, else put together from label and metadata."""
    entry = data.get("entry")
    if isinstance(entry, str):
        entry = json.loads(entry)
    if entry is None:
        entry = {"question": str(prompt), "answer": label, "metadata": dict(data)}
    if not isinstance(entry, Mapping):
        raise ValueError(f"metadata['entry'] is reasoning-gym's item, a dict, not {type(entry).__name__}.")
    return {"metadata": {}, **entry}
