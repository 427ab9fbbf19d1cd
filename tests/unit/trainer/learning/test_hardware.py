"""Names and peaks of devices."""

import pytest
import torch

from updraft_trainer.learning.hardware import device_name, memory_bytes, peak_flops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
    ],
)
def test_the_peak_of_a_common_gpu_is_known_by_its_name(name: str, peak: float) -> None:
    assert peak_flops(name) == peak


@pytest.mark.parametrize("name", ["cpu (2 threads)", "NVIDIA GeForce GTX 1080", "NVIDIA A1000", ""])
def test_another_device_has_no_known_peak(name: str) -> None:
    assert peak_flops(name) is None


@pytest.mark.parametrize("name", ["NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H100 80GB HBM3 MIG 3g.40gb"])
def test_a_slice_of_a_gpu_has_no_known_peak(name: str) -> None:
    assert peak_flops(name) is None


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D"])
def test_a_slower_gpu_does_not_have_the_peak_of_its_namesake(name: str) -> None:
    assert peak_flops(name) is None


def test_a_cpu_is_named_with_its_threads_and_has_no_gpu_memory() -> None:
    threads = torch.get_num_threads()
    assert device_name(torch.device("cpu")) == f"cpu ({threads} thread{'s' if threads > 1 else ''})"
    assert memory_bytes(torch.device("cpu")) == {}
