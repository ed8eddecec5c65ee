"""The rivals of the encoder benchmark, one file a library. To add one, subclass `Rival`."""

from .base import Rival
from .ct2 import CTranslate2
from .onednn import OneDnn
from .ort import OnnxRuntime
from .ours import Frozen, Loaded
from .stock import Compiled, Eager, Sdpa
from .vino import Calibrated, OpenVino

OURS = (Frozen, Loaded)
RIVALS = (Sdpa, Eager, Compiled, OneDnn, OnnxRuntime, OpenVino, Calibrated, CTranslate2)

__all__ = ["OURS", "RIVALS", "Rival"]
