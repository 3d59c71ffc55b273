"""Ranks of a group meet and tell each other a line of text, with a deadline that names who is missing."""

from __future__ import annotations

import time
from collections import Counter
from datetime import timedelta

from torch.distributed import ProcessGroup, distributed_c10d

from .errors import EpTimeoutError

_made: Counter[str] = Counter()


class Meeting:
    """A series of meetings of the ranks of one group, through the store that made the group.

    The store rather than the group's collectives: it needs no GPU, works for gloo and NCCL alike, and a wait that
    expires leaves group and process usable (NCCL's watchdog would end the process, gloo would close the group).

    group: all its ranks construct their meetings in the same order and call `meet` in the same order.
    timeout_s: how long a rank waits for the others at each meeting.
    """

    def __init__(self, group: ProcessGroup, timeout_s: float) -> None:
        self.rank = group.rank()
        self.ranks = group.size()
        self.timeout_s = timeout_s
        self._store = distributed_c10d._get_process_group_store(group)
        _made[group.group_name] += 1
        self._name = f"cutehop/{group.group_name}/{_made[group.group_name]}"
        self._count = 0

    def meet(self, phase: str, words: str = "") -> list[str]:
        """What every rank said, by rank. Returns on no rank before all have come.

        Raises EpTimeoutError with the first rank that is missing.
        """
        self._count += 1
        keys = [f"{self._name}/{self._count}/{rank}" for rank in range(self.ranks)]
        self._store.set(keys[self.rank], words or " ")  # some stores wait for a value that is not empty
        begin = time.monotonic()
        try:
            self._store.wait(keys, timedelta(seconds=self.timeout_s))
        except RuntimeError as error:
            missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
            if not missing:
                raise
            waited = time.monotonic() - begin
            raise EpTimeoutError(self.rank, missing[0], phase, self._count, self._count - 1, waited) from error
        return [self._store.get(key).decode().strip() for key in keys]
