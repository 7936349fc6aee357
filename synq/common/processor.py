"""Name and instruction sets of the processor, as Linux reports them. Standard library only."""

import platform

VNNI_FLAGS = frozenset({"avx512_vnni", "avx_vnni", "avx10_1"})
"""Flags of x86 processors that add four products of 8 bits in 32 bits."""


def processor_name() -> str:
    """Return the processor's name as the operating system reports it."""
    return _fact("model name") or platform.processor() or platform.machine()


def processor_flags() -> frozenset[str]:
    """Return the instruction sets of an x86 processor by their flags in Linux; empty where they are unknown."""
    return frozenset(_fact("flags").split())


def _fact(key: str) -> str:
    """Return a fact about the first processor, "" without it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith(key)), "")
    except OSError:
        return ""
