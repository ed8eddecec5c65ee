import audited
import pytest
import tiny


@pytest.fixture(scope="session")
def classifiers(tmp_path_factory):
    """{"group": the folder of a classifier with a planted bias, "colour": one without}."""
    folder = tmp_path_factory.mktemp("audited")
    return {by: audited.trained(folder / by, by) for by in ("group", "colour")}


@pytest.fixture(scope="session")
def table(tmp_path_factory):
    """Rows whose labels have nothing to do with their group."""
    return tiny.write(tmp_path_factory.mktemp("table") / "test.jsonl", audited.rows(200, 3))
