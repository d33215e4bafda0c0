"""The faults that benchmarks/faults.py plants: each has its place in the source; the slow form plants them all."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from faults import FAULTS, ROOT, Fault, planted  # noqa: E402

from mlsae.ops import cpu  # noqa: E402


def test_every_fault_has_its_place_in_the_source_and_a_test() -> None:
    """What is planted is Python, or the suite would be red for want of a parenthesis; what is C++ is compiled with it."""
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 32
    for fault in FAULTS:
        source = (ROOT / "src" / "mlsae" / fault.file).read_text()
        assert fault.file.endswith(".cpp") or ast.parse(fault.planted_in(source)), fault.name
        file, _, function = fault.test.partition("[")[0].partition("::")
        assert f"def {function}(" in (ROOT / "tests" / file).read_text(), fault.name


def test_a_fault_without_a_single_place_is_refused_by_name() -> None:
    fault = Fault("a slip", "sae.py", "k", "k - 1", "test_sae.py::test_decoding_by_hand")
    assert fault.planted_in("top(k)") == "top(k - 1)"
    for source in ("top(n)", "top(k, k)"):
        with pytest.raises(ValueError, match=f"'a slip': its text stands {source.count('k')} times in sae.py"):
            fault.planted_in(source)


@pytest.mark.skipif(cpu.missing() is not None, reason="the kernels are not built")
def test_a_fault_in_cpp_is_in_the_library_while_it_is_planted_and_gone_after(tmp_path: Path) -> None:
    fault = next(fault for fault in FAULTS if fault.file == "ops/cpu.cpp")
    for file in ("hatch_build.py", "src/mlsae/ops/cpu.cpp", f"src/mlsae/ops/cpu_{cpu.best_level()}.lib"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    library = tmp_path / "src" / "mlsae" / "ops" / f"cpu_{cpu.best_level()}.lib"
    sound = library.read_bytes()
    with planted(fault, tmp_path):
        assert library.read_bytes() != sound
    assert library.read_bytes() == sound
    slip = fault._replace(new="no such statement;")
    with pytest.raises(RuntimeError, match="the kernels do not compile"), planted(slip, tmp_path):
        pass
    assert library.read_bytes() == sound


@pytest.mark.slow
def test_every_fault_turns_its_test_red() -> None:
    done = subprocess.run([sys.executable, BENCHMARKS / "faults.py"], stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1] == f"{len(FAULTS)} of {len(FAULTS)} caught"
