"""Time the Triton ops on a CUDA device beside dense torch and beside the device's own limits.

    python benchmarks/gpu.py [--rounds 20]

A row of the table is one op at one size and precision. FLOPs and bytes are counted by formula: what the op must compute, and
every tensor that it must read or write, once. `roofline` is its time over the least that these allow at the speed of a large
product and of a large copy, both measured here first. `peer` is torch compiled, with a dense code, for the encoder and the whole
step, and `reference` for the sparse ops. Times are medians; the cache is overwritten before every call.
"""

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mlsae import ops
from mlsae.ops import gpu, reference

SIZES = ((6, 2048, 512, 8192, 32), (6, 2048, 512, 32768, 32), (6, 2048, 576, 8192, 32), (6, 2048, 576, 32768, 32))
"""Layers, tokens, d_model, n_latents, k."""
TINY = ((2, 8, 20, 80, 3),)
PRECISIONS = ("float32", "tf32", "bfloat16")
MULTIPLY = ("encode", "step")
"""The ops with a product that precision changes."""
MIB = 1 << 20


@dataclass(frozen=True)
class Case:
    """The tensors of one size: a batch in the `layer` frame, weights, and a code of the batch."""

    resid: Tensor
    shift: Tensor
    scale: Tensor
    W_enc: Tensor
    W_dec: Tensor
    bias: Tensor
    k: int
    values: Tensor
    indices: Tensor

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Rows, d_model, n_latents, k."""
        return self.resid[..., 0].numel(), self.resid.shape[2], len(self.W_enc), self.k


@dataclass(frozen=True)
class Work:
    """What an op cannot do without."""

    flops: float
    bytes: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, roof: "Work") -> float:
        """The least time at so many of each a second."""
        return max(self.flops / roof.flops, self.bytes / roof.bytes)


def make_case(layers: int, tokens: int, d_model: int, n_latents: int, k: int, device: str) -> Case:
    """Random tensors, and the code that encoding them gives."""
    torch.manual_seed(0)
    with torch.device(device):
        resid = torch.randn(layers, tokens, d_model)
        shift, scale = torch.randn(layers, 1, d_model), torch.rand(layers, 1, 1) + 0.5
        W_dec = torch.nn.functional.normalize(torch.randn(n_latents, d_model))
        W_enc, bias = W_dec.clone().requires_grad_(), torch.zeros(d_model).requires_grad_()
    with torch.no_grad():
        values, indices = ops.encode(resid, shift, scale, bias, W_enc, k, "triton")
    return Case(resid, shift, scale, W_enc, W_dec.requires_grad_(), bias, k, values, indices)


# ---- the contenders --------------------------------------------------------------------------------------------------


def triton_ops(case: Case) -> dict[str, Callable[[], object]]:
    """Every op, and all of a training step but the optimizer."""
    c = case
    pairs, rows = (c.values.flatten(0, 1), c.indices.flatten(0, 1)), c.resid.flatten(0, 1)
    detached = c.W_dec.detach()

    def step() -> object:
        values, indices = ops.encode(c.resid, c.shift, c.scale, c.bias, c.W_enc, c.k, "triton")
        args = values, indices, c.W_dec, c.bias, c.resid, c.shift, c.scale
        _, squared = ops.decode_error(*args, impl="triton")
        return torch.autograd.grad(squared.sum(), (c.W_enc, c.W_dec, c.bias))

    framed = c.resid, c.shift, c.scale, c.bias.detach(), c.W_enc.detach(), c.k
    error = c.values, c.indices, detached, c.bias.detach(), c.resid, c.shift, c.scale, True
    return {
        "encode": lambda: gpu.encode(*framed),
        "decode": lambda: gpu.decode(*pairs, detached),
        "dots": lambda: gpu.dots(pairs[1], detached, rows),
        "decode_error": lambda: gpu.decode_error(*error),
        "latent_gradient": lambda: gpu.latent_gradient(*pairs, rows, len(detached)),
        "step": step,
    }


def peers(case: Case, compiled: Callable) -> dict[str, Callable[[], object]]:
    """The same: dense and compiled where there is a product over all latents, `reference` where there is none."""
    c = case
    pairs, rows = (c.values.flatten(0, 1), c.indices.flatten(0, 1)), c.resid.flatten(0, 1)
    detached = c.W_dec.detach()

    @compiled
    def encode(
        resid: Tensor, shift: Tensor, scale: Tensor, bias: Tensor, W_enc: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = (resid - shift) / scale - bias
        top = (x @ W_enc.T).topk(c.k, sorted=False)
        return top.values.relu(), top.indices, x

    @compiled
    def squared(resid: Tensor, shift: Tensor, scale: Tensor, bias: Tensor, W_enc: Tensor, W_dec: Tensor) -> Tensor:
        pre_acts = ((resid - shift) / scale - bias) @ W_enc.T
        top = pre_acts.topk(c.k, sorted=False)
        code = torch.zeros_like(pre_acts).scatter(-1, top.indices, top.values.relu())
        return (resid - (code @ W_dec + bias) * scale - shift).square().sum()

    def step() -> object:
        loss = squared(c.resid, c.shift, c.scale, c.bias, c.W_enc, c.W_dec)
        return torch.autograd.grad(loss, (c.W_enc, c.W_dec, c.bias))

    framed = c.resid, c.shift, c.scale, c.bias.detach(), c.W_enc.detach()
    error = c.values, c.indices, detached, c.bias.detach(), c.resid, c.shift, c.scale, True
    return {
        "encode": lambda: encode(*framed),
        "decode": lambda: reference.decode(*pairs, detached),
        "dots": lambda: reference.dots(pairs[1], detached, rows),
        "decode_error": lambda: reference.decode_error(*error),
        "latent_gradient": lambda: reference.latent_gradient(*pairs, rows, len(detached)),
        "step": step,
    }


def work(case: Case) -> dict[str, Work]:
    """FLOPs and bytes of every op; all tensors are float32 but the indices, which are int64."""
    rows, d_model, n_latents, k = case.sizes
    batch, weights, code = 4 * rows * d_model, 4 * n_latents * d_model, 12 * rows * k
    sparse = 2 * rows * k * d_model
    found = {
        "encode": Work(2 * rows * d_model * n_latents, 2 * batch + weights + code),
        "decode": Work(sparse, code + weights + batch),
        "dots": Work(sparse, code + weights + batch),
        "decode_error": Work(2 * sparse, code + 4 * rows * k + weights + 2 * batch),
        "latent_gradient": Work(sparse, code + batch + weights),
    }
    both_gradients = found["latent_gradient"] + found["latent_gradient"]
    bias = Work(2 * (rows + n_latents) * d_model, batch + weights)
    return found | {"step": found["encode"] + found["decode_error"] + both_gradients + bias}


def compiled_for_cuda(fn: Callable) -> Callable:
    """`torch.compile` for one size, however many came before."""
    torch.compiler.reset()
    return torch.compile(fn, dynamic=False)


# ---- the clock -------------------------------------------------------------------------------------------------------


def seconds(call: Callable[[], object], rounds: int, device: str) -> float:
    """Median time of a call, after three that are not counted; each meets a cache full of something else."""
    for _ in range(3 if device == "cuda" else 1):
        call()
    if device != "cuda":
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    filler = torch.empty(256 * MIB, dtype=torch.int8, device=device)
    spans = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(rounds)]
    for start, end in spans:
        filler.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in spans) / 1e3


def roof(rounds: int, device: str) -> Work:
    """FLOPs a second of a large product in the precision that is set, and bytes a second of a large copy."""
    n, size = (8192, 1024 * MIB) if device == "cuda" else (64, MIB)
    left, source = torch.randn(n, n, device=device), torch.zeros(size, dtype=torch.int8, device=device)
    if torch.is_autocast_enabled(device):
        left = left.to(torch.get_autocast_dtype(device))
    target = torch.empty_like(source)
    product, copy = seconds(lambda: left @ left, rounds, device), seconds(lambda: target.copy_(source), rounds, device)
    return Work(2 * n**3 / product, 2 * size / copy)


@contextlib.contextmanager
def precision(name: str, device: str) -> Iterator[None]:
    """float32 products exact, or by tf32, or by bfloat16 under autocast."""
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    with torch.autocast(device, dtype=torch.bfloat16, enabled=name == "bfloat16"):
        yield


# ---- the table -------------------------------------------------------------------------------------------------------


def print_rows(case: Case, name: str, limit: Work, rounds: int, device: str, compiled: Callable) -> None:
    """One row for each op."""
    others, needed, size = peers(case, compiled), work(case), " x ".join(map(str, case.sizes))
    for op, call in triton_ops(case).items():
        if op not in MULTIPLY and name != PRECISIONS[0]:
            continue
        ours, theirs = seconds(call, rounds, device), seconds(others[op], rounds, device)
        tflops, gbytes = needed[op].flops / ours / 1e12, needed[op].bytes / ours / 1e9
        print(
            f"| {op} | {size} | {name} | {1e3 * ours:.3f} | {tflops:.1f} | {gbytes:.0f} "
            f"| {ours / needed[op].seconds(limit):.2f} | {1e3 * theirs:.3f} | {theirs / ours:.2f} |",
            flush=True,
        )


def main() -> None:
    """Print the limits, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--interpret", action="store_true", help=argparse.SUPPRESS)  # tiny, on a CPU: does it run?
    options = parser.parse_args()
    device = "cpu" if options.interpret else "cuda"
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        print("There is no CUDA device here, so there is nothing to time.")
        return
    compiled = compiled_for_cuda if device == "cuda" else lambda fn: fn
    print(f"{torch.cuda.get_device_name() if device == 'cuda' else 'interpreter'}, torch {torch.__version__}\n")
    limits = {}
    for name in PRECISIONS:
        with precision(name, device):
            limits[name] = roof(options.rounds, device)
        print(f"- {name}: {limits[name].flops / 1e12:.0f} TFLOP/s, {limits[name].bytes / 1e9:.0f} GB/s")
    print(
        "\n| op | rows x d_model x n_latents x k | precision | ms | TFLOP/s | GB/s | roofline | peer ms | peer / ours |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for size in TINY if options.interpret else SIZES:
        case = make_case(*size, device)
        for name in PRECISIONS:
            with precision(name, device):
                print_rows(case, name, limits[name], options.rounds, device, compiled)


if __name__ == "__main__":
    main()
