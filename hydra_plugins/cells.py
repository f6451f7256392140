"""The sweeper: of a sweep's cells, those that are not done are launched. Hydra finds it by this package's name."""

# No `from __future__ import annotations`: Hydra runs this file before the module is in sys.modules, where
# dataclasses look up annotations that are strings.
import sys
from dataclasses import dataclass
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf

from tasks import devices


@dataclass
class CellsSweeperConf:
    _target_: str = "hydra_plugins.cells.CellsSweeper"
    max_batch_size: int | None = None
    params: dict[str, str] | None = None


ConfigStore.instance().store(group="hydra/sweeper", name="cells", node=CellsSweeperConf, provider="budgeted")
INSTALL = {
    "slurm": "pip install hydra-submitit-launcher",
    "submitit_local": "pip install hydra-submitit-launcher",
    "joblib": "pip install hydra-joblib-launcher",
    "ray": "pip install --no-deps -r requirements-ray.txt",
}
# What the launcher presets ask for.
OmegaConf.register_new_resolver("cells_at_once", devices.cells_at_once, replace=True)
OmegaConf.register_new_resolver("at_least_one", lambda n: n or 1, replace=True)


class CellsSweeper(BasicSweeper):
    """Checks every cell before the first is launched, leaves out finished ones, and exits 1 if any failed."""

    def setup(self, **context: Any) -> None:
        from tasks import submission

        submission.begin()
        try:
            super().setup(**context)
        except (RuntimeError, ImportError, HydraException) as error:
            name = context["config"].hydra.runtime.choices["hydra/launcher"]
            how = INSTALL.get(name, "see docs/cluster.md")
            print(f"error: hydra/launcher={name}: {str(error).splitlines()[0]}; {how}", file=sys.stderr)
            sys.exit(2)

    def sweep(self, arguments: list[str]) -> Any:
        from benchmarks import sweep

        assert self.config is not None and self.launcher is not None
        named = {k: str(v) for k, v in self.params.items()}
        for word in arguments:  # the command line goes before the named sweep
            key = word.lstrip("+").split("=", 1)[0]
            named.pop("budget" if key == "budget.amount" else key, None)
        words = [*(f"{k}={v}" for k, v in named.items()), *arguments]
        sys.exit(sweep.run(words, self.launcher, self.max_batch_size))
