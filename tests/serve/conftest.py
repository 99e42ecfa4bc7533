"""What the tests of the server share: one little model, trained once."""

from pathlib import Path

import pytest
from thinking_model import write_thinking_model


@pytest.fixture(scope="session")
def thinking_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model that knows two questions by heart; trained in about 3 s."""
    folder = tmp_path_factory.mktemp("thinking") / "little"
    write_thinking_model(folder)
    return folder
