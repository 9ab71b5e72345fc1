"""dpipe: from raw robot logs to a trained policy."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .streams.dataset import open_dataset
    from .streams.targets import open_targets

__all__ = ["open_dataset", "open_targets"]


def __getattr__(name: str) -> Any:
    """The public names load when they are asked for: `import dpipe` costs nothing."""
    if name == "open_targets":
        from .streams.targets import open_targets

        return open_targets
    if name == "open_dataset":
        from .streams.dataset import open_dataset

        return open_dataset
    raise AttributeError(f"module 'dpipe' has no attribute {name!r}")
