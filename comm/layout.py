"""EpLayout: where everything lies in the memory of one rank. One object owns every byte, for the host and for kernels.

Offsets are Python ints, relative to the base address of a rank's memory, and equal on all ranks because the config is.
README.md tells the protocol in which the regions are used.
"""

from __future__ import annotations

from dataclasses import dataclass

from .config import LINE, MAX_RANKS, EpConfig, round_up

ROW_ALIGN = 1024  # bytes: start of a region of rows, and what the base address of the memory must be a multiple of
OPERATIONS = ("dispatch", "combine")  # item of `epochs`
KERNELS = ("dispatch_send", "dispatch_receive", "combine_send", "combine_receive")  # item of `arrivals`
ERROR_WORDS = ("raised", "peer", "phase", "expected", "got", "waited_ns")  # 64-bit each; `raised` is written last
PHASES = (
    "none",
    "dispatch_ack",  # peer has not read my rows of the call before
    "counts",  # peer has not said how many tokens it sends
    "dispatch_ready",  # peer's rows are not there
    "combine_ack",
    "combine_ready",
    "ll_ack",  # low latency: peer has not read what I sent it four operations ago
    "ll_counts",  # peer has not said how much it sends
    "ll_ready",  # peer's data is not there
    "ll_asks",  # peer has not asked for its tokens' sums; it may have called a half of combine
    "rows",  # no wait: I receive `expected` rows, the output or the memory holds `got`
)  # what a kernel was waiting for, by the number in the error record


@dataclass(frozen=True)
class Region:
    """`items` pieces of `item_bytes` bytes.

    name: also the attribute of EpLayout.
    memory: "heap" (symmetric device memory, mapped by all peers) | "host" (pinned, mapped into this rank's GPU only).
    offset: bytes from the base of that memory, a multiple of `align`.
    users: who writes and who reads it.
    """

    name: str
    memory: str
    offset: int
    items: int
    item_bytes: int
    align: int
    users: str

    @property
    def bytes(self) -> int:
        return round_up(self.items * self.item_bytes, self.align)

    @property
    def end(self) -> int:
        return self.offset + self.bytes

    def at(self, item: int) -> int:
        """Byte offset of an item."""
        return self.offset + item * self.item_bytes


class Memory:
    """Places regions one behind the other."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.regions: list[Region] = []

    @property
    def end(self) -> int:
        return self.regions[-1].end if self.regions else 0

    def place(self, name: str, items: int, item_bytes: int, users: str, align: int = LINE) -> Region:
        offset = round_up(self.end, align)
        self.regions.append(Region(name, self.name, offset, items, item_bytes, align, users))
        return self.regions[-1]

    def lines(self, name: str, items: int, users: str) -> Region:
        """Words that are polled or added to, each on a line of its own."""
        return self.place(name, items, LINE, users)

    def rows(self, name: str, items: int, item_bytes: int, users: str) -> Region:
        return self.place(name, items, item_bytes, users, ROW_ALIGN)


class EpLayout:
    """Regions of one rank under `config`; not changed after construction.

    regions: all of them, heap before host, by ascending offset. The rank itself counts as one of its peers.
    control_bytes: the heap's first bytes, flags and counters, which must be zero before the first call; the rest need
        not be initialised. They come first so that no payload ever lies where a flag is polled.
    heap_bytes: symmetric memory of one rank, a multiple of 1024. The base must be aligned to ROW_ALIGN; what a provider
        adds by its own granularity is not in here.
    host_bytes: pinned memory of one rank.
    str(layout) is a table of it all.
    """

    def __init__(self, config: EpConfig) -> None:
        self.config = config
        heap, host = Memory("heap"), Memory("host")
        self._place_control(heap)
        self.control_bytes = heap.end
        self._place_dispatch(heap)
        self._place_combine(heap)
        self._place_host(host)
        self.regions = (*heap.regions, *host.regions)
        self.heap_bytes = round_up(heap.end, ROW_ALIGN)
        self.host_bytes = host.end

    def _place_control(self, heap: Memory) -> None:
        """Offsets are the same for every config, so that kernels know them when they are compiled."""
        ranks, lines = MAX_RANKS, heap.lines
        self.abort = lines("abort", 1, "mine alone: set where a deadline expired; every kernel reads it and returns")
        self.dispatch_ready = lines("dispatch_ready", ranks, "peer s stores epoch: its input stands; I poll item s")
        self.dispatch_ack = lines("dispatch_ack", ranks, "peer r stores epoch: it has my rows; I poll item r")
        self.combine_ready = lines("combine_ready", ranks, "peer r stores epoch: its y stands; I poll item r")
        self.combine_ack = lines("combine_ack", ranks, "peer s stores epoch: it has its rows of my y; I poll item s")
        self.counts = lines("counts", ranks, "peer s writes {epoch, tokens s -> r} of all r, I read the whole matrix")
        self.epochs = lines("epochs", len(OPERATIONS), "mine alone: last kernel of a call adds one, all kernels read")
        self.arrivals = lines("arrivals", len(KERNELS), "mine alone: CTAs that are done; the last one sends the flags")
        self.expert_counts = heap.place(
            "expert_counts",
            self.config.ranks,
            self.config.expert_count_bytes,
            "peer s writes {epoch, choices} of each of my experts; I read",
        )

    def _place_dispatch(self, heap: Memory) -> None:
        c, rows = self.config, heap.rows
        self.send_lists = heap.place(
            "send_lists", c.ranks, c.send_list_bytes, "I write my tokens for peer r, ascending; r reads item r"
        )
        self.topk = rows("topk", c.max_tokens, c.topk_row_bytes, "I write ids and weights; peers pull")
        self.x_scales = rows("x_scales", c.max_tokens, c.scale_row_bytes, "I write fp8 scales; peers pull")
        self.x = rows("x", c.max_tokens, c.x_row_bytes, "I write my tokens; peers pull those on their list")

    def _place_combine(self, heap: Memory) -> None:
        c, rows = self.config, heap.rows
        users = "I write weights of received rows; the home rank pulls"
        self.y_weights = rows("y_weights", c.recv_rows, c.y_weight_row_bytes, users)
        self.y = rows("y", c.recv_rows, c.y_row_bytes, "I write expert outputs; the home rank pulls and adds")

    def _place_host(self, host: Memory) -> None:
        c = self.config
        self.error = host.lines("error", 1, "the kernel that set abort writes ERROR_WORDS; Python reads and raises")
        self.recv_counts = host.place(
            "recv_counts",
            1 + c.experts_per_rank,
            8,
            "count kernel writes {ticket, rows}, then {ticket, choices} per expert; Python polls",
        )

    def __str__(self) -> str:
        head = ("region", "memory", "offset", "bytes", "items x item bytes", "users")
        table = [head]
        for r in self.regions:
            shape = f"{r.items} x {r.item_bytes}"
            table.append((r.name, r.memory, f"{r.offset:,}", f"{r.bytes:,}", shape, r.users))
        widths = [max(len(row[i]) for row in table) for i in range(len(head) - 1)]
        lines = [
            f"{name:{widths[0]}}  {memory:{widths[1]}}  {offset:>{widths[2]}}  {size:>{widths[3]}}  "
            f"{shape:>{widths[4]}}  {users}"
            for name, memory, offset, size, shape, users in table
        ]
        totals = f"heap {self.heap_bytes:,} bytes ({self.heap_bytes / 2**20:.1f} MiB), "
        totals += f"of which control {self.control_bytes:,}; host {self.host_bytes:,} bytes"
        return "\n".join([str(self.config), *lines, totals])
