"""DeepEP V1's Config, its tables per group size, and the formulas of its size hints. No torch, no GPU.

The hints give V1's numbers, so that callers which compute with them (one buffer for several configs, a bigger one
where a hint grows) go on working. cutehop itself needs other sizes: see num_nvl_bytes of Buffer.
"""

from __future__ import annotations

from dataclasses import dataclass

from cutehop.cute_kernels.errors import check

NODE_RANKS = 8  # GPUs that see each other over NVLink
ALIGNMENT = 128  # bytes, of every buffer size in V1
SOURCE_META_BYTES = 8  # where a row came from, in V1's queues between nodes
# V1 sizes its queues for at most 128 choices (int64 id, f32 weight) and 128 scales (f32) per token.
SIDE_BYTES = SOURCE_META_BYTES + 128 * 8 + 128 * 4 + 128 * 4

# Ranks: (NVLink send chunk, NVLink queue, RDMA send chunk, RDMA queue), in tokens.
DISPATCH_CHUNKS = {
    2: (24, 256, 6, 128),
    4: (6, 256, 6, 128),
    8: (6, 256, 6, 128),
    16: (36, 288, 20, 128),
    **dict.fromkeys((24, 32, 48, 64), (32, 288, 8, 128)),
    96: (20, 480, 12, 128),
    128: (20, 560, 12, 128),
    144: (32, 720, 12, 128),
    160: (28, 720, 12, 128),
}
COMBINE_CHUNKS = {
    2: (10, 256, 6, 128),
    4: (9, 256, 6, 128),
    8: (4, 256, 6, 128),
    16: (4, 288, 12, 128),
    **dict.fromkeys((24, 32, 48, 64), (1, 288, 8, 128)),
    96: (1, 480, 8, 128),
    128: (1, 560, 8, 128),
    144: (2, 720, 8, 128),
    160: (2, 720, 8, 128),
}


@dataclass(frozen=True)
class Config:
    """Tuning of one call: `num_sms` is how many SMs it uses, here also an odd number, and not the same in dispatch and
    combine if you like.

    The chunk and queue sizes of V1's queues (tokens) are checked by V1's rules and otherwise unused: rows are pulled
    to their final place, there is no queue. The RDMA queue is rounded up to a multiple of its send chunk, as in V1.

    RuntimeError where V1 raises it: num_sms < 0, a chunk or queue < 1, an NVLink queue not above its chunk, an RDMA
    queue below two chunks.
    """

    num_sms: int = 20
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256

    def __post_init__(self) -> None:
        nvl_send, nvl_queue = self.num_max_nvl_chunked_send_tokens, self.num_max_nvl_chunked_recv_tokens
        rdma_send, rdma_queue = self.num_max_rdma_chunked_send_tokens, self.num_max_rdma_chunked_recv_tokens
        check(self.num_sms >= 0, f"Config: num_sms {self.num_sms}, needs >= 0; pass a number of SMs", RuntimeError)
        check(
            0 < nvl_send < nvl_queue,
            f"Config: num_max_nvl_chunked_send_tokens {nvl_send}, num_max_nvl_chunked_recv_tokens {nvl_queue}, needs "
            "0 < send < recv; pass a longer queue",
            RuntimeError,
        )
        check(
            0 < rdma_send <= rdma_queue // 2,
            f"Config: num_max_rdma_chunked_send_tokens {rdma_send}, num_max_rdma_chunked_recv_tokens {rdma_queue}, "
            "needs 0 < 2 * send <= recv; pass a longer queue",
            RuntimeError,
        )
        object.__setattr__(self, "num_max_rdma_chunked_recv_tokens", -(-rdma_queue // rdma_send) * rdma_send)

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes of V1's NVLink buffer. hidden_bytes: hidden * max(item size, 2), so that combine's bf16 fits too.

        RuntimeError for more than 8 ranks that are no multiple of 8, or with an odd num_sms.
        """
        nodes, local_ranks = max(num_ranks // NODE_RANKS, 1), min(num_ranks, NODE_RANKS)
        if num_ranks > NODE_RANKS:
            self._check_nodes("get_nvl_buffer_size_hint", num_ranks)
        queues = self.num_sms // 2 * local_ranks
        row_bytes = self.num_max_nvl_chunked_recv_tokens * (hidden_bytes + SIDE_BYTES)
        return -(-queues * (4 * (2 * nodes + 3) + row_bytes) // ALIGNMENT) * ALIGNMENT

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes of V1's RDMA buffer, 0 on one node. RuntimeError as for get_nvl_buffer_size_hint."""
        if num_ranks <= NODE_RANKS:
            return 0
        self._check_nodes("get_rdma_buffer_size_hint", num_ranks)
        queues = self.num_sms // 2 * (num_ranks // NODE_RANKS)
        row_bytes = self.num_max_rdma_chunked_recv_tokens * (hidden_bytes + SIDE_BYTES + 16)
        return -(-2 * queues * (4 * (2 * NODE_RANKS + 2) + row_bytes) // ALIGNMENT) * ALIGNMENT

    def _check_nodes(self, name: str, num_ranks: int) -> None:
        check(
            num_ranks % NODE_RANKS == 0 and self.num_sms % 2 == 0,
            f"{name}: {num_ranks} ranks, num_sms {self.num_sms}, several nodes need a multiple of {NODE_RANKS} ranks "
            "and an even num_sms; change them",
            RuntimeError,
        )


def from_table(table: dict[int, tuple[int, int, int, int]], num_ranks: int, num_sms: int) -> Config:
    """V1's recommendation for a group size. AssertionError, as in V1, for a size that is not in its table."""
    check(
        num_ranks in table,
        f"deep_ep: {num_ranks} ranks, DeepEP V1 has tuned {'|'.join(map(str, table))}; pass Config(num_sms)",
        AssertionError,
    )
    return Config(num_sms, *table[num_ranks])


def low_latency_rdma_size_hint(num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> int:
    """Bytes of V1's low-latency buffer: twice (flags, send area, receive area), rounded up by at least one unit."""
    dispatch_row = 16 + 2 * hidden  # bf16; fp8 with its scales is smaller
    combine_row = 4 * (hidden // 128) + 2 * hidden
    slots = num_experts * num_max_dispatch_tokens_per_rank
    send = max(num_max_dispatch_tokens_per_rank * dispatch_row, slots * combine_row)
    receive = slots * max(dispatch_row, combine_row)
    check(
        send % 16 == 0 and receive % 16 == 0,
        f"get_low_latency_rdma_size_hint: {num_max_dispatch_tokens_per_rank} tokens of hidden {hidden} are no multiple "
        "of 16 bytes; pass a hidden size that is a multiple of 128",
        RuntimeError,
    )
    flags = -(-4 * num_experts // ALIGNMENT) * ALIGNMENT
    return (2 * (flags + send + receive) // ALIGNMENT + 1) * ALIGNMENT
