"""Compiles the CPU kernels while the package is built; without a compiler the package is built without them, and says so."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from platform import machine

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = Path("src/mlsae/ops/cpu.cpp")
FLAGS = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fPIC", "-shared"]
AVX2 = ["-mavx2", "-mfma", "-mpopcnt"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
X86_LEVELS = {"avx2": AVX2, "avx512": AVX512, "avx512vnni": [*AVX512, "-mavx512vnni"]}


class KernelsHook(BuildHookInterface):
    """Adds `cpu_<level>.lib` to a wheel, or puts them beside the source of an editable installation."""

    def initialize(self, version, build_data):
        """Called by hatchling before it collects the files."""
        if self.target_name != "wheel":
            return
        built = build(Path(self.root))
        if built:
            build_data["artifacts"] += [f"/{path.relative_to(self.root)}" for path in built]
            build_data["pure_python"] = False
            build_data["infer_tag"] = True


def build(root: Path) -> list[Path]:
    """Compile every level that the compiler knows; returns what was built."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        print("mlsae: no C++ compiler was found; the CPU kernels are left out", file=sys.stderr)
        return []
    levels = {"portable": []} | (X86_LEVELS if machine() in ("x86_64", "AMD64") else {})
    with ThreadPoolExecutor() as pool:
        paths = pool.map(lambda level: compile_level(root, compiler, level, levels[level]), levels)
    return [path for path in paths if path is not None]


def compile_level(root: Path, compiler: str, level: str, flags: list[str]) -> Path | None:
    """One library, complete or not there at all."""
    target = root / SOURCE.with_name(f"cpu_{level}.lib")
    partial = target.with_suffix(".partial")
    command = [*compiler.split(), *FLAGS, *flags, str(root / SOURCE), "-o", str(partial)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        print(f"mlsae: {compiler} cannot be run ({error}); the CPU kernels are left out", file=sys.stderr)
        return None
    if result.returncode:
        print(f"mlsae: the CPU kernels for {level} did not compile and are left out:\n{result.stderr}", file=sys.stderr)
        partial.unlink(missing_ok=True)
        return None
    partial.replace(target)
    return target
