"""The exceptions of bertfast.data."""


class DataError(ValueError):
    """Input data that cannot be used; the message names the file, the place and the way out."""


class ConfigError(ValueError):
    """A setting that is unknown, missing or out of range."""
