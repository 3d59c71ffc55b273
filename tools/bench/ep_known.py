"""Figures to compare with: DeepEP V1's, from another run on the same kind of machine, and the project's limits."""

from __future__ import annotations

from tools.bench.ep_setting import Setting

DEEPEP_SOURCE = "DeepEP V1 567632d, same set-up, another run"
SM_SEND_GBS = 63.0  # 32 bytes a clock of 1.98 GHz, see cute_kernels/README.md

_ONE_GPU = (8, 1)  # eight ranks share one H100
_TWO_GPUS = (2, 2)

# (ranks, gpus) -> SMs per rank -> row -> us. The first SM count serves rows of other SM counts.
DEEPEP: dict[tuple[int, int], dict[int, dict[str, float]]] = {
    _ONE_GPU: {
        16: {"layout": 62, "dispatch-bf16": 3301, "dispatch-fp8": 1797, "dispatch-fp8-full": 1859, "combine": 3071},
    },
    _TWO_GPUS: {
        24: {
            "layout": 35,
            "dispatch-bf16": 362,
            "dispatch-fp8": 252,
            "dispatch-fp8-full": 286,
            "combine": 437,
            "ll-pair-t1": 68,
            "ll-pair-t8": 120,
            "ll-pair-t32": 145,
            "ll-pair-t128": 147,
        },
        48: {"layout": 35, "dispatch-bf16": 250, "dispatch-fp8": 157, "dispatch-fp8-full": 185, "combine": 275},
    },
}
LL_LIMITS: dict[tuple[int, int], dict[str, float]] = {  # whatever the SMs
    _ONE_GPU: {"ll-pair-t1": 30},
    _TWO_GPUS: {"ll-pair-t1": 18, "ll-pair-t8": 22, "ll-pair-t32": 30, "ll-pair-t128": 50},
}
COPY = "copy-"  # rows with the local copy of the tensor that such a call of the name behind it copies
FOREIGN = "-foreign"  # rows with tensors from elsewhere, which DeepEP always takes

LIMITS: dict[tuple[int, int], dict[int, dict[str, float]]] = {
    _ONE_GPU: {
        16: {"dispatch-bf16": 2000, "dispatch-fp8": 1050, "dispatch-fp8-full": 1120, "combine": 1300},
    },
    _TWO_GPUS: {
        8: {"dispatch-bf16": 185, "dispatch-fp8": 100, "combine": 190},
        4: {"dispatch-bf16": 203.5, "dispatch-fp8": 110, "combine": 209},  # 10 % above those of 8 SMs
    },
}
LAYOUT_LIMIT_US = 20.0  # eight ranks on one GPU
HOST_LIMIT_US = 60.0  # a dispatch call that waits for nothing
CREATION_LIMIT_S = 6.0  # eight ranks on one GPU, rendezvous included
NVLINK_LIMIT_GBS, NVLINK_LIMIT_SMS = 380.0, 16  # rows received, bf16, eight GPUs, with at most so many SMs


def deepep(setting: Setting, name: str, sms: int | None) -> tuple[float, int] | None:
    """DeepEP V1's time for the row, us, and the SMs it had. None if nobody measured it."""
    by_sms = DEEPEP.get((setting.ranks, setting.gpus)) if setting.usual else None
    if by_sms is None:
        return None
    used = sms if sms in by_sms else next(iter(by_sms))
    us = by_sms[used].get(name.removesuffix(FOREIGN))
    return None if us is None else (us, used)


def limit_us(setting: Setting, name: str, sms: int | None, logical_bytes: float | None) -> float | None:
    """The project's goal for the row. logical_bytes: rows received times the bytes of a row, if it moves rows."""
    if not setting.usual or not setting.gpus:
        return None
    where = (setting.ranks, setting.gpus)
    if name.startswith("host-"):
        return HOST_LIMIT_US
    if name in LL_LIMITS.get(where, {}):
        return LL_LIMITS[where][name]
    if name == "layout":
        return LAYOUT_LIMIT_US if where == _ONE_GPU else None
    if where == (8, 8) and name in ("dispatch-bf16", "combine") and sms and sms <= NVLINK_LIMIT_SMS and logical_bytes:
        return logical_bytes / NVLINK_LIMIT_GBS / 1e3
    return LIMITS.get(where, {}).get(sms or 0, {}).get(name)


def creation_limit_s(setting: Setting) -> float | None:
    return CREATION_LIMIT_S if (setting.ranks, setting.gpus) == _ONE_GPU else None
