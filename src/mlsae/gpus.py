"""What GPUs can do at best, by their published data sheets."""

from dataclasses import dataclass, replace

GB, TERA = 10**9, 10**12
Number = int | float


@dataclass(frozen=True)
class Gpu:
    """One device's limits; matrix products are dense, of two 16-bit kinds alike, and sums are float32."""

    name: str
    memory: int
    """Bytes."""
    bfloat16: float
    """FLOP/s of products in bfloat16 or float16."""
    tf32: float
    """The same where torch is told to round float32 products to it (`torch.backends.cuda.matmul.fp32_precision`)."""
    float32: float
    """The same in float32, which is torch's default for float32."""
    bandwidth: float
    """Bytes a second, of its memory."""
    link: float
    """Bytes a second in each direction to the others of its machine: NVLink, else PCIe."""
    kind: str = "cuda"

    def flops(self, dtype: str) -> float:
        """FLOP/s of products in a dtype."""
        return self.float32 if dtype == "float32" else self.bfloat16


def _gpu(name: str, memory: int, tflops: tuple[Number, Number, Number], bandwidth: int, link: int) -> Gpu:
    bfloat16, tf32, float32 = (float(rate * TERA) for rate in tflops)
    return Gpu(name, memory * GB, bfloat16, tf32, float32, float(bandwidth * GB), float(link * GB))


# Vendors' tables give products with sparsity, twice as fast, for some; links both directions together. Here neither is so.
GPUS = {
    # NVIDIA H100 Tensor Core GPU data sheet, column SXM: 1,979 / 989 TFLOPS with sparsity, 67 FP32; NVLink 900 GB/s
    "h100": _gpu("H100 SXM", 80, (989.5, 494.5, 67), 3350, 450),
    # NVIDIA H200 Tensor Core GPU data sheet, column SXM
    "h200": _gpu("H200 SXM", 141, (989.5, 494.5, 67), 4800, 450),
    # NVIDIA A100 Tensor Core GPU data sheet, column 80GB SXM: 312 / 156 / 19.5 TFLOPS; NVLink 600 GB/s
    "a100-80gb": _gpu("A100 SXM 80GB", 80, (312, 156, 19.5), 2039, 300),
    # NVIDIA A100 Tensor Core GPU Architecture white paper, table 1, for the first A100 of 40 GB
    "a100-40gb": _gpu("A100 SXM 40GB", 40, (312, 156, 19.5), 1555, 300),
    # NVIDIA L40S data sheet: 362.05 / 183 / 91.6 TFLOPS; PCIe Gen4 x16, 64 GB/s both ways
    "l40s": _gpu("L40S", 48, (362.05, 183, 91.6), 864, 32),
    # NVIDIA Ada GPU Architecture white paper, appendix A: 165.2 (FP32 sums) / 82.6 / 82.6; PCIe Gen4 x16
    "rtx-4090": _gpu("RTX 4090", 24, (165.2, 82.6, 82.6), 1008, 32),
}


def given(
    gpu: Gpu, memory: float | None, tflops: float | None, bandwidth: float | None, link: float | None, dtype: str
) -> Gpu:
    """The same with what the user knows better: GB, TFLOP/s of products in `dtype`, GB/s and GB/s."""
    rate = "float32" if dtype == "float32" else "bfloat16"
    known = {"memory": memory and int(memory * GB), rate: tflops and tflops * TERA}
    known |= {"bandwidth": bandwidth and bandwidth * GB, "link": link and link * GB}
    changes = {name: value for name, value in known.items() if value is not None}
    return replace(gpu, name=f"{gpu.name}, as given", **changes) if changes else gpu
