"""cute_kernels.jit without a GPU: keys, fingerprint, and what the cache folder does."""

from __future__ import annotations

import dataclasses
import enum
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cutehop.cute_kernels.jit import Bundle, cache, compiled, compiler, store
from cutehop.cute_kernels.jit.probe import ProbeConfig, probe_kernel


def use_folders(cache_dir: Path, sources: Path, patch: pytest.MonkeyPatch) -> None:
    """Point the cache at `cache_dir`, and its fingerprint at `sources` instead of the package, which people edit."""
    patch.setenv("CUTEHOP_CACHE_DIR", str(cache_dir))
    patch.delenv("CUTEHOP_CACHE", raising=False)
    patch.setattr(store, "source_roots", lambda: {"cutehop": sources})
    store.own_source_hash.cache_clear()


class Compiles:
    """Counts calls of the compiler; with `delay` each takes that many seconds more."""

    def __init__(self, patch: pytest.MonkeyPatch, delay: float = 0) -> None:
        self.names: list[str] = []
        real = compiler.compile_program

        def counting(program, name, config):
            self.names.append(config)
            time.sleep(delay)
            return real(program, name, config)

        patch.setattr(compiler, "compile_program", counting)

    @property
    def count(self) -> int:
        return len(self.names)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    sources = tmp_path / "src"
    sources.mkdir()
    (sources / "a.py").write_text("a = 1\n")
    use_folders(tmp_path / "cache", sources, monkeypatch)
    yield tmp_path
    store.own_source_hash.cache_clear()


@pytest.fixture
def compiles(folders, monkeypatch):
    return Compiles(monkeypatch)


def new_process():
    """The probe with nothing in memory, as a new process sees it."""
    return compiled(probe_kernel.__wrapped__)


def files(folder: Path) -> list[Path]:
    return sorted((folder / "cache").glob("*/*.zip"))


# ---- key -----------------------------------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass(frozen=True)
class Value:
    x: object


def test_config_text_tells_values_and_types_apart():
    values = [1, 1.0, True, "1", None, "None", (1,), (1, 1), ((1,), 1), Colour.RED, Value(1), Value(1.0)]
    texts = [cache.config_text(Value(value)) for value in values]
    assert len(set(texts)) == len(values)
    assert texts[0] == "Value(x=1)"


def test_unsuitable_config_is_refused():
    @dataclasses.dataclass
    class Mutable:
        x: int = 1

    for value in (Mutable(), Value([1]), Value({}), Value(b""), ProbeConfig):
        with pytest.raises(TypeError, match="cannot be part of a cache key"):
            cache.config_text(value)


# ---- fingerprint ---------------------------------------------------------------------------------------------------


def three_roots(folder: Path) -> dict[str, Path]:
    roots = {"cutehop": "python", "cutehop.cute_kernels": "cute_kernels", "cutehop.comm": "comm"}
    for package, name in roots.items():
        (folder / name / "sub").mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"# {package}\n")
        (folder / name / "sub" / "deep.py").write_text("x = 1\n")
    return {package: folder / name for package, name in roots.items()}


def test_hash_covers_every_file_of_every_root(tmp_path):
    roots = three_roots(tmp_path)
    seen = {store.source_hash(roots)}
    assert store.source_hash(roots) in seen
    for root in roots.values():
        (root / "sub" / "deep.py").write_text("x = 2\n")
        seen.add(store.source_hash(roots))
        (root / "sub" / "new.py").write_text("")
        seen.add(store.source_hash(roots))
        (root / "sub" / "new.py").rename(root / "sub" / "other.py")
        seen.add(store.source_hash(roots))
    assert len(seen) == 10


def test_hash_is_the_same_for_checkout_and_wheel(tmp_path):
    checkout = store.source_hash(three_roots(tmp_path))
    package = (tmp_path / "python").rename(tmp_path / "cutehop")
    for name in ("cute_kernels", "comm"):
        (tmp_path / name).rename(package / name)
    wheel = {"cutehop": package, "cutehop.cute_kernels": package / "cute_kernels", "cutehop.comm": package / "comm"}
    assert store.source_hash(wheel) == checkout


def test_roots_are_those_of_the_package():
    roots = store.source_roots()
    assert (roots["cutehop.cute_kernels"] / "jit" / "store.py").samefile(store.__file__)
    assert all((root / "__init__.py").is_file() for root in roots.values())
    assert len(roots) == 3


# ---- folder --------------------------------------------------------------------------------------------------------


def test_second_process_compiles_nothing(folders, compiles):
    kernel = new_process()
    first = kernel.bundle(ProbeConfig())
    assert kernel.bundle(ProbeConfig()) is first
    assert new_process().bundle(ProbeConfig()) == first
    assert compiles.count == 1
    new_process().bundle(ProbeConfig(ints=1))
    assert compiles.count == 2
    (folder,) = {path.parent for path in files(folders)}
    assert folder.name == f"v1-sm_90a-dsl{store.dsl_version()}-src{store.own_source_hash()}"
    assert files(folders)[0].name.startswith("jit.probe.probe_kernel-ints=1,cluster=1")


def test_edited_sources_compile_anew(folders, compiles):
    new_process().bundle(ProbeConfig())
    (folders / "src" / "a.py").write_text("a = 2\n")
    store.own_source_hash.cache_clear()  # a new process
    new_process().bundle(ProbeConfig())
    assert compiles.count == 2
    assert len({path.parent for path in files(folders)}) == 2


def test_sources_edited_under_a_running_process_store_nothing(folders, compiles):
    kernel = new_process()
    (folders / "src" / "a.py").write_text("a = 2\n")
    kernel.bundle(ProbeConfig())
    assert compiles.count == 1
    assert files(folders) == []


def test_cache_switched_off(folders, compiles, monkeypatch):
    monkeypatch.setenv("CUTEHOP_CACHE", "0")
    new_process().bundle(ProbeConfig())
    new_process().bundle(ProbeConfig())
    assert compiles.count == 2
    assert not (folders / "cache").exists()


def test_folder_that_cannot_be_written(folders, compiles, monkeypatch):
    (folders / "file").write_text("")
    monkeypatch.setenv("CUTEHOP_CACHE_DIR", str(folders / "file" / "below"))
    with pytest.warns(RuntimeWarning, match="compiled but not stored"):
        new_process().bundle(ProbeConfig())
    assert compiles.count == 1


def damage_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_swapped(path: Path) -> None:
    other = dataclasses.replace(Bundle.from_bytes(path.read_bytes()), config="ProbeConfig(ints=7)")
    path.write_bytes(other.to_bytes())


@pytest.mark.parametrize("damage", [damage_cut, damage_empty, damage_swapped])
def test_damaged_file_is_quarantined_and_made_anew(folders, compiles, damage):
    good = new_process().bundle(ProbeConfig())
    (path,) = files(folders)
    damage(path)
    bad = path.read_bytes()
    assert new_process().bundle(ProbeConfig()) == good
    assert compiles.count == 2
    (kept,) = (path.parent / "quarantine").iterdir()
    assert kept.read_bytes() == bad
    assert new_process().bundle(ProbeConfig()) == good
    assert compiles.count == 2


def test_threads_compile_once_each(folders, compiles):
    kernel, failures = new_process(), []

    def work(ints):
        try:
            assert kernel.bundle(ProbeConfig(ints=ints)).params[4:] == ("i32",) * ints
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index % 3 + 1,)) for index in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert compiles.count == 3


def _race(folder: Path, barrier, counts) -> None:
    with pytest.MonkeyPatch.context() as patch:
        use_folders(folder / "cache", folder / "src", patch)
        compiles = Compiles(patch, delay=0.3)
        compiler.import_cutlass()
        barrier.wait(60)
        bundle = new_process().bundle(ProbeConfig())
        counts.put((compiles.count, bundle.cubin))


def test_two_processes_compile_once(folders):
    context = multiprocessing.get_context("spawn")
    barrier, counts = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_race, args=(folders, barrier, counts)) for _ in range(2)]
    for process in processes:
        process.start()
    results = [counts.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(count for count, _ in results) == [0, 1]
    assert results[0][1] == results[1][1]


WARM = """
import sys
from pathlib import Path
from cutehop.cute_kernels.jit import store
from cutehop.cute_kernels.jit.probe import ProbeConfig, probe_kernel
store.source_roots = lambda: {"cutehop": Path(sys.argv[1])}
store.own_source_hash.cache_clear()
assert probe_kernel.bundle(ProbeConfig()).cubin
assert "cutlass" not in sys.modules
"""


def test_warm_cache_imports_no_dsl(folders, compiles):
    new_process().bundle(ProbeConfig())
    subprocess.run([sys.executable, "-c", WARM, str(folders / "src")], check=True, env=dict(os.environ))


# ---- a machine without the DSL -------------------------------------------------------------------------------------


@pytest.fixture
def no_dsl(folders, compiles, monkeypatch):
    """Kernels built by another DSL version, then a process on a machine that has none."""
    monkeypatch.setattr(store, "dsl_version", lambda: "4.7.0")
    new_process().bundle(ProbeConfig())
    monkeypatch.setattr(store, "dsl_version", lambda: None)
    return folders


def test_kernels_built_elsewhere_run_without_the_dsl(no_dsl, compiles):
    assert new_process().bundle(ProbeConfig()).cubin
    assert compiles.count == 1


def test_missing_kernel_without_the_dsl(no_dsl, compiles):
    with pytest.raises(RuntimeError, match=r"not installed here, and .* lacks ProbeConfig\(ints=9.*cutehop\.aot build"):
        new_process().bundle(ProbeConfig(ints=9))
    assert compiles.count == 1


def test_other_sources_without_the_dsl(no_dsl):
    built = store.own_source_hash()
    (no_dsl / "src" / "a.py").write_text("a = 2\n")
    store.own_source_hash.cache_clear()
    with pytest.raises(RuntimeError, match="holds no kernels made from this package's sources") as caught:
        new_process().bundle(ProbeConfig())
    assert f"src{built}" in str(caught.value)
    assert f"src{store.own_source_hash()}" in str(caught.value)
