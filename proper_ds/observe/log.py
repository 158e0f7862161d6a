"""Standard logging for driver, ranks and actors: a file for each, and the driver's on the terminal too."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

_FORMAT = "%(asctime)s %(levelname)s [{who}] %(message)s"
_NOISY = ("ray", "deepspeed", "DeepSpeed", "transformers", "datasets", "matplotlib", "filelock", "urllib3", "fsspec")


def get_logger() -> logging.Logger:
    """The library's logger."""
    return logging.getLogger("proper_ds")


def log_to_file(folder: Path, who: str) -> None:
    """Send this process's log to `folder/<who>.log`, and to no root logger; `who` names stage, rank or actor.

    Lines name users, and forgetting does not reach where Ray keeps what its workers' root loggers say.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / f"{who.replace('/', '-').replace(' ', '-')}.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter(_FORMAT.format(who=who)))
    logger = get_logger()
    for old in [h for h in logger.handlers if isinstance(h, logging.FileHandler)]:
        logger.removeHandler(old)
        old.close()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def log_to_terminal(console: Console) -> None:
    """Show the driver's log: coloured on a terminal, plain lines otherwise."""
    logger = get_logger()
    if console.is_terminal:
        handler: logging.Handler = RichHandler(console=console, show_path=False, markup=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(console.file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)


def quiet_libraries(on_gpu: bool) -> None:
    """Keep Hugging Face's bars and DeepSpeed's search for an accelerator out of what people read."""
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
