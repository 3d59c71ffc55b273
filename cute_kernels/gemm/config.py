"""Shapes, budgets and host-side choices of the grouped GEMM: plain Python, importable without the DSL."""

from dataclasses import dataclass
from functools import lru_cache

from ..gemm_decode import config as decode

EPILOGUES = ("store", "swiglu", "swiglu_fp8")
WIDE, TALL, MIDDLE = (128, 256), (256, 128), (192, 128)  # (tile_m, tile_n)
TILES = {"bf16": (WIDE, TALL), "fp8": (WIDE, MIDDLE)}
FEWEST_ROWS = {"bf16": 1, "fp8": 2}  # mean rows per expert up to which an expert without rows is likely
LONG_K = 3072  # from which on one tile more for some SMs than for others costs more than sharing out all bytes equally
MIDDLE_ROWS = {"bf16": (112, 256), "fp8": (112, 176)}  # mean rows per expert, from and to, for which not the wide tile
UNIT = 64  # rows of one wgmma, of one TMA box of activations, and that a tile may have fewer than others
GROUP = 128  # columns that share a scale, of activations and of weights
BLOCK_BYTES = 128  # of K in one pipeline stage: the width of the swizzle; one scale block of FP8
RING_BYTES = 208 * 1024  # shared memory for the stages
ORDERS = 8  # tile numbers on their way from the loader to the math, more than stages
RASTER_ROWS = 2048  # that the walk of an expert's tiles keeps together, see tiles.Tile
MAX_EXPERTS = 1024
FP8_MAX = 448.0
FP8_MIN_AMAX = 1e-4  # as cutehop.ref.quant: an all-zero group has a scale that is not 0


@dataclass(frozen=True)
class GemmConfig:
    """One compiled kernel. dtype: "bf16" | "fp8"; epilogue: "store" | "swiglu" | "swiglu_fp8".

    tile_m: rows of a CTA's tile, the same part of them each math warpgroup's. tile_n: its weight rows; with SwiGLU half
    are of gate, half the same of up. Together one of TILES.
    """

    dtype: str
    epilogue: str
    tile_m: int = WIDE[0]
    tile_n: int = WIDE[1]

    @property
    def element_bytes(self) -> int:
        return 2 if self.dtype == "bf16" else 1

    @property
    def block_k(self) -> int:
        """Columns of K in one pipeline stage."""
        return BLOCK_BYTES // self.element_bytes

    @property
    def paired(self) -> bool:
        """Whether a tile is made of gate and up rows."""
        return self.epilogue != "store"

    @property
    def tile_out(self) -> int:
        """Output columns of a tile."""
        return self.tile_n // 2 if self.paired else self.tile_n

    @property
    def box_n(self) -> int:
        """Weight rows of one TMA box."""
        return self.tile_out

    @property
    def possible(self) -> bool:
        """Whether a tile has the columns that share a scale of the output."""
        return self.epilogue != "swiglu_fp8" or self.tile_out == GROUP

    @property
    def stages(self) -> int:
        return RING_BYTES // ((self.tile_m + self.tile_n) * BLOCK_BYTES)

    @property
    def math_wgs(self) -> int:
        """Warpgroups that multiply."""
        return 3 if self.tile_m == 192 else 2

    @property
    def wg_rows(self) -> int:
        """Rows of the tile that are one math warpgroup's."""
        return self.tile_m // self.math_wgs

    @property
    def mma_n(self) -> int:
        """Weight rows of one wgmma: all of the tile, or with FP8 128."""
        return GROUP if self.dtype == "fp8" else self.tile_n

    @property
    def raster_tiles(self) -> int:
        """Row tiles that the walk keeps together."""
        return RASTER_ROWS // self.tile_m

    def column_tiles(self, columns: int) -> int:
        """Tiles of an output row."""
        return -(-columns // self.tile_out)


@lru_cache(4096)
def choose(
    dtype: str,
    epilogue: str,
    experts: int,
    limit: int,
    masked: bool,
    expected_rows: int,
    weight_rows: int,
    k: int,
    num_sms: int,
) -> GemmConfig | decode.GemmDecodeConfig:
    """The kernel of a call, from shapes and the caller's hint alone.

    limit: rows of all experts together, or if masked of each. expected_rows: mean rows per expert; 0: as many as fit.
    Few rows of few experts would leave most SMs without a tile, and with the fewest rows there may be little more than
    one long tile for each: another kernel shares the weights' bytes out equally. Where a wide tile is too low for most
    experts and two are mostly empty, there is one of half the columns.
    """
    mean = expected_rows or (limit if masked else -(-limit // experts))
    few = decode.choose(dtype, epilogue, mean, limit)
    column_tiles = few.column_tiles(weight_rows)
    uneven = mean <= FEWEST_ROWS[dtype] and k >= LONG_K and 4 * column_tiles <= num_sms
    if few.fits(mean, limit) and experts <= decode.MAX_EXPERTS and (uneven or 2 * experts * column_tiles <= num_sms):
        return few
    config = GemmConfig(dtype, epilogue, *TILES[dtype][1])
    low, high = MIDDLE_ROWS[dtype]
    return config if config.possible and low <= mean <= high else GemmConfig(dtype, epilogue)


def num_ctas(experts: int, rows: int, columns: int, config: GemmConfig, num_sms: int) -> int:
    """CTAs of a launch: one per SM, or fewer where even a row tile more in every expert could not fill them.

    rows: of all experts together. columns: of the output.
    """
    row_tiles = -(-rows // config.tile_m) + experts
    return min(num_sms, row_tiles * config.column_tiles(columns))
