"""Tests; `tests.mla_cases` and the like are shared with tools/bench."""
