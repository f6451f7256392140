"""The one entry point. `python run.py --help` says what it takes."""

from __future__ import annotations

import logging
import os
import sys

import hydra
from omegaconf import DictConfig

from budgeted.errors import UserError

log = logging.getLogger("budgeted")


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | None:
    """Carry out `mode` for one cell; Hydra calls this once for each cell of a sweep."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from tasks import modes

    modes.set_up_logging()
    try:
        return modes.MODES[cfg.mode](cfg, HydraConfig.get().runtime.choices)
    except UserError as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN or os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        say(error)
        raise SystemExit(2) from None


def command() -> int:
    """Check the command line, run it, and turn its errors into one line and an exit code."""
    from tasks import modes
    from tasks.cli import as_hydra_reads, check_arguments, help_text

    if {"-h", "--help"} & set(sys.argv[1:]):
        print(help_text())
        return 0
    modes.set_up_logging()
    sys.argv[1:] = as_hydra_reads(sys.argv[1:])
    try:
        check_arguments(sys.argv[1:])
        main()
    except UserError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        say(error)
        return 2
    except KeyboardInterrupt:  # ahead of a run's first step, or the second within one
        print("interrupted; the same command goes on from what is saved", file=sys.stderr, flush=True)
        os._exit(130)  # at once: Python's own end waits five seconds for each data worker that hangs
    return 0


def say(error: UserError) -> None:
    """Print what the user got wrong, in one line."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)


if __name__ == "__main__":
    os.environ.setdefault("HYDRA_FULL_ERROR", "0")
    sys.exit(command())
