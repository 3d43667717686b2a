"""Makes every test strict: eight host devices, no implicit rank or dtype promotion, set before JAX starts."""

import jax
import pytest

from jaxint8 import download

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
