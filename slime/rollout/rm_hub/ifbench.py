"""`--rm-type ifbench`: whether a response follows every instruction of its prompt, by IFBench's own verifiers."""

import importlib
from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import Any

LIBRARY = "evaluation_lib"


def compute_ifbench_reward(response: str, label: Any, metadata: Mapping[str, Any] | None = None) -> float:
    """1.0 if all instructions are followed in IFBench's strict reading, else 0.0.

    Args:
        label: not used.
        metadata: `instruction_id_list`; `kwargs`, one dict an instruction; `prompt_text`; `record_id`.

    Raises:
        ImportError: IFBench is not on the path.
        ValueError: the metadata lacks the instructions, or has another number of kwargs.
    """
    data = metadata or {}
    instructions = data.get("instruction_id_list")
    if not instructions:
        raise ValueError(f"An ifbench sample needs metadata['instruction_id_list']; it has {sorted(data) or 'none'}.")
    kwargs = data.get("kwargs") or [{} for _ in instructions]
    if len(kwargs) != len(instructions):
        raise ValueError(f"{len(instructions)} instructions have {len(kwargs)} kwargs; there must be one dict each.")
    prompt = str(data.get("prompt_text") or "")
    library = _evaluation_lib()
    example = library.InputExample(
        key=data.get("record_id", 0),
        instruction_id_list=list(instructions),
        prompt=prompt,
        kwargs=[{key: value for key, value in (each or {}).items() if value is not None} for each in kwargs],
    )
    result = library.test_instruction_following_strict(example, {prompt: response})
    return float(bool(result.follow_all_instructions))


@cache
def _evaluation_lib() -> ModuleType:
    try:
        return importlib.import_module(LIBRARY)
    except ImportError as error:
        raise ImportError(
            f"--rm-type ifbench runs IFBench's evaluation_lib, which cannot be imported ({error}). Get it once:\n"
            "  git clone https://github.com/allenai/IFBench && pip install -r IFBench/requirements.txt\n"
            "and put that folder on PYTHONPATH."
        ) from error
