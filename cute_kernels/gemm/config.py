"""Shapes, budgets and host-side choices of the grouped GEMM: plain Python, importable without the DSL."""

from dataclasses import dataclass

from ..gemm_decode import config as decode

DTYPES = ("bf16", "fp8")
EPILOGUES = ("store", "swiglu", "swiglu_fp8")
WG_ROWS = 64  # rows of one math warpgroup: one wgmma M
TILE_M = 2 * WG_ROWS  # rows of a CTA's tile, one warpgroup each half
TILE_N = 256  # weight rows of a CTA's tile; with SwiGLU 128 of gate and the same 128 of up
GROUP = 128  # columns that share a scale, of activations and of weights
BLOCK_BYTES = 128  # of K in one pipeline stage: the width of the swizzle; one scale block of FP8
STAGES = 4
STAGE_BYTES = (TILE_M + TILE_N) * BLOCK_BYTES
RASTER_ROWS = 16  # row tiles that the walk of an expert's tiles keeps together, see tiles.Tile
MAX_EXPERTS = 1024
FP8_MAX = 448.0
FP8_MIN_AMAX = 1e-4  # as cutehop.ref.quant: an all-zero group has a scale that is not 0


@dataclass(frozen=True)
class GemmConfig:
    """One compiled kernel. dtype: "bf16" | "fp8"; epilogue: "store" | "swiglu" | "swiglu_fp8"."""

    dtype: str
    epilogue: str

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
        return TILE_N // 2 if self.paired else TILE_N

    @property
    def box_n(self) -> int:
        """Weight rows of one TMA box."""
        return self.tile_out

    def column_tiles(self, columns: int) -> int:
        """Tiles of an output row."""
        return -(-columns // self.tile_out)


def choose(
    dtype: str, epilogue: str, experts: int, limit: int, masked: bool, expected_rows: int = 0
) -> GemmConfig | decode.GemmDecodeConfig:
    """The kernel of a call, from shapes and the caller's hint alone.

    limit: rows of all experts together, or if masked of each. expected_rows: mean rows per expert; 0: as many as fit.
    Few rows leave the weights' bytes as the bound, and a tile of 128 rows mostly empty: another kernel.
    """
    mean = expected_rows or (limit if masked else -(-limit // experts))
    if mean <= decode.MAX_MEAN_ROWS and experts <= decode.MAX_EXPERTS:
        return decode.choose(dtype, epilogue, mean, limit)
    return GemmConfig(dtype, epilogue)


def num_ctas(experts: int, rows: int, columns: int, config: GemmConfig, num_sms: int) -> int:
    """CTAs of a launch: one per SM, or fewer where even a row tile more in every expert could not fill them.

    rows: of all experts together. columns: of the output.
    """
    row_tiles = -(-rows // TILE_M) + experts
    return min(num_sms, row_tiles * config.column_tiles(columns))
