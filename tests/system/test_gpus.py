"""GPUs by name and by size."""

from __future__ import annotations

import pytest

from terdit_cli.errors import UsageError
from terdit_cli.system.gpus import GPUS, device_peak, find_gpu, find_memory


@pytest.mark.parametrize(
    ("text", "memory", "peak"),
    [
        ("h100", 80e9, 989e12),
        (" H100 ", 80e9, 989e12),
        ("4090", 24e9, 165.2e12),
        ("RTX 4090", 24e9, 165.2e12),
        ("80GB", 80e9, None),
        ("80 gb", 80e9, None),
        ("79.5GiB", 79.5 * 2**30, None),
        ("512MB", 512e6, None),
    ],
)
def test_memory_and_peak(text: str, memory: float, peak: float | None) -> None:
    assert find_memory(text) == (int(memory), peak)


@pytest.mark.parametrize("text", ["4090", "rtx4090", "RTX 4090", "rtx-4090 "])
def test_a_data_sheet_by_name(text: str) -> None:
    assert find_gpu(text) is GPUS["4090"]


@pytest.mark.parametrize("text", ["80GB", "", "rtx", "h1000"])
def test_no_data_sheet(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_gpu(text)
    assert f"unknown --gpu: got {text!r}" in str(caught.value)
    assert ("did you mean 'h100'" in str(caught.value)) == (text == "h1000")


@pytest.mark.parametrize("name", GPUS)
def test_data_sheets_are_of_one_unit(name: str) -> None:
    """Ratios that hold for all of them, so that a slip of a thousand or a factor of two shows."""
    gpu = GPUS[name]
    assert 1.9 < gpu.int8 / gpu.bf16 < 4.1
    assert gpu.fp8 is None or 1.9 < gpu.fp8 / gpu.bf16 < 2.1
    assert 75 < gpu.bf16 / gpu.bandwidth < 450  # operations a byte
    assert 20e9 < gpu.memory < 200e9
    assert gpu.title.split()[-1].lower() in name or name.split("-")[0] in gpu.title.lower()


@pytest.mark.parametrize("text", ["", "80", "GB", "0GB", "-1GB", "80TB", "h1000", "eighty GB"])
def test_what_is_no_memory(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_memory(text)
    assert repr(text) in str(caught.value)
    assert "80GB or one of b200, h200, h100" in str(caught.value)
    assert ("did you mean 'h100'" in str(caught.value)) == (text == "h1000")


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GH200 480GB", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100-40"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L40", None),
        ("NVIDIA L4", "l4"),
        ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GB200", None),
        ("Tesla T4", None),
    ],
)
def test_peaks_by_the_names_of_devices(device: str, name: str | None) -> None:
    assert device_peak(device) == (None if name is None else GPUS[name].bf16)
