"""cute_kernels.jit on a GPU: launches compute what they should, on any stream, and nothing compiles in a capture."""

from __future__ import annotations

import threading

import pytest
import torch

from cutehop.cute_kernels.errors import CompileInCaptureError
from cutehop.cute_kernels.jit import compiled, tensor_map
from cutehop.cute_kernels.jit.probe import WIDTH, ProbeConfig, probe_kernel

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

ROWS = 12


def tile_map(tile: torch.Tensor):
    return tensor_map(tile.data_ptr(), "f32", (WIDTH, tile.shape[0]), (WIDTH * 4,), (WIDTH, 1), swizzle=0)


def run(config: ProbeConfig, tile: torch.Tensor, *, bias: int = 0, scale: float = 1.0, rows: int = ROWS):
    out = torch.full((rows, WIDTH), float("nan"), device=tile.device)
    stream = torch.cuda.current_stream().cuda_stream
    kernel = probe_kernel(config, stream)
    kernel.launch((rows, 1, 1), stream, tile_map(tile), out.data_ptr(), bias, scale, *range(1, config.ints + 1))
    return out


@pytest.fixture
def tile():
    return torch.arange(ROWS * WIDTH, dtype=torch.float32, device="cuda").view(ROWS, WIDTH)


@pytest.mark.parametrize(
    "config",
    [
        ProbeConfig(),
        ProbeConfig(ints=20),
        ProbeConfig(cluster=2),
        ProbeConfig(cluster=4, cooperative=True),
        ProbeConfig(pdl=True),
    ],
)
def test_values_arrive(tile, config):
    total = -1000 + sum(range(1, config.ints + 1))
    torch.testing.assert_close(run(config, tile, bias=-1000, scale=0.5), tile * 0.5 + total, rtol=0, atol=0)


def test_rows_outside_the_tensor_read_as_zeros(tile):
    out = run(ProbeConfig(), tile[:5], rows=8)
    torch.testing.assert_close(out[:5], tile[:5] + 3, rtol=0, atol=0)
    torch.testing.assert_close(out[5:], torch.full_like(out[5:], 3), rtol=0, atol=0)


def test_dependent_launches_see_each_other(tile):
    """Each launch with the PDL attribute reads what the one before wrote: 1 + 2 is added every time."""
    config, stream = ProbeConfig(pdl=True), torch.cuda.current_stream().cuda_stream
    kernel = probe_kernel(config, stream)
    buffers = [tile.clone(), torch.empty_like(tile)]
    for step in range(50):
        source, target = buffers[step % 2], buffers[1 - step % 2]
        kernel.launch((ROWS, 1, 1), stream, tile_map(source), target.data_ptr(), 0, 1.0, 1, 2)
    torch.testing.assert_close(buffers[0], tile + 150, rtol=0, atol=0)


def test_streams_and_threads(tile):
    """Four threads share one Kernel, each on its own stream with its own values."""
    config, results, failures = ProbeConfig(), {}, []
    probe_kernel(config)
    torch.cuda.synchronize()

    def work(index):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                outs = [run(config, tile, bias=1000 * index + step) for step in range(100)]
                torch.cuda.current_stream().synchronize()
            results[index] = outs
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    for index, outs in results.items():
        for step, out in enumerate(outs):
            torch.testing.assert_close(out, tile + (1000 * index + step + 3), rtol=0, atol=0)


def test_capture_refuses_a_new_kernel_and_takes_a_loaded_one(tile):
    fresh, config = compiled(probe_kernel.__wrapped__), ProbeConfig()
    graph, out = torch.cuda.CUDAGraph(), torch.zeros_like(tile)
    described = tile_map(tile)
    probe_kernel(config)
    with torch.cuda.graph(graph):
        stream = torch.cuda.current_stream().cuda_stream
        with pytest.raises(CompileInCaptureError, match="before the capture begins"):
            fresh(config, stream)
        kernel = probe_kernel(config, stream)
        kernel.launch((ROWS, 1, 1), stream, described, out.data_ptr(), 0, 1.0, 1, 2)
    for shift in (0, 5):
        tile += shift
        graph.replay()
        torch.testing.assert_close(out, tile + 3, rtol=0, atol=0)


def test_bad_launch_names_the_error_and_does_no_harm(tile):
    stream = torch.cuda.current_stream().cuda_stream
    kernel = probe_kernel(ProbeConfig(), stream)
    out = torch.zeros_like(tile)
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_VALUE"):
        kernel.launch((0, 1, 1), stream, tile_map(tile), out.data_ptr(), 0, 1.0, 1, 2)
    torch.testing.assert_close(run(ProbeConfig(), tile), tile + 3, rtol=0, atol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_devices(tile):
    with torch.cuda.device(1):
        other = tile.to("cuda:1")
        torch.testing.assert_close(run(ProbeConfig(), other), other + 3, rtol=0, atol=0)
    torch.testing.assert_close(run(ProbeConfig(), tile), tile + 3, rtol=0, atol=0)
