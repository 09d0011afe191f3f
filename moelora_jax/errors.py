"""Every error that a user's input can cause; each message names the thing and says what to do."""


class MoeLoraError(ValueError):
    """Base class of all errors that this package raises on bad input."""


class MissingPackageError(MoeLoraError):
    """A package is not installed that one of this project's extras brings."""

    def __init__(self, what: object, extra: str) -> None:
        super().__init__(f"{what}: pip install '.[{extra}]' in the project's folder")


class CheckpointError(MoeLoraError):
    """A base checkpoint folder is incomplete, damaged or of an unsupported model."""


class AdapterError(MoeLoraError):
    """An adapter folder is incomplete, damaged, unsupported, or made for another model."""


class LayoutError(AdapterError):
    """The layout of an adapter's experts is in doubt, or not the one that was asked for."""


class CapacityError(MoeLoraError):
    """Something valid does not fit: adapter slots, pages, rank, sequence length or cache blocks."""


class RequestError(MoeLoraError):
    """A batch cannot be run: empty, unknown adapter, token outside the vocabulary, and so on."""


class QueueFullError(MoeLoraError):
    """Too many requests are waiting; the same request may be accepted later."""
