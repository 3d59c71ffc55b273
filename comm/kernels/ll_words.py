"""Words that carry their epoch: what few tokens are dispatched as in the low-latency mode, and the asking of combine.

A word of data lies beside the epoch in 64 bits, which are written and seen as a whole. Who sees the epoch has the word,
so nothing has to be ordered: no fence, no flag behind the data, no trip to know that it has arrived. It takes twice the
bytes, which does not matter for a few tokens. (NCCL's protocol "LL" sends like this.)

A vector of 16 bytes holds 8 bytes of the payload: payload byte b is in the vector at 2 b. The memory is of words only:
whatever else lay in it could look like an epoch.
"""

import cutlass.cute as cute
from cutlass import Boolean, Int32

from .verbs import PHASE, Group, aborted, report


def uses_words(g: Group) -> bool:
    """Whether a build may send words: to mapped peers that are never left out."""
    return not g.remote and not g.elastic


def store_words(address, a, b, epoch):
    """Two words into one vector, of any rank's memory."""
    cute.arch.inline_ptx(
        "{ .reg .b64 x, y; mov.b64 x, {{$r1}, {$r3}}; mov.b64 y, {{$r2}, {$r3}}; "
        "st.relaxed.sys.global.v2.b64 [{$r0}], {x, y}; }",
        read_only_args=[address, a, b, epoch],
    )


def load_words(address):
    """(word, its epoch, word, its epoch) of a vector in my memory."""
    return cute.arch.inline_ptx(
        "{ .reg .b64 x, y; ld.relaxed.sys.global.v2.b64 {x, y}, [{$r0}]; "
        "mov.b64 {{$w0}, {$w1}}, x; mov.b64 {{$w2}, {$w3}}, y; }",
        write_only_types=[Int32, Int32, Int32, Int32],
        read_only_args=[address],
    )


@cute.jit
def wait_words(g: Group, address, found, epoch, source, phase: int = PHASE["ll_ready"]):
    """The words of a vector, loaded again until both are of `epoch`, and whether they are. found: of load_words."""
    a, a_epoch, b, b_epoch = found
    came = (a_epoch == epoch) & (b_epoch == epoch)
    if not came:
        start, stop = cute.arch.globaltimer(), aborted(g)
        while (not came) & (not stop):
            a, a_epoch, b, b_epoch = load_words(address)
            came = (a_epoch == epoch) & (b_epoch == epoch)
            waited = cute.arch.globaltimer() - start
            if (not came) & (waited > g.timeout_ns):
                stop = Boolean(True)
                report(g, source, phase, epoch, a_epoch, waited)
    return a, b, came
