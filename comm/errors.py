"""The error of a wait that ended at its deadline."""

from __future__ import annotations


class EpTimeoutError(RuntimeError):
    """A peer did not do its part of a call within the buffer's deadline.

    The process goes on and can destroy the buffer and make another one; the calls of this buffer are lost.

    rank: whose wait expired, this process.
    peer: the rank it waited for.
    phase: the part of the protocol, e.g. "dispatch_ready" (comm/README.md names them).
    expected, got: the epoch or count that was waited for, and what stood there at the end.
    waited_s: seconds.
    """

    def __init__(self, rank: int, peer: int, phase: str, expected: int, got: int, waited_s: float) -> None:
        self.rank = rank
        self.peer = peer
        self.phase = phase
        self.expected = expected
        self.got = got
        self.waited_s = waited_s
        super().__init__(
            f"rank {rank} waited {waited_s:.3g} s for rank {peer} in {phase}: expected {expected}, got {got}; "
            "if that rank is alive but late, raise the buffer's timeout, else destroy the buffer and make another"
        )

    def __reduce__(self) -> tuple[type[EpTimeoutError], tuple[int, int, str, int, int, float]]:
        # The default passes the message alone to __init__, so that an error from another process could not be read.
        return type(self), (self.rank, self.peer, self.phase, self.expected, self.got, self.waited_s)
