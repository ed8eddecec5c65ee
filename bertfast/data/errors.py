"""What bertfast.data raises."""


class DataError(ValueError):
    """Input data that cannot be used; the message names the file, the place and the way out."""


class EmptyDataError(DataError):
    """Sound data, but nothing of what is asked for."""


class ConfigError(ValueError):
    """A setting that is unknown, missing or out of range."""
