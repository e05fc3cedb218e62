"""What the machine offers is found without importing anything large."""

import sys
from pathlib import Path

import pytest

from slime.config.machine import _cpu_instructions, _is_installed, _num_gpus, look_at_machine


def test_bf16_instructions_are_read_from_cpuinfo(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16 amx_bf16\n")
    assert _cpu_instructions(cpuinfo) == ("avx512_bf16", "amx_bf16")
    cpuinfo.write_text("flags\t\t: fpu avx2 avx512_bf16_not\n")
    assert _cpu_instructions(cpuinfo) == ()
    assert _cpu_instructions(tmp_path / "none") == ()


def test_hidden_gpus_do_not_count() -> None:
    assert _num_gpus({"CUDA_VISIBLE_DEVICES": ""}) == 0
    assert _num_gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == 0


def test_a_package_is_found_without_importing_it(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    package = tmp_path / "heavy_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "folder_without_source").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert _is_installed("heavy_package")
    assert not _is_installed("folder_without_source")
    assert "heavy_package" not in sys.modules


def test_an_interpreter_with_sglang_counts_as_having_it() -> None:
    assert look_at_machine({"SLIME_SGLANG_PYTHON": "/venv/bin/python"}).has_sglang


def test_a_cluster_is_joined_where_its_address_is_set() -> None:
    assert look_at_machine({"RAY_ADDRESS": "10.0.0.1:6379"}).joins_cluster
    assert not look_at_machine({}).joins_cluster


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_segments_that_grow_are_noticed_under_either_name(name: str) -> None:
    assert look_at_machine({name: "garbage_collection_threshold:0.8, expandable_segments: True"}).expandable_segments
    assert not look_at_machine({name: "expandable_segments:False"}).expandable_segments
    assert not look_at_machine({}).expandable_segments
