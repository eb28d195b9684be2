"""train.py, which is a script and no part of the package, as a module."""
import importlib.util
from pathlib import Path
from types import ModuleType

SCRIPT = Path(__file__).parents[1] / 'train.py'


def load_train() -> ModuleType:
    spec = importlib.util.spec_from_file_location('train', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
