"""hvctl's tests: real libvirt, real qemu-img, real guests."""

import pytest

# What they assert is to be told as in a test.
pytest.register_assert_rewrite("tests.campaign", "tests.scenarios", "tests.victims")
