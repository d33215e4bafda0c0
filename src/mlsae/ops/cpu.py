"""The ops on a CPU, in C++."""

from torch import Tensor


def unfit(like: Tensor) -> str | None:
    """Why these kernels cannot work on tensors like this one; None: they can."""
    return "not built"
