"""Decoder blocks, and what stands in for them during one pass.

An *edit* is given a function that runs the block, and the block's input, and returns the block's output. Reading a layer
runs the block and keeps what it returned, replacing a layer changes it, and a block that need not be computed passes its
input through.
"""

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor, nn

from mlsae.errors import ConfigError

Edit = Callable[[Callable[[], Tensor], Tensor], Tensor]
"""(function that runs the block, the block's input) -> what the next block receives."""


class Block:
    """A decoder block whose forward an edit can stand in for."""

    def __init__(self, module: nn.Module):
        self._module = module
        self._rest: tuple[None, ...] | None = None  # what a block that is not run returns beside the stream

    @contextlib.contextmanager
    def edited(self, edit: Edit) -> Generator[None]:
        """While open, the block returns what `edit` says, in the block's own kind: a tensor or a tuple."""
        own = self._module.__dict__.get("forward")  # set by others, such as accelerate
        self._module.forward = self._standing_in(self._module.forward, edit)
        try:
            yield
        finally:
            del self._module.forward
            if own is not None:
                self._module.forward = own

    def _standing_in(self, forward: Callable[..., Any], edit: Edit) -> Callable[..., Any]:
        def stand_in(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            rest: tuple[Any, ...] | None = self._rest

            def run() -> Tensor:
                nonlocal rest
                output = forward(hidden_states, *args, **kwargs)
                if not isinstance(output, tuple):
                    return output
                rest = output[1:]
                self._rest = (None,) * len(rest)
                return output[0]

            resid = edit(run, hidden_states)
            return resid if rest is None else (resid, *rest)

        return stand_in


def pass_through(run: Callable[[], Tensor], flowing: Tensor) -> Tensor:
    """A block that is not computed."""
    return flowing


def keep_in(row: Tensor) -> Edit:
    """The block as it is, its output kept in `row`."""

    def edit(run: Callable[[], Tensor], flowing: Tensor) -> Tensor:
        resid = run()
        row.copy_(resid)
        return resid

    return edit


def replace_by(fn: Callable[[Tensor], Tensor], layer: int, device: torch.device) -> Edit:
    """The block, and `fn` of its output, which gets it on a device in float32. Raises ConfigError if the shape changes."""

    def edit(run: Callable[[], Tensor], flowing: Tensor) -> Tensor:
        resid = run()
        replacement = fn(resid.to(device, torch.float32))
        check_shape(replacement, tuple(resid.shape), layer)
        return replacement.to(resid)

    return edit


def watch(layer: int, inputs: dict[int, Tensor], outputs: dict[int, Tensor]) -> Edit:
    """The block as it is, its input and output kept."""

    def edit(run: Callable[[], Tensor], flowing: Tensor) -> Tensor:
        inputs[layer] = flowing.clone()
        resid = run()
        outputs[layer] = resid.clone()
        return resid

    return edit


def check_shape(resid: Any, expected: tuple[int, ...], layer: int) -> None:
    """Raises ConfigError unless this is a residual stream of this shape."""
    shape = tuple(resid.shape) if isinstance(resid, Tensor) else type(resid).__name__
    if shape != expected:
        raise ConfigError("resid", f"{shape} given for layer {layer}; it must be [batch, pos, d_model] = {expected}")
