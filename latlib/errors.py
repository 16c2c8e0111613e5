"""Errors that every part of latlib raises."""


class SettingError(ValueError):
    """A setting that cannot be used; the message names the field, the value and the fix."""
