"""The one exception for data that cannot be had."""


class DataError(RuntimeError):
    """A data set is missing, unreadable or damaged; the message says what was looked for, where, and what to do."""
