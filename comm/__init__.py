"""Expert-parallel communication: symmetric memory, module loading and the buffers that the ops name."""

if __name__ != "cutehop.comm":
    raise ImportError(
        "comm: this is the folder of cutehop.comm, found because the repository root is on sys.path; "
        "import cutehop.comm, or leave the repository root if you wanted Jupyter's package of the same name"
    )
