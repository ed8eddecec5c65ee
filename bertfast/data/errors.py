"""The one exception of bertfast.data."""


class DataError(ValueError):
    """Input data that cannot be used; the message names the file, the place and the way out."""
