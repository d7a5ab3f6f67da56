"""Arithmetic that is measured before it is used."""

import pytest
import torch

from mmformer.training import precision


def test_half_precision_on_a_cpu_is_refused_with_the_reason():
    for name in ("16-mixed", "16-true"):
        with pytest.raises(ValueError, match="trains to NaN"):
            precision.check_precision(name, "cpu")
    precision.check_precision("bf16-mixed", "cpu")
    precision.check_precision("16-mixed", "gpu")


def test_fast_products_are_used_only_where_they_are_exact(monkeypatch):
    before = torch.get_float32_matmul_precision()
    try:
        used = precision.fast_matmul(torch.device("cpu"))
        assert precision.matmul_error(torch.device("cpu")) <= 1e-6
        torch.set_float32_matmul_precision("highest")
        monkeypatch.setattr(precision, "matmul_error", lambda device: 3e-3)
        assert not precision.fast_matmul(torch.device("cpu"))
        assert torch.get_float32_matmul_precision() == "highest"
        assert used in (True, False)
    finally:
        torch.set_float32_matmul_precision(before)
