"""Why a fine-tuned classifier decides as it does: words' scores by four methods, and a page."""

from .page import page
from .settings import METHODS, Settings
from .tables import explain, explain_table

__all__ = ["METHODS", "Settings", "explain", "explain_table", "page"]
