"""Memory that is left is what the machine has available, or what a container's limit leaves, whichever is less."""

from pathlib import Path

import pytest

from slime.utils.memory_utils import host_memory_left

MEMINFO = "MemTotal: 1000 kB\nMemAvailable: 600 kB\n"
V2 = {
    "memory.max": "400000",
    "memory.current": "300000",
    "memory.stat": "anon 1\ninactive_file 90000\nactive_file 1000",
}
V1 = {
    "memory/memory.limit_in_bytes": "400000",
    "memory/memory.usage_in_bytes": "300000",
    "memory/memory.stat": "total_inactive_file 90000\ntotal_active_file 1000\ninactive_file 7",
}


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({}, 600 * 1024),
        (V2, 191_000),
        (V1, 191_000),
        (V2 | {"memory.max": "max"}, 600 * 1024),
        (V1 | {"memory/memory.limit_in_bytes": str(2**63 - 4096)}, 600 * 1024),
        (V2 | {"memory.current": "900000"}, 0),
    ],
    ids=["no container", "cgroup 2", "cgroup 1", "no limit", "no limit, cgroup 1", "beyond its limit"],
)
def test_a_containers_limit_counts(tmp_path: Path, files: dict[str, str], left: int) -> None:
    (tmp_path / "meminfo").write_text(MEMINFO)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert host_memory_left(tmp_path, tmp_path) == left


def test_nothing_is_known_where_the_system_does_not_tell(tmp_path: Path) -> None:
    assert host_memory_left(tmp_path, tmp_path) is None
