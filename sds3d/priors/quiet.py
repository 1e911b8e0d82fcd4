"""The model libraries without their remarks: what matters is said by our own messages."""

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging


@contextmanager
def quiet() -> Iterator[None]:
    """No log below an error and no progress bar, until the block ends."""
    logs = (diffusers_logging, transformers_logging)
    levels = [log.get_verbosity() for log in logs]
    shown = transformers_logging.is_progress_bar_enabled()
    for log in logs:
        log.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.set_verbosity(level)
        if shown:
            transformers_logging.enable_progress_bar()
