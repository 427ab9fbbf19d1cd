"""The device that trains: its name, memory and peak."""

import torch

PEAK_FLOPS = (
    ("GB200", 2.5e15),
    ("B200", 2.25e15),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("RTX 4090", 165e12),
    ("MI300X", 1307e12),
    ("MI325X", 1307e12),
)
"""Dense bfloat16 operations per second, summed in float32, by a part of the device's name; the first match counts.

From the vendors' data sheets as others quote them (half of what they state with sparsity), not from the sheets themselves.
"""

_OTHERS = frozenset({"MIG", "Laptop", "D"})
"""Words in the names of parts of a GPU, and of slower GPUs that are named like another one."""


def device_name(device: torch.device) -> str:
    """The GPU's name, or "cpu (2 threads)"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type} ({threads} {'thread' if threads == 1 else 'threads'})"


def peak_flops(name: str) -> float | None:
    """The peak of a device in operations per second; None if it is not known, as for every CPU and every MIG slice."""
    words = name.split()
    if not _OTHERS.isdisjoint(words):
        return None
    return next((peak for part, peak in PEAK_FLOPS if _matches(part.split(), words)), None)


def memory_bytes(device: torch.device) -> dict[str, int]:
    """Bytes by kind: allocated to tensors, their peak since the start, reserved by torch, and all that the device has. Empty
    for a CPU. Does not wait for the device."""
    if device.type != "cuda":
        return {}
    return {
        "allocated": torch.cuda.memory_allocated(device),
        "peak": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.memory_reserved(device),
        "total": torch.cuda.get_device_properties(device).total_memory,
    }


def _matches(parts: list[str], words: list[str]) -> bool:
    """Each part is a word of the name, or such a word begins with it and a hyphen (A100-SXM4-80GB)."""
    return all(any(word == part or word.startswith(f"{part}-") for word in words) for part in parts)
