"""Words of sums that show by themselves that they have come, and the order of the sums of combine.

Where a sum or a row is awaited its memory holds -0.0 in every word, 32 bits; whoever finds another value has the word.
A word that is -0.0 is sent as +0.0: no sum is, since it begins with +0.0, and for two bf16 values of a row that look
like it zeros change no sum. So nothing has to be ordered, no flag and no second word goes along, and who has read a
word puts -0.0 back. (NVIDIA's TensorRT-LLM sends the parts of its one-shot all-reduce like this.)
"""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Boolean, Float32, Int32

from ...cute_kernels.sm90 import ptx
from ...cute_kernels.sm90.address import unpack_bf16
from .verbs import PHASE, Group, aborted, report

UNSET = -(1 << 31)  # -0.0
COLUMNS = 8  # that a lane takes: two vectors of sums, or one of a row


def store_vector(address, words):
    """16 bytes to any rank's memory, each word whole."""
    cute.arch.inline_ptx(
        "st.relaxed.sys.global.v4.b32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};",
        read_only_args=[address, *(unlike_unset(word) for word in words)],
    )


@cute.jit
def unlike_unset(word: Int32):
    return word if word != UNSET else Int32(0)


def load_vector(address):
    """16 bytes of my memory as four Int32, each word whole."""
    return cute.arch.inline_ptx(
        "ld.relaxed.sys.global.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
        write_only_types=[Int32, Int32, Int32, Int32],
        read_only_args=[address],
    )


def is_set(words):
    one, other, third, last = words
    return (one != UNSET) & (other != UNSET) & (third != UNSET) & (last != UNSET)


@cute.jit
def take_vector(g: Group, address, words, epoch, source):
    """The vector once it is there; -0.0 is put back. Anything if the rank gives up. words: of load_vector."""
    one, other, third, last = words
    came = is_set(words)
    if not came:
        start, stop = cute.arch.globaltimer(), aborted(g)
        while (not came) & (not stop):
            one, other, third, last = load_vector(address)
            came = is_set((one, other, third, last))
            waited = cute.arch.globaltimer() - start
            if (not came) & (waited > g.timeout_ns):
                stop = Boolean(True)
                report(g, source, PHASE["ll_ready"], epoch, epoch - 1, waited)
    ptx.st_global(address, *(Int32(UNSET) for _ in range(4)))
    return one, other, third, last


@cute.jit
def add_row(acc: cute.Tensor, weight: Float32, words):
    """acc += weight * values of 8 columns, bf16."""
    for i, value in enumerate(unpack_bf16(words)):
        acc[i] = ptx.add_product(acc[i], weight, value)


@cute.jit
def end_rank(total: cute.Tensor, acc: cute.Tensor):
    """The sum of one rank's rows is whole: add it, and begin the next."""
    for i in cutlass.range_constexpr(COLUMNS):
        total[i] = total[i] + acc[i]
        acc[i] = Float32(0.0)


@cute.jit
def store_total(address, total: cute.Tensor):
    """8 columns of the result, rounded to bf16."""
    packed = cute.make_rmem_tensor(COLUMNS, BFloat16)
    packed.store(total.load().to(BFloat16))
    words = cute.recast_tensor(packed, Int32)
    ptx.st_global(address, *(words[i] for i in range(4)))


@cute.jit
def place_in_order(rank: Int32, choices: Int32):
    """By one warp. Of lane j the place of its choice among all, by rank and then by choice. rank: of choice j, a large
    number for none. choices: lanes that have one."""
    lane = cute.arch.lane_idx()
    key, place = rank * 32 + lane, Int32(0)
    for j in cutlass.range(choices, unroll=1):
        place += Int32(cute.arch.shuffle_sync(key, j) < key)
    return place


def lowest_bit(mask):
    """Its number, 32 if there is none."""
    return Int32(cute.arch.clz(cute.arch.brev(mask)))
