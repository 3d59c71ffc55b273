"""EpConfig: every capacity of one expert-parallel buffer. Plain Python, the same on every rank, no torch, no CUDA."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cutehop.cute_kernels.errors import check

LINE = 128  # bytes of an L2 line: a flag has one to itself, so that polling one never slows a writer of another
VECTOR = 16  # bytes: bulk copies want addresses and sizes that are multiples of it
MAX_RANKS = 8  # GPUs of one NVLink node
MAX_TOPK = 32  # one lane of a warp per choice
MAX_LOCAL_EXPERTS = 1024  # DeepEP V1's limit
MAX_ROWS = 2**31 - 1  # rows and tokens are counted in int32
ITEMSIZE = {"bf16": 2, "fp8": 1}
SCALE_GROUP = {"f32": 128, "ue8m0": 512}  # columns under one 4-byte scale word: one f32, or four packed UE8M0 bytes


def round_up(value: int, unit: int) -> int:
    """The smallest multiple of `unit` that is not below `value`."""
    return -(-value // unit) * unit


@dataclass(frozen=True)
class EpConfig:
    """What one rank of a buffer can hold. All ranks use equal values, since they address each other's memory by it.

    ranks: 1..8, the size of the group.
    hidden: columns of a token; hidden * item size must be a multiple of 16 bytes.
    max_tokens: most tokens that a rank may dispatch in one call, at least 1; a call may bring fewer, or none.
    num_experts: experts of the whole group, a multiple of ranks, at most 1024 per rank; expert e lives on rank
        e // experts_per_rank.
    max_topk: most choices per token, 1..32.
    dtype: "bf16" | "fp8" (e4m3), the widest dispatched row. Combine always moves bf16.
    scales: None | "f32" (one per 128 columns) | "ue8m0" (four bytes, for 512 columns, in one int32), the widest scales
        that come with fp8 rows. "fp8" needs them; "bf16" with scales is a buffer that takes bf16 rows as well as
        fp8 rows with scales (those lie densely, hidden bytes apart, since a view of them must be contiguous).
    max_recv_tokens: most rows that a rank may receive in one call; None is the worst case ranks * max_tokens, in which
        every token goes to the same rank. A lower bound saves memory, and a call that exceeds it fails on every rank.

    Raises TypeError for a value that is no int, ValueError for one outside its limits.
    """

    ranks: int
    hidden: int
    max_tokens: int
    num_experts: int
    max_topk: int
    dtype: str = "bf16"
    scales: str | None = None
    max_recv_tokens: int | None = None

    def __post_init__(self) -> None:
        self._check_types()
        _in_range("ranks", self.ranks, MAX_RANKS, "use one buffer per NVLink node")
        _in_range("max_topk", self.max_topk, MAX_TOPK, "route each token to fewer experts")
        self._check_rows()
        self._check_experts()
        self._check_capacities()

    def _check_types(self) -> None:
        for name in ("ranks", "hidden", "max_tokens", "num_experts", "max_topk"):
            _is_int(name, getattr(self, name))
        if self.max_recv_tokens is not None:
            _is_int("max_recv_tokens", self.max_recv_tokens)

    def _check_rows(self) -> None:
        check(
            self.dtype in ITEMSIZE,
            f"EpConfig: dtype {self.dtype!r}, supported {_names(ITEMSIZE)}; name the widest row that is dispatched",
        )
        check(
            self.scales is None or self.scales in SCALE_GROUP,
            f"EpConfig: scales {self.scales!r}, supported None|{_names(SCALE_GROUP)}; "
            "quantise with one scale per 128 columns",
        )
        check(
            self.dtype != "fp8" or self.scales is not None,
            f"EpConfig: scales None with dtype 'fp8', supported {_names(SCALE_GROUP)}; name the scales of the fp8 rows",
        )
        # With dtype bf16 the fp8 rows of a mixed buffer are the narrower ones, so they set the limit.
        narrowest = 1 if self.scales is not None else self.itemsize
        columns = VECTOR // narrowest
        check(
            self.hidden > 0 and self.hidden % columns == 0,
            f"EpConfig: hidden {self.hidden}, must be a positive multiple of {columns} "
            f"({VECTOR} bytes of {narrowest}-byte elements); pad the hidden size",
        )

    def _check_experts(self) -> None:
        check(
            self.num_experts > 0 and self.num_experts % self.ranks == 0,
            f"EpConfig: num_experts {self.num_experts}, must be a positive multiple of ranks {self.ranks}; "
            "pad the experts so that every rank has as many",
        )
        check(
            self.experts_per_rank <= MAX_LOCAL_EXPERTS,
            f"EpConfig: num_experts {self.num_experts} on {self.ranks} ranks is {self.experts_per_rank} per rank, "
            f"limit {MAX_LOCAL_EXPERTS}; use more ranks",
        )

    def _check_capacities(self) -> None:
        _in_range("max_tokens", self.max_tokens, MAX_ROWS // self.ranks, "dispatch in smaller batches")
        if self.max_recv_tokens is not None:
            cure = "leave it None for the worst case ranks * max_tokens"
            _in_range("max_recv_tokens", self.max_recv_tokens, self.ranks * self.max_tokens, cure)

    @property
    def itemsize(self) -> int:
        """Bytes of one element of the widest dispatched row."""
        return ITEMSIZE[self.dtype]

    @property
    def experts_per_rank(self) -> int:
        return self.num_experts // self.ranks

    @property
    def recv_rows(self) -> int:
        """Rows that one rank can receive in one call; a token counts once per rank, with one or more experts there."""
        return self.ranks * self.max_tokens if self.max_recv_tokens is None else self.max_recv_tokens

    @property
    def x_row_bytes(self) -> int:
        """One dispatched token, dense: a multiple of 16 because hidden was checked."""
        return self.hidden * self.itemsize

    @property
    def scale_row_bytes(self) -> int:
        """Scales of one fp8 token, padded for bulk copies; 0 without scales."""
        return 0 if self.scales is None else round_up(4 * -(-self.hidden // SCALE_GROUP[self.scales]), VECTOR)

    @property
    def topk_row_bytes(self) -> int:
        """Side record of one token: max_topk int32 expert ids, then max_topk f32 weights, padded for bulk copies."""
        return round_up(8 * self.max_topk, VECTOR)

    @property
    def send_list_bytes(self) -> int:
        """int32 token indices for one destination rank."""
        return round_up(4 * self.max_tokens, LINE)

    @property
    def expert_count_bytes(self) -> int:
        """One 64-bit {epoch, choices} word per local expert, from one source rank."""
        return round_up(8 * self.experts_per_rank, LINE)

    @property
    def y_row_bytes(self) -> int:
        """One bf16 row of expert output."""
        return 2 * self.hidden

    @property
    def y_weight_row_bytes(self) -> int:
        """max_topk f32 weights that travel home with a row, padded for bulk copies."""
        return round_up(4 * self.max_topk, VECTOR)


def _names(supported: Iterable[object]) -> str:
    return "|".join(map(str, supported))


def _is_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"EpConfig: {name} {value!r} is {type(value).__name__}, must be an int; pass a Python int")


def _in_range(name: str, value: int, limit: int, cure: str) -> None:
    check(1 <= value <= limit, f"EpConfig: {name} {value}, supported 1..{limit}; {cure}")
