"""Files and facts that the tests of command lines share."""

import pytest

from slime.config import Machine
from tests.unit.arguments.wrong_command_lines import make_files

LAPTOP = Machine(cores=2, started="20260101-120000", working_dir="/project")


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Placeholder -> path of every file that command lines name."""
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def laptop() -> Machine:
    """Two cores without bf16 and no GPU, whatever this machine is."""
    return LAPTOP
