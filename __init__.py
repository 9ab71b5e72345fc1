"""dpipe: from raw robot logs to a trained policy."""

__version__ = "0.1.0"
