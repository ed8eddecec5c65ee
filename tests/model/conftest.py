import pytest
import torch
from native import config

import bertfast


@pytest.fixture
def folder(tmp_path):
    """A small BertModel's."""
    torch.manual_seed(0)
    bertfast.BertModel(config()).save_pretrained(tmp_path)
    return tmp_path
