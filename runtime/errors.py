"""Errors that the user can mend."""


class UserError(ValueError):
    """The input is at fault, not the program: the message names the value, the rule and the way out."""

    printed_by_main = False  # by another process of the same job, so that this one need not
