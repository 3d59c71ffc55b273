"""`python -m tools.typecheck`: mypy over the package and the tools.

mypy cannot follow the mapping of pyproject.toml (cutehop is python/, cutehop.comm is comm/), so it is given a folder of
links in the shape that an installation has. Messages name the repository's own files.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINKS = ROOT / ".mypy_cache" / "layout"


def make_links() -> None:
    """Point LINKS/cutehop at the repository's files, and drop links to files that are gone."""
    package = LINKS / "cutehop"
    package.mkdir(parents=True, exist_ok=True)
    targets = {path.name: path for path in (ROOT / "python").iterdir() if path.name != "__pycache__"}
    targets |= {name: ROOT / name for name in ("comm", "cute_kernels")}
    for link in package.iterdir():
        if link.name not in targets or not link.exists():
            link.unlink()
    for name, target in targets.items():
        if not (package / name).is_symlink():
            (package / name).symlink_to(target)


def main() -> int:
    make_links()
    prefix = LINKS.relative_to(ROOT)
    command = [sys.executable, "-m", "mypy", "-p", "cutehop", "-p", "tools", *sys.argv[1:]]
    result = subprocess.run(
        command, cwd=ROOT, env={"MYPYPATH": str(LINKS), "MYPY_FORCE_COLOR": "0"}, capture_output=True, text=True
    )
    text = result.stdout.replace(f"{prefix}/cutehop/comm/", "comm/")
    text = text.replace(f"{prefix}/cutehop/cute_kernels/", "cute_kernels/").replace(f"{prefix}/cutehop/", "python/")
    sys.stdout.write(text)
    sys.stderr.write(result.stderr)
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())
