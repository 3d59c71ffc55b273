"""Loading, launching and tensor maps against a stand-in for libcuda that records what it is given."""

from __future__ import annotations

import ctypes
import struct

import pytest
import torch
from cuda.bindings import driver as real

from cutehop.cute_kernels.errors import CompileInCaptureError
from cutehop.cute_kernels.jit import Bundle, Kernel, TensorMap, compiled, driver, tensor_map, tensormap
from cutehop.cute_kernels.jit.module import ParameterBlock
from cutehop.cute_kernels.jit.probe import ProbeConfig, probe_kernel

OK = real.CUresult.CUDA_SUCCESS
SIZES = {"map": 128, "ptr": 8, "i64": 8, "i32": 4, "f32": 4, "u8": 1}
PARAMS = ("u8", "map", "i32", "ptr", "f32", "i64")


def read_attributes(config) -> dict[str, bytes]:
    """Name -> value of the attributes, from the memory libcuda would read: CUlaunchConfig has the array's address at
    byte 40 and its length at 48; one CUlaunchAttribute is 72 bytes, its id at 0 and its value at 8."""
    raw = ctypes.string_at(int(config.getPtr()), 56)
    address, count = struct.unpack_from("QI", raw, 40)
    blobs = [ctypes.string_at(address + 72 * index, 72) for index in range(count)]
    return {real.CUlaunchAttributeID(struct.unpack_from("i", blob)[0]).name: blob[8:] for blob in blobs}


class FakeCuda:
    """cuda.bindings.driver whose calls succeed; enums and structs are the real ones."""

    def __init__(self) -> None:
        self.device: int | None = 0
        self.capturing = (OK, real.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE)
        self.launch_result = OK
        self.attributes: list[tuple] = []
        self.launches: list[dict] = []
        self.encoded: list[tuple] = []
        self.loaded: list[bytes] = []
        self.params: tuple[str, ...] = ()

    def __getattr__(self, name):
        if name.startswith("cu") and name[2:3].isupper():
            raise AssertionError(f"unexpected driver call {name}")
        return getattr(real, name)

    def cuCtxGetDevice(self):
        return (real.CUresult.CUDA_ERROR_INVALID_CONTEXT, None) if self.device is None else (OK, self.device)

    def cuDevicePrimaryCtxRetain(self, device):
        return OK, ("primary", device)

    def cuCtxSetCurrent(self, context):
        self.device = context[1]
        return (OK,)

    def cuStreamIsCapturing(self, stream):
        return self.capturing

    def cuLibraryLoadData(self, code, *options):
        assert options == ([], [], 0, [], [], 0)
        self.loaded.append(code)
        return OK, "library"

    def cuLibraryGetKernel(self, library, name):
        return OK, ("kernel", library, name)

    def cuKernelSetAttribute(self, attribute, value, kernel, device):
        self.attributes.append((attribute, value, device))
        return (OK,)

    def cuKernelGetFunction(self, kernel):
        return OK, real.CUfunction(77)

    def cuFuncLoad(self, function):
        return (OK,)

    def cuLaunchKernelEx(self, config, function, params, extra):
        pointers = (ctypes.c_void_p * len(self.params)).from_address(params) if self.params else ()
        values = [ctypes.string_at(pointer, SIZES[kind]) for pointer, kind in zip(pointers, self.params)]
        self.launches.append(
            {
                "grid": (config.gridDimX, config.gridDimY, config.gridDimZ),
                "block": (config.blockDimX, config.blockDimY, config.blockDimZ),
                "smem": config.sharedMemBytes,
                "stream": int(config.hStream),
                "attributes": read_attributes(config),
                "function": int(function),
                "values": values,
                "extra": extra,
            }
        )
        return (self.launch_result,)

    def cuTensorMapEncodeTiled(self, dtype, rank, ptr, dims, strides, box, steps, interleave, swizzle, l2, fill):
        ints = tuple(tuple(int(x) for x in items) for items in (dims, strides, box, steps))
        self.encoded.append((dtype.name, rank, ptr, *ints, interleave.name, swizzle.name, l2.name, fill.name))
        return OK, real.CUtensorMap()


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(driver, "bindings", lambda: fake)
    tensormap._encode.cache_clear()
    yield fake
    tensormap._encode.cache_clear()


def make_bundle(params=PARAMS, **changes) -> Bundle:
    fields = {"threads": 384, "smem_bytes": 200_000, "cluster": 1, "pdl": False, "cooperative": False} | changes
    return Bundle(name="k", config="", entry="k_0", params=params, cubin=b"ELF", ptx="", log="", **fields)


# ---- launch --------------------------------------------------------------------------------------------------------


def test_launch_hands_over_every_value(cuda):
    cuda.params = PARAMS
    kernel = Kernel(make_bundle())
    described = TensorMap(range(128))
    kernel.launch((3, 2, 1), 0xABC, 1, described, -5, 2**63 + 16, 0.5, -(2**40))
    kernel.launch((7, 1, 1), 0, 0, TensorMap(bytes(128)), 6, 0, -1.0, 2**40)
    first, second = cuda.launches
    assert first["values"] == [
        b"\1",
        bytes(range(128)),
        struct.pack("i", -5),
        struct.pack("Q", 2**63 + 16),
        struct.pack("f", 0.5),
        struct.pack("q", -(2**40)),
    ]
    assert second["values"][2:] == [struct.pack("i", 6), bytes(8), struct.pack("f", -1.0), struct.pack("q", 2**40)]
    assert (first["grid"], first["stream"], second["grid"], second["stream"]) == ((3, 2, 1), 0xABC, (7, 1, 1), 0)
    assert (first["block"], first["smem"], first["function"], first["extra"]) == ((384, 1, 1), 200_000, 77, 0)
    assert first["attributes"] == {}
    assert cuda.loaded == [b"ELF"]


def test_parameters_lie_at_their_alignment():
    block = ParameterBlock(PARAMS)
    addresses = (ctypes.c_void_p * len(PARAMS)).from_address(block.pointers)
    for kind, address in zip(PARAMS, addresses):
        assert address % min(SIZES[kind], 64) == 0


def test_kernel_without_parameters(cuda):
    Kernel(make_bundle(params=())).launch((1, 1, 1), 0)
    assert len(cuda.launches) == 1


def test_launch_attributes(cuda):
    Kernel(make_bundle(params=(), cluster=2, pdl=True, cooperative=True)).launch((2, 1, 1), 0)
    attributes = cuda.launches[0]["attributes"]
    assert struct.unpack_from("3I", attributes["CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION"]) == (2, 1, 1)
    assert struct.unpack_from("i", attributes["CU_LAUNCH_ATTRIBUTE_COOPERATIVE"]) == (1,)
    assert struct.unpack_from("i", attributes["CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION"]) == (1,)
    assert len(attributes) == 3


def test_function_attributes_are_set_on_the_device(cuda):
    cuda.device = 3
    kind = real.CUfunction_attribute
    dynamic = kind.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    assert Kernel(make_bundle()).device == 3
    assert cuda.attributes == [(dynamic, 200_000, 3)]
    Kernel(make_bundle(cluster=16))
    assert (kind.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1, 3) in cuda.attributes


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((1, 2), r"2 values, the kernel takes 3: i32, f32, map"),
        ((2**31, 1.0, TensorMap(bytes(128))), r"value 0 is 2147483648, the kernel takes i32 there"),
        ((1.5, 1.0, TensorMap(bytes(128))), r"value 0 is 1\.5, the kernel takes i32"),
        ((1, "x", TensorMap(bytes(128))), r"value 1 is 'x', the kernel takes f32"),
        ((1, 1.0, 4096), r"value 2 is 4096, the kernel takes map"),
    ],
)
def test_values_that_do_not_fit(cuda, values, message):
    kernel = Kernel(make_bundle(params=("i32", "f32", "map")))
    with pytest.raises(ValueError, match=message):
        kernel.launch((1, 1, 1), 0, *values)
    assert cuda.launches == []


def test_driver_errors_carry_their_name(cuda):
    kernel = Kernel(make_bundle(params=()))
    cuda.launch_result = real.CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(RuntimeError, match=r"k: launch with grid \(0, 1, 1\), 384 threads.*CUDA_ERROR_INVALID_VALUE"):
        kernel.launch((0, 1, 1), 0)


# ---- loading -------------------------------------------------------------------------------------------------------


@pytest.fixture
def probe(monkeypatch):
    """The probe, with a bundle that needs no compiler."""
    probe = compiled(probe_kernel.__wrapped__)
    monkeypatch.setattr(probe, "bundle", lambda config: make_bundle(params=()))
    return probe


def test_one_kernel_per_device_and_config(cuda, probe):
    first = probe(ProbeConfig())
    assert probe(ProbeConfig()) is first
    assert probe(ProbeConfig(ints=1)) is not first
    cuda.device = 1
    assert probe(ProbeConfig()) is not first
    assert probe(ProbeConfig()).device == 1
    cuda.device = 0
    assert probe(ProbeConfig()) is first
    assert len(cuda.loaded) == 3


CAPTURING = [
    (OK, real.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE),
    (real.CUresult.CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, None),
]


@pytest.mark.parametrize("status", CAPTURING)
def test_no_compile_in_a_capture(cuda, probe, status):
    before, cuda.capturing = cuda.capturing, status
    with pytest.raises(CompileInCaptureError, match=r"probe_kernel: not loaded .* before the capture begins"):
        probe(ProbeConfig(), 5)
    assert cuda.loaded == []
    cuda.capturing = before
    kernel = probe(ProbeConfig(), 5)
    cuda.capturing = status
    assert probe(ProbeConfig(), 5) is kernel


def test_thread_without_a_context_gets_the_primary_one(cuda):
    cuda.device = None
    assert driver.current_device() == 0
    assert cuda.device == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a driver")
def test_machine_without_a_driver():
    with pytest.raises(RuntimeError, match=r"launching a kernel needs the NVIDIA driver|^cuInit: CUDA_ERROR_"):
        tensor_map(**(GOOD | {"ptr": 65536}))


# ---- tensor maps ---------------------------------------------------------------------------------------------------

GOOD = {"ptr": 4096, "dtype": "bf16", "dims": (576, 64, 100), "strides_bytes": (1152, 73728), "box": (64, 64, 1)}


def test_tensor_map_is_encoded_once(cuda):
    described = tensor_map(**GOOD)
    assert isinstance(described, TensorMap)
    assert len(described) == 128
    assert tensor_map(**(GOOD | {"dims": [576, 64, 100], "box": [64, 64, 1]})) is described
    tensor_map(**(GOOD | {"ptr": 8192, "swizzle": 0}))
    assert cuda.encoded[0] == (
        "CU_TENSOR_MAP_DATA_TYPE_BFLOAT16",
        3,
        4096,
        (576, 64, 100),
        (1152, 73728),
        (64, 64, 1),
        (1, 1, 1),
        "CU_TENSOR_MAP_INTERLEAVE_NONE",
        "CU_TENSOR_MAP_SWIZZLE_128B",
        "CU_TENSOR_MAP_L2_PROMOTION_L2_256B",
        "CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE",
    )
    assert len(cuda.encoded) == 2
    assert cuda.encoded[1][8] == "CU_TENSOR_MAP_SWIZZLE_NONE"


@pytest.mark.parametrize("dtype", ["u8", "f16", "bf16", "f32"])
def test_every_dtype_is_known_to_the_driver(cuda, dtype):
    tensor_map(4096, dtype, (1024,), (), (16,))
    assert cuda.encoded[0][0].startswith("CU_TENSOR_MAP_DATA_TYPE_")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "f64"}, r"dtype 'f64', supported u8\|f16\|bf16\|f32"),
        ({"swizzle": 16}, r"swizzle 16, supported 0\|32\|64\|128"),
        ({"dims": ()}, "supported 1 to 5 dimensions"),
        ({"dims": (8,) * 6}, "supported 1 to 5 dimensions"),
        ({"dims": (576, 0, 100)}, r"dims .* must be 1\.\.2\^32"),
        ({"dims": (576, 64, 2**32 + 1)}, r"dims .* must be 1\.\.2\^32"),
        ({"box": (64, 64)}, "one entry for each"),
        ({"strides_bytes": (2, 1152, 73728)}, "strides_bytes"),
        ({"ptr": 4104}, "ptr 0x1008 must be a multiple of 16"),
        ({"ptr": 0}, "ptr 0x0"),
        ({"strides_bytes": (1160, 73728)}, "multiple of 16"),
        ({"strides_bytes": (0, 73728)}, "positive multiple of 16"),
        ({"strides_bytes": (1152, 2**40)}, r"below 2\^40"),
        ({"box": (64, 257, 1)}, r"box .* must be 1\.\.256"),
        ({"box": (64, 0, 1)}, r"box .* must be 1\.\.256"),
        ({"box": (72, 64, 1)}, "144 bytes wide, more than swizzle 128"),
        ({"box": (64, 64, 1), "swizzle": 64}, "128 bytes wide, more than swizzle 64"),
        ({"box": (4, 64, 1)}, "8 bytes wide, must be a multiple of 16"),
    ],
)
def test_impossible_tensor_map_never_reaches_the_driver(cuda, change, message):
    with pytest.raises(ValueError, match=f"^tensor_map: .*{message}"):
        tensor_map(**(GOOD | change))
    assert cuda.encoded == []
