import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def _what_earlier_files_left_is_no_garbage() -> None:
    """`Trainer.train()` collects garbage, a tenth of a second each time if all that was imported is looked through."""
    gc.collect()
    gc.freeze()
