"""`python -m tools.inspect`: the loop finder on code whose loops are known, and the command on a real kernel."""

from __future__ import annotations

import dataclasses

import pytest

from cutehop.cute_kernels.jit import cache
from cutehop.cute_kernels.jit.probe import ProbeConfig, probe_kernel
from tools.inspect import __main__ as command
from tools.inspect import sass

# One loop inside another. The inner one waits in a spin loop that lies behind the EXIT and jumps back from there.
NESTED = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
.L_x_1:
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3 ;
        /*0030*/              @!P0 BRA `(.L_x_9) ;
.L_x_2:
        /*0040*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0050*/                   ISETP.NE.AND P1, PT, R4, RZ, PT ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
        /*0070*/                   BRA.U UP0, `(.L_x_0) ;
        /*0080*/                   EXIT ;
.L_x_9:
        /*0090*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3 ;
        /*00a0*/              @!P0 BRA `(.L_x_9) ;
        /*00b0*/                   BRA `(.L_x_2) ;
.L_x_10:
        /*00c0*/                   BRA `(.L_x_10);
        /*00d0*/                   NOP;
"""


# A load that waits for scoreboard 0 and sets 5 and, until its address is read, 0; one that waits for 4; one for none.
ENCODED = """
.text.kernel:
.L_x_0:
        /*0100*/                   LDG.E R70, desc[UR10][R14.64+0x1500] ;                    /* 0x0015000a0e467981 */
                    /* 0x00116a000c1e1900 */
        /*0110*/                   LEA R52, R7, R52, 0x18 ;                    /* 0x0000003407347211 */
                    /* 0x010fe400078ec0ff */
        /*0120*/                   ERRBAR;                    /* 0x00000000000079ab */
                    /* 0x000fc00000000000 */
"""


@pytest.fixture
def nvdisasm():
    try:
        return sass.find_nvdisasm()
    except RuntimeError as missing:
        pytest.skip(str(missing))


def test_loops_of_known_code():
    outer, inner, spin = sass.find_loops(*sass.parse(NESTED))
    assert (outer.start, outer.end, outer.depth, outer.instructions, outer.out_of_line) == (0x10, 0x70, 0, 10, 3)
    assert (inner.start, inner.end, inner.depth, inner.instructions, inner.out_of_line) == (0x20, 0x60, 1, 8, 3)
    assert (spin.start, spin.end, spin.depth, spin.instructions, spin.out_of_line) == (0x90, 0xA0, 2, 2, 0)
    assert inner.opcodes == {"BRA": 4, "SYNCS": 2, "HGMMA": 1, "ISETP": 1}


def test_straight_code_has_no_loops():
    code, labels = sass.parse(NESTED.replace("@P1 BRA `(.L_x_1)", "@P1 NOP").replace("BRA.U UP0, `(.L_x_0)", "NOP"))
    assert [loop.start for loop in sass.find_loops(code, labels)] == [0x90]


def test_command_on_the_probe_kernel(nvdisasm, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUTEHOP_CACHE_DIR", str(tmp_path))
    bundle = probe_kernel.bundle(ProbeConfig())
    assert command.main(["probe_kernel"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header == f"// jit.probe.probe_kernel {cache.config_text(ProbeConfig())}"
    assert lines[0] == f"  registers      {bundle.registers} at launch"
    assert "  shared memory  264 bytes" in lines
    assert "  parameters     1 map 1 ptr 1 i64 1 f32 2 i32" in lines
    assert lines[-1] == "  ptxas notes    none"
    assert command.main(["probe_kernel", "--ptx"]) == 0
    assert bundle.ptx in capsys.readouterr().out
    assert command.main(["probe_kernel", "--sass"]) == 0
    text = capsys.readouterr().out
    assert "UTMALDG" in text
    assert command.main(["probe_kernel", "--loops"]) == 0
    instructions = len(sass.parse(text)[0])
    assert capsys.readouterr().out.splitlines()[1] == f"  {instructions} instructions"
    assert command.main(["probe_kernel", "--waits"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(("//", ".L"))]
    assert len(lines) == instructions
    set_somewhere = {board for line in lines for board in line.split()[2:4]}
    assert set_somewhere >= {board for line in lines for board in line.split()[1]} != {"-"}


def test_scoreboards_of_known_code():
    label, *lines = sass.scoreboards(ENCODED).splitlines()
    assert label == ".L_x_0:"
    assert [line.split(maxsplit=4) for line in lines] == [
        ["0100", "0", "5", "0", "LDG.E R70, desc[UR10][R14.64+0x1500]"],
        ["0110", "4", "-", "-", "LEA R52, R7, R52, 0x18"],
        ["0120", "-", "-", "-", "ERRBAR"],
    ]


def test_notes_and_register_budgets_are_shown():
    bundle = probe_kernel.bundle(ProbeConfig())
    note = "(C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    ptx = bundle.ptx + "setmaxnreg.dec.sync.aligned.u32 \t40;\nsetmaxnreg.inc.sync.aligned.u32 \t232;\n"
    text = command.resources(dataclasses.replace(bundle, ptx=ptx, log=bundle.log + f"ptxas info : {note}\n" * 2))
    assert "at launch, then 40, 232 by role" in text
    assert text.endswith(f"ptxas notes    2 x {note}")


def test_unknown_pattern_lists_the_variants(capsys):
    assert command.main(["no_such_kernel"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("no variant matches 'no_such_kernel'")
    assert "mla.decode_kernel DecodeConfig(dtype='bf16', page_size=64, spread=False, few_rows=False)" in error


def test_missing_nvdisasm_is_named(monkeypatch):
    monkeypatch.setattr(sass, "WHEEL", "no-such-wheel")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match=r"nvdisasm is not installed here; pip install 'cutehop\[test\]'"):
        sass.disassemble(b"")


def test_bytes_that_are_no_cubin(nvdisasm):
    with pytest.raises(RuntimeError, match="nvdisasm failed with status"):
        sass.disassemble(b"no cubin")
