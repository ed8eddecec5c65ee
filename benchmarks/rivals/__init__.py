"""The rivals of the encoder benchmark, one file a library; bertfast's and transformers' own are in
bertfast.bench.rivals. To add one, subclass `Rival`."""

from bertfast.bench.rivals import Compiled, Eager, Frozen, Loaded, MaxAutotune, Rival, Sdpa

from .ct2 import CTranslate2
from .onednn import OneDnn
from .ort import OnnxRuntime
from .vino import Calibrated, OpenVino

OURS = (Frozen, Loaded)
COMPILED = (Compiled, MaxAutotune)
RIVALS = (
    *(Sdpa, Eager, *COMPILED),
    *(OneDnn, OnnxRuntime, OpenVino, Calibrated, CTranslate2),
)

__all__ = ["COMPILED", "OURS", "RIVALS", "Eager", "Frozen", "OneDnn", "Rival", "Sdpa"]
