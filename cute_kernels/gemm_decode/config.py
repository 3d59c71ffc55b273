"""Shapes, budgets and host-side choices of the grouped GEMM for few rows: plain Python, importable without the DSL."""

from dataclasses import dataclass

DTYPES = ("bf16", "fp8")
EPILOGUES = ("store", "swiglu", "swiglu_fp8")
TILES_N = (16, 32, 64)  # rows of activations that a tile takes: the N of one wgmma
WG_ROWS = 64  # weight rows of one wgmma
HALF_ROWS = 128  # weight rows of one TMA box, 64 for each math warpgroup, which share an FP8 scale
TILE_W = 2 * HALF_ROWS  # weight rows of a tile; with SwiGLU 128 of gate and the same 128 of up
GROUP = 128  # columns that share a scale, of activations and of weights
BOX_N = 8  # rows of activations of one TMA box: the swizzle's period, so that boxes can be put together
BLOCK_BYTES = 128  # of K in one pipeline stage: the width of the swizzle; one scale block of FP8
RING_BYTES = 225 * 1024  # shared memory for the stages
MAX_EXPERTS = 512
FP8_MAX = 448.0
FP8_MIN_AMAX = 1e-4  # as cutehop.ref.quant: an all-zero group has a scale that is not 0


@dataclass(frozen=True)
class GemmDecodeConfig:
    """One compiled kernel. dtype: "bf16" | "fp8"; epilogue: "store" | "swiglu" | "swiglu_fp8"; tile_n: see TILES_N."""

    dtype: str
    epilogue: str
    tile_n: int

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
        return HALF_ROWS if self.paired else TILE_W

    @property
    def stage_bytes(self) -> int:
        """Weights, activations and, with FP8, two scale products per row of activations."""
        return (TILE_W + self.tile_n) * BLOCK_BYTES + (8 * self.tile_n if self.dtype == "fp8" else 0)

    @property
    def stages(self) -> int:
        return RING_BYTES // self.stage_bytes

    def column_tiles(self, weight_rows: int) -> int:
        """Tiles of `weight_rows` weight rows of an expert."""
        return -(-weight_rows // TILE_W)

    def fits(self, mean: float, limit: int) -> bool:
        """Whether an expert's rows are one tile."""
        return most_rows(mean, limit) <= self.tile_n

    @property
    def partial_bytes(self) -> int:
        """One unfinished tile in fp32."""
        return TILE_W * self.tile_n * 4


def most_rows(mean: float, limit: int) -> float:
    """What next to no expert has more of: three standard deviations above the mean of random routing. None has more
    than `limit`."""
    return min(mean + 3 * mean**0.5, limit)


def choose(dtype: str, epilogue: str, mean: float, limit: int) -> GemmDecodeConfig:
    """The kernel for a mean of `mean` rows per expert.

    An expert with more rows than a tile has its weights read once per tile. A wide tile costs little: a shorter ring,
    no memory traffic.
    """
    rows = most_rows(mean, limit)
    return GemmDecodeConfig(dtype, epilogue, next((n for n in TILES_N if n >= rows), TILES_N[-1]))


def max_units(config: GemmDecodeConfig, experts: int, rows: int, columns: int, k_blocks: int) -> int:
    """K blocks of all tiles of a call, at most. rows: of all experts together. columns: of the output."""
    return (rows // config.tile_n + experts) * -(-columns // config.tile_out) * k_blocks
