"""What a kernel was compiled to: `python -m tools.inspect PATTERN`. See cute_kernels/README.md."""
