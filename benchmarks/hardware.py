"""The name that some scripts know `common.describe` by."""

from common import describe

__all__ = ["describe"]
