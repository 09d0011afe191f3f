"""The benchmark of whole models: every launch counts under its kind."""

import ast

from benchmarks.whole_model import KIND_OF_FOLDER, kind_of, own_kernels
from tests.conftest import ROOT


def launched() -> dict[str, set[str]]:
    """Names that are given to ``launch`` in each folder of kernels, and those of Mosaic's."""
    found: dict[str, set[str]] = {}
    for file in (ROOT / "kernels" / "moelora_kernels").glob("*/*.py"):
        names = found.setdefault(file.parent.name, set())
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            if isinstance(node.func, ast.Name) and node.func.id == "launch":
                names |= {name.id for name in ast.walk(node.args[0]) if isinstance(name, ast.Name)}
            for keyword in node.keywords:
                if keyword.arg == "kernel_name":
                    strings = ast.walk(keyword.value)
                    names |= {
                        f"{string.value}_mosaic_gpu_kernel"
                        for string in strings
                        if isinstance(string, ast.Constant) and isinstance(string.value, str)
                    }
    return found


def test_each_launch_of_ours_has_the_kind_of_its_folder() -> None:
    for folder, names in launched().items():
        own = names & own_kernels().keys()
        # A name that is no kernel's is a variable that holds one of several.
        assert names - own <= {"kernel"}, f"{folder}: {names - own}"
        assert {kind_of(name) for name in own} <= {KIND_OF_FOLDER.get(folder)}
    assert kind_of("multiply_tiles") == "linear maps"
    assert kind_of("gate_up_mosaic_mosaic_gpu_kernel") == "experts"


def test_launches_of_others() -> None:
    for name, kind in (
        ("MemcpyD2H", "copies"),
        ("nvjet_sm90_tss_128x128_64x6_2x1_v_bz_TNT", "matrix products"),
        ("gemm_fusion_dot_1", "matrix products"),
        ("input_scatter_fusion", "cache"),
        ("set_case_condition", "other fusions"),
        ("loop_add_fusion", "other fusions"),
        ("a_new_kernel", "unknown"),
    ):
        assert kind_of(name) == kind, name
