"""Text in, padded batches out: tables, cleaning, splitting, labels, tokenisation, a report.

Imports numpy and torch only; pyarrow is loaded where a Parquet file is read.
"""

from .batching import UNKNOWN, batches, collate, encode, unknown_share, unknown_text
from .candidates import Candidates, load_candidates, read_candidates
from .cells import normal
from .clean import clean_text
from .errors import DataError
from .examples import Examples, load_classification, read_texts
from .labels import LabelSet
from .pool import ahead
from .report import Report, dataset_report
from .splitting import split
from .tables import ROWS, read_chunks, read_table
from .translations import Translations, load_translations, read_sources

__all__ = [
    "ROWS",
    "UNKNOWN",
    "Candidates",
    "DataError",
    "Examples",
    "LabelSet",
    "Report",
    "Translations",
    "ahead",
    "batches",
    "clean_text",
    "collate",
    "dataset_report",
    "encode",
    "load_candidates",
    "load_classification",
    "load_translations",
    "normal",
    "read_candidates",
    "read_chunks",
    "read_sources",
    "read_table",
    "read_texts",
    "split",
    "unknown_share",
    "unknown_text",
]
