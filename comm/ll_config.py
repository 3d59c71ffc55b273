"""LlConfig and LlLayout: capacities and memory of the low-latency mode. Plain Python, the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass

from cutehop.cute_kernels.errors import check

from .config import LINE, MAX_LOCAL_EXPERTS, MAX_RANKS, VECTOR, round_up
from .layout import ROW_ALIGN, Memory, Region

SLOTS = 4  # operations whose data may be in the memory at once; a power of two, since epoch % SLOTS survives a wrap
MAX_OUTSTANDING = SLOTS - 1  # sent and not yet received: a slot is written again only when its last receiver is done
GROUP = 128  # columns under one scale
MAX_TOPK = 16
MAX_HIDDEN = 32768  # a record has to fit into shared memory several times
MAX_SEND_SLOTS = 2**31 - 1  # ranks * max_tokens * max_topk is an int32
MOST_ADDING = 4  # ranks of a group in which the experts' ranks add up a token's rows (kernels/ll_combine_whole.py)
FEW_TOKENS = 8  # up to so many are dispatched as words with an epoch (kernels/ll_words.py)


@dataclass(frozen=True)
class LlConfig:
    """What one rank of a low-latency buffer can hold.

    ranks: 1..8. hidden: columns of a token, a multiple of 128, at most 32768.
    max_tokens: most tokens a rank brings to a call (T), at least 1.
    num_experts: of the whole group, a multiple of ranks, at most 1024 per rank.
    max_topk: most choices per token, 1..16.
    elastic: a wait that expires masks the peer and the call goes on without it, instead of failing the buffer.

    Raises TypeError for a value that is no int, ValueError for one outside its limits.
    """

    ranks: int
    hidden: int
    max_tokens: int
    num_experts: int
    max_topk: int
    elastic: bool = False

    def __post_init__(self) -> None:
        for name in ("ranks", "hidden", "max_tokens", "num_experts", "max_topk"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(
                    f"LlConfig: {name} {value!r} is {type(value).__name__}, must be an int; pass a Python int"
                )
        self._limit("ranks", MAX_RANKS, "use one buffer per NVLink node")
        self._limit("max_topk", MAX_TOPK, "route each token to fewer experts")
        self._limit("hidden", MAX_HIDDEN, "shared memory holds no wider token")
        check(
            self.hidden % GROUP == 0,
            f"LlConfig: hidden {self.hidden}, must be a positive multiple of {GROUP}; pad the hidden size",
        )
        check(
            self.num_experts > 0 and self.num_experts % self.ranks == 0,
            f"LlConfig: num_experts {self.num_experts}, must be a positive multiple of ranks {self.ranks}; pad the "
            "experts so that every rank has as many",
        )
        check(
            self.experts_per_rank <= MAX_LOCAL_EXPERTS,
            f"LlConfig: num_experts {self.num_experts} on {self.ranks} ranks is {self.experts_per_rank} per rank, "
            f"limit {MAX_LOCAL_EXPERTS}; use more ranks",
        )
        self._limit("max_tokens", MAX_SEND_SLOTS // (self.ranks * self.max_topk), "send smaller batches")

    def _limit(self, name: str, most: int, cure: str) -> None:
        value = getattr(self, name)
        check(1 <= value <= most, f"LlConfig: {name} {value}, supported 1..{most}; {cure}")

    @property
    def experts_per_rank(self) -> int:
        return self.num_experts // self.ranks

    @property
    def rows(self) -> int:
        """Rows of one expert's output block: every rank sends it all its tokens."""
        return self.ranks * self.max_tokens

    @property
    def head_bytes(self) -> int:
        """Head of a dispatched record: the token's index, then {expert, row among this source's for it} per choice."""
        return round_up(8 + 8 * self.max_topk, VECTOR)

    @property
    def record_bytes(self) -> int:
        """A dispatched token: head, then either bf16 columns, or e4m3 columns and their scales."""
        return self.head_bytes + 2 * self.hidden  # the scales of e4m3 take less than the byte per column it saves

    @property
    def row_bytes(self) -> int:
        """A bf16 row on its way home."""
        return 2 * self.hidden

    @property
    def limits_bytes(self) -> int:
        """Beside a row that travels encoded: two bf16 for each 128 columns."""
        return round_up(4 * (self.hidden // GROUP), VECTOR)

    @property
    def slot_bytes(self) -> int:
        """Data of one operation: records of all ranks' tokens, or a row for each choice of each of my tokens, then
        the limits of each."""
        dispatch = self.rows * self.record_bytes
        combine = self.max_tokens * self.max_topk * (self.row_bytes + self.limits_bytes)
        return round_up(max(dispatch, combine), ROW_ALIGN)

    @property
    def words_bytes(self) -> int:
        """Records of few tokens of all ranks, each word of data beside its epoch."""
        return round_up(2 * self.ranks * min(FEW_TOKENS, self.max_tokens) * self.record_bytes, ROW_ALIGN)

    @property
    def adds_up(self) -> bool:
        """Whether combine in one launch, to mapped peers, asks for sums. With more ranks a token has about one row on
        each, which nothing is gained by adding up (measured: README.md)."""
        return self.ranks <= MOST_ADDING and not self.elastic

    @property
    def asks_bytes(self) -> int:
        """What all ranks ask in one combine: weight and expert of each choice of each token, each with its epoch."""
        return round_up(16 * self.rows * self.max_topk, ROW_ALIGN)

    @property
    def sums_bytes(self) -> int:
        """A place for a row of each choice of each of my tokens; a sum of several takes two."""
        return self.max_tokens * self.max_topk * self.row_bytes

    @property
    def counts_bytes(self) -> int:
        """Count words of one source: records, then rows of each expert."""
        return round_up(8 * (1 + self.experts_per_rank), LINE)

    @property
    def outbox_rows(self) -> int:
        """The most rows of all my experts in one dispatch."""
        return self.rows * min(self.max_topk, self.experts_per_rank)

    @property
    def outbox_bytes(self) -> int:
        """What one operation puts through NVSHMEM: counts for each rank and my records, or the rows of all my experts,
        of which every token of every rank may have max_topk."""
        records = self.ranks * self.counts_bytes + self.max_tokens * self.record_bytes
        rows = self.outbox_rows * (self.row_bytes + self.limits_bytes)
        return round_up(max(records, rows), ROW_ALIGN)


class LlLayout:
    """Regions of one rank under `config`, as layout.EpLayout has them for the normal mode.

    remote: with an outbox, which peers that NVSHMEM reaches need, last in the heap, and without asks and sums.
    adds_up: combine in one launch asks for sums.
    regions: heap before host, by ascending offset. control_bytes: flags and counters, zero before the first call.
    """

    def __init__(self, config: LlConfig, remote: bool = False) -> None:
        self.config = config
        heap, host = Memory("heap"), Memory("host")
        ranks = MAX_RANKS  # so that flags have the same offsets for every config
        self.abort = heap.lines("abort", 1, "mine alone: set where a deadline expired")
        self.ready = heap.lines("ready", SLOTS * ranks, "peer s stores epoch: its data stands; I poll")
        self.ack = heap.lines("ack", SLOTS * ranks, "peer r stores epoch: it has read what I sent; I poll")
        self.epoch = heap.lines("epoch", 1, "mine alone: a kernel of each operation adds one")
        self.arrivals = heap.lines("arrivals", len(LL_KERNELS), "mine alone: CTAs that are done")
        self.mask = heap.lines("mask", 1, "mine alone: int32 per rank, 1: left out (elastic)")
        self.verdict = heap.lines("verdict", SLOTS, "mine alone: int32 per rank, 2 epoch + left out (elastic)")
        self.told = heap.lines("told", ranks, "peer s stores 1: it has left me out (elastic); I poll")
        self.counts = heap.place(
            "counts",
            SLOTS * config.ranks,
            config.counts_bytes,
            "peer s writes {epoch, records and if they are few}, then {epoch, rows} of each of my experts; for sums "
            "{epoch, tokens}; I poll",
        )
        self.control_bytes = heap.end
        self.data = heap.rows("data", SLOTS, config.slot_bytes, "peers push records or rows; I read")
        self.words = heap.rows("words", SLOTS, config.words_bytes, "records of few tokens: {word, epoch}; I poll")
        self.adds_up = config.adds_up and not remote
        if self.adds_up:
            self.asks = heap.rows("asks", SLOTS, config.asks_bytes, "peer s asks for its tokens' sums; I poll")
            self.sums = heap.rows("sums", 1, config.sums_bytes, "peers write sums that I asked for; I poll, write -0.0")
        if remote:
            self.outbox = heap.rows("outbox", SLOTS, config.outbox_bytes, "mine alone: NVSHMEM's puts read it")
        self.error = host.lines(
            "error", 1, "the kernel that set abort writes layout.ERROR_WORDS; Python reads and raises"
        )
        self.regions: tuple[Region, ...] = (*heap.regions, *host.regions)
        self.heap_bytes = round_up(heap.end, ROW_ALIGN)
        self.host_bytes = host.end


LL_KERNELS = ("dispatch_send", "dispatch_receive", "combine_send", "combine_receive")  # item of `arrivals`
