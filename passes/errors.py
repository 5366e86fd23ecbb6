"""Errors a user can act on. Each message names the layer, the op, what was wrong and the way out."""


class T3CError(ValueError):
    """Base of every error this package raises for bad input."""


class CaptureError(T3CError):
    """The model or its example inputs cannot be captured by ``torch.export``."""


class PassConditionError(T3CError):
    """A pass was run on a graph that does not meet its pre-condition, or broke its post-condition."""


class NothingToCompressError(T3CError):
    """No linear or convolution of the model can be made elastic."""


class DataError(T3CError):
    """Data does not fit the model: in the number, dtype or shape of its inputs, or in its labels."""


class BadWeightsError(T3CError):
    """A parameter holds NaN or infinity."""
