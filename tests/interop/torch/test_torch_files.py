"""Files that Optimizer.save wrote, as safetensors.torch reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors import safe_open  # noqa: E402
from safetensors.numpy import load_file as load_as_numpy  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import fusedopt as fo  # noqa: E402
from fusedopt.verify import STORAGES  # noqa: E402


def bits(x: Any) -> bytes:
    """The bytes of an array or tensor in C order."""
    return bytes(x.contiguous().view(-1).view(torch.uint8).numpy() if x.numel() else b"")


@pytest.mark.parametrize("storage", STORAGES)
def test_a_file_loads_with_safetensors_torch(storage: str, tmp_path: Path) -> None:
    """Every array has its dtype, shape and bits: bfloat16, empty arrays and scalars included."""
    dtype, options = STORAGES[storage]
    rng = np.random.default_rng(0)
    shapes = {"w": (70, 64), "none": (0, 3), "no": (0,), "s": (), "odd": (5, 1, 3)}
    params = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    params["f"] = np.asfortranarray(rng.standard_normal((6, 4)).astype(dtype))
    opt = fo.Optimizer(params, fo.AdamW(), ema=0.9, **options)
    for _ in range(2):
        opt.step({name: rng.standard_normal(p.shape).astype(dtype) for name, p in params.items()})
    opt.save(tmp_path / "run.safetensors")
    found = load_file(tmp_path / "run.safetensors")
    expected = load_as_numpy(tmp_path / "run.safetensors")
    assert set(found) == set(expected)
    for key, tensor in found.items():
        array = expected[key]
        assert str(tensor.dtype) == f"torch.{array.dtype.name}", key
        assert tuple(tensor.shape) == array.shape, key
        assert bits(tensor) == array.tobytes(), key
    for name, p in params.items():
        tensor = found[f"p:{name}"]
        values = tensor.double().numpy()
        order = p.T if name == "f" else p
        np.testing.assert_array_equal(values, order.astype(np.float64))
        assert str(tensor.dtype) == f"torch.{p.dtype.name}"
        assert name in {key.partition(":")[2] for key in found if key.startswith("average:")}
    with safe_open(tmp_path / "run.safetensors", "pt") as file:
        assert set(file.keys()) == set(found)


def test_torch_reads_every_dtype_that_is_saved(tmp_path: Path) -> None:
    """Also in a model whose leaves have several dtypes."""
    dtypes = (np.float16, np.float32, np.float64, ml_dtypes.bfloat16)
    params = {np.dtype(d).name: np.arange(6, dtype=np.float32).astype(d) for d in dtypes}
    empty = {f"{name}.none": p[:0] for name, p in params.items()}
    fo.Optimizer({**params, **empty}, fo.Lion()).save(tmp_path / "run")
    found = load_file(tmp_path / "run")
    for name, p in params.items():
        assert found[f"p:{name}"].dtype == getattr(torch, name)
        assert found[f"p:{name}"].tolist() == p.astype(np.float64).tolist()
        assert tuple(found[f"p:{name}.none"].shape) == (0,)
        assert found[f"p:{name}.none"].dtype == getattr(torch, name)
