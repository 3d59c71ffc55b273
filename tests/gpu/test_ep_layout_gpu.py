"""ep_layout on a GPU: against the reference for every shape, in graphs, under torch.compile."""

from __future__ import annotations

import pytest
import torch

from cutehop.ref import ep as ref
from tests.ep_traffic import differ

pytestmark = pytest.mark.gpu

ep_layout = torch.ops.cutehop.ep_layout
SIZES = [0, 1, 31, 511, 4095, 4097, 70000]


def choices(n: int, k: int, experts: int, seed: int = 0, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """(n, k) ids, experts named twice by chance; a quarter are none, some of them out of any range."""
    rng = torch.Generator("cuda").manual_seed(seed)
    ids = torch.randint(0, experts, (n, k), generator=rng, device="cuda")
    bad = [-1, -2, experts, 2**31 - 1, -(2**31)]
    if dtype == torch.int64:
        bad += [2**32, 2**32 + experts - 1, -(2**32), 2**63 - 1, -(2**63)]
    odd = torch.tensor(bad, device="cuda")[torch.randint(0, len(bad), (n, k), generator=rng, device="cuda")]
    return torch.where(torch.rand((n, k), generator=rng, device="cuda") < 0.25, odd, ids).to(dtype)


def check(got, ids: torch.Tensor, experts: int, ranks: int) -> None:
    for ours, theirs in zip(got, ref.layout(ids, experts, ranks)):
        assert not differ(ours, theirs)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(("experts", "ranks"), [(256, 8), (8192, 8), (1024, 1), (15, 5), (8, 8), (7, 1)])
def test_against_the_reference(n, experts, ranks):
    for k, dtype in ((8, torch.int64), (3, torch.int32), (1, torch.int64)):
        ids = choices(n, k, experts, k, dtype)
        check(ep_layout(ids, experts, ranks), ids, experts, ranks)


@pytest.mark.parametrize("k", range(1, 33))
def test_every_number_of_choices(k):
    for n, dtype in ((4095, torch.int64), (513, torch.int32)):
        ids = choices(n, k, 64, k, dtype)
        check(ep_layout(ids, 64, 4), ids, 64, 4)


@pytest.mark.parametrize("ranks", range(1, 9))
def test_every_number_of_ranks(ranks):
    experts = 12 * ranks
    ids = choices(1500, 6, experts, ranks)
    check(ep_layout(ids, experts, ranks), ids, experts, ranks)


def test_all_to_one_expert_and_none_at_all():
    for ids in (torch.full((70000, 32), 255), torch.full((5000, 8), -1), torch.zeros(3, 1, dtype=torch.int64)):
        ids = ids.cuda()
        check(ep_layout(ids, 256, 8), ids, 256, 8)


def test_strides():
    ids = choices(300, 16, 64)
    for view in (ids[:, ::2], ids[:, 3:7], ids[::3], ids[1:]):
        check(ep_layout(view, 64, 4), view.contiguous(), 64, 4)


def test_outputs_do_not_depend_on_what_lay_there():
    """Twice, the second time into memory that the allocator gives back full of ones."""
    ids = choices(4095, 8, 256)
    for _ in range(2):
        got = ep_layout(ids, 256, 8)
        check(got, ids, 256, 8)
        for each in got:
            each.view(torch.uint8).fill_(0xFF)
        del got, each


def test_graph_replays_with_other_choices():
    ids = choices(4095, 8, 256)
    ep_layout(ids, 256, 8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ep_layout(ids, 256, 8)
    for seed in range(20):
        ids.copy_(choices(4095, 8, 256, seed))
        graph.replay()
        check(got, ids, 256, 8)


@pytest.mark.parametrize("n", [0, 1, 700])
def test_opcheck(n):
    torch.library.opcheck(ep_layout.default, (choices(n, 8, 256), 256, 8))
    torch.library.opcheck(ep_layout.default, (choices(n, 5, 60, dtype=torch.int32), 60, 4))


def test_compiled_for_every_size():
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def count(ids):
        per_rank, per_expert, in_rank = ep_layout(ids, 256, 8)
        return per_rank + 1, per_expert, in_rank

    for n in (0, 1, 2, 4095):
        ids = choices(n, 8, 256, n)
        per_rank, *others = count(ids)
        check((per_rank - 1, *others), ids, 256, 8)


def test_bad_arguments():
    ids = choices(10, 8, 256)
    for arguments, error, message in (
        ((ids.float(), 256, 8), TypeError, "topk_idx is torch.float32"),
        ((ids, 256, 7), ValueError, "256 experts on 7 ranks"),
        ((choices(10, 33, 256), 256, 8), ValueError, r"33 choices per token, supported 1\.\.32"),
        ((ids[0], 256, 8), ValueError, "topk_idx has shape"),
    ):
        with pytest.raises(error, match=message):
            ep_layout(*arguments)
