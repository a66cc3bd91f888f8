"""The one exception for data that cannot be had or used."""


class DataError(ValueError):
    """A data set is missing, unreadable, damaged or breaks a rule; the message says what was found and what to do."""
