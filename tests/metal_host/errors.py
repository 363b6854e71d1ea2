"""The error of this package: a kernel that does not compile, or that misbehaved when it ran."""

from __future__ import annotations


class MslError(Exception):
    """What is wrong with the kernel; each line of the text starts with the name of a detector."""
