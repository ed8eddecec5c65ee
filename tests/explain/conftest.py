import pytest
import tiny

from bertfast.train import ClassifyConfig, finetune


@pytest.fixture(scope="session")
def colours(tmp_path_factory):
    """The folder of a BERT that learnt which colour is in a text: one word decides."""
    given = tiny.settings(tmp_path_factory.mktemp("colours"), epochs=10)
    finetune(ClassifyConfig(**given))
    return given["out"]
