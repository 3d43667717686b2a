"""Makes every test strict: eight host devices, no implicit rank or dtype promotion, set before JAX starts."""

import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax
import pytest

from jaxint8 import download

if TYPE_CHECKING:
    from cuda_executor import Executor

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what needs the demo model and text where they have not been downloaded."""
    if item.get_closest_marker("demo"):
        for wheel in (download.DEMO_MODEL, download.DEMO_TEXT):
            if download.cached_files(wheel) is None:
                pytest.skip(f"{wheel.project} is not in the cache (make demo puts it there)")


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> "Executor":
    """The CUDA kernels as a library for the CPU."""
    from cuda_executor import COMPILER, build  # only where it is asked for

    if shutil.which(COMPILER) is None:
        pytest.skip("no C++ compiler")
    return build(tmp_path_factory.mktemp("executor"))


@pytest.fixture
def executor(compiled: "Executor") -> "Iterator[Executor]":
    """The same, without a fault planted."""
    yield compiled
    compiled.fault, compiled.site, compiled.order = 0, b"", 0
    compiled.multiprocessors = 3
