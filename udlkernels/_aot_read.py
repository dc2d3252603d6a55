"""Reads what a compiled GPU kernel costs: registers, spills, shared memory, instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from typing import Any

# Per multiprocessor: 32-bit registers, shared memory in bytes, warps, blocks.
_NVIDIA_LIMITS = {
    80: (65536, 167936, 64, 32),
    90: (65536, 233472, 64, 32),
    100: (65536, 233472, 64, 32),
}
_NVIDIA_BLOCK_RESERVE = 1024  # shared memory that the driver keeps for itself in each block
_AMD_WAVES = 8  # a SIMD's limit on gfx9

# Opcode prefixes worth a column of their own, as the assembler prints them.
_NVIDIA_OPCODES = {
    "local": ("LDL", "STL"),
    "shared": ("LDS", "STS"),
    "shuffle": ("SHFL",),
    "barrier": ("BAR",),
    "fma": ("FFMA", "FMUL", "FADD"),
    "special": ("MUFU",),
    "tensor": ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA"),
    "atomic": ("ATOM", "RED."),
}
_AMD_OPCODES = {
    "local": ("scratch_load", "scratch_store"),
    "shared": ("ds_read", "ds_write", "ds_load", "ds_store"),
    "shuffle": ("ds_bpermute", "ds_permute", "ds_swizzle", "v_permlane", "v_mov_b32_dpp"),
    "barrier": ("s_barrier",),
    "fma": ("v_fma", "v_pk_fma", "v_mul_f32", "v_add_f32", "v_pk_mul_f32", "v_pk_add_f32"),
    "special": ("v_rcp", "v_rsq", "v_sqrt", "v_exp", "v_log"),
    "tensor": ("v_mfma",),
    "atomic": ("global_atomic", "buffer_atomic"),
}


def read_nvidia(cubin: bytes, ptxas_log: str, arch: int, metadata: Any) -> dict[str, Any]:
    """Facts of a cubin; `ptxas_log` is what `ptxas -v` printed."""
    opcodes = _sass_opcodes(cubin)
    registers = _first_int(r"Used (\d+) registers", ptxas_log)
    spills = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", ptxas_log)))
    loads = [name for name in opcodes if name.startswith(("LDG", "LDGSTS", "UTMALDG"))]
    stores = [name for name in opcodes if name.startswith(("STG", "UTMASTG"))]
    return {
        "registers": registers,
        "spills": spills,
        "shared": metadata.shared,
        "occupancy": nvidia_occupancy(arch, registers, metadata.shared, metadata.num_warps),
        "loads": len(loads),
        "loads_128": sum(_is_wide(name) for name in loads),
        "stores": len(stores),
        "stores_128": sum(_is_wide(name) for name in stores),
        "instructions": _counts(opcodes, _NVIDIA_OPCODES),
    }


def read_amd(assembly: str, metadata: Any) -> dict[str, Any]:
    """Facts of AMD assembly: its trailing metadata and its instructions."""
    body, _, trailer = assembly.partition(".amdgpu_metadata")
    opcodes = re.findall(r"^\t([a-z]\w+)", body, re.MULTILINE)
    loads = [name for name in opcodes if re.match(r"(global|buffer|flat)_load_", name)]
    stores = [name for name in opcodes if re.match(r"(global|buffer|flat)_store_", name)]
    spills = _first_int(r"\.vgpr_spill_count:\s*(\d+)", trailer)
    spills += _first_int(r"\.sgpr_spill_count:\s*(\d+)", trailer)
    waves = _first_int(r"; Occupancy:\s*(\d+)", assembly)
    return {
        "registers": _first_int(r"\.vgpr_count:\s*(\d+)", trailer),
        "spills": spills,
        "shared": metadata.shared,
        "occupancy": min(1.0, waves / _AMD_WAVES),
        "loads": len(loads),
        "loads_128": sum(name.endswith("dwordx4") for name in loads),
        "stores": len(stores),
        "stores_128": sum(name.endswith("dwordx4") for name in stores),
        "instructions": _counts(opcodes, _AMD_OPCODES),
    }


def nvidia_occupancy(arch: int, registers: int, shared: int, num_warps: int) -> float:
    """Share of a multiprocessor's warps that fit at once; 0 for an unknown architecture."""
    if arch not in _NVIDIA_LIMITS or registers == 0:
        return 0.0
    file_size, shared_size, max_warps, max_blocks = _NVIDIA_LIMITS[arch]
    per_warp = -(-registers * 32 // 256) * 256  # registers are handed out 256 at a time
    blocks = min(
        max_blocks,
        max_warps // num_warps,
        file_size // per_warp // num_warps,
        shared_size // (shared + _NVIDIA_BLOCK_RESERVE),
    )
    return blocks * num_warps / max_warps


def _sass_opcodes(cubin: bytes) -> list[str]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-sass", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    # "/*0090*/  @!P0 LDG.E.128 R4, ..." -> "LDG.E.128"
    return re.findall(
        r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", listing, re.MULTILINE
    )


def _is_wide(opcode: str) -> bool:
    return opcode.startswith("UTMA") or bool({"128", "256"} & set(opcode.split(".")))


def _counts(opcodes: list[str], groups: dict[str, tuple[str, ...]]) -> dict[str, int]:
    names = Counter(opcodes)
    totals = {
        group: sum(count for name, count in names.items() if name.startswith(prefixes))
        for group, prefixes in groups.items()
    }
    return {"all": len(opcodes), **totals}


def _first_int(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else 0
