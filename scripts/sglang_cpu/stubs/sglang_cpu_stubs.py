"""Lets the unmodified SGLang be imported where there is no GPU; loaded when an interpreter of its environment starts.

Two imports of SGLang 0.5.23 fail on a machine without a GPU although nothing of them is ever called there:
`sgl_kernel`, which has no CPU wheel, and `torchvision`, whose wheel registers fake versions of operators that its
compiled half does not bring along on a CPU build of torch. Both are answered here at import time; SGLang itself is
not touched. A stubbed kernel that is called after all raises an error with its name.
"""

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType


class MissingKernel:
    """Stands for a function, class or constant of a package that is not there."""

    def __init__(self, name):
        self._name = name

    def __call__(self, *args, **kwargs):
        raise RuntimeError(f"{self._name} was called, but this SGLang runs without its kernels, for want of a GPU")

    def __getattr__(self, attribute):
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return MissingKernel(f"{self._name}.{attribute}")


class StubModule(ModuleType):
    """A module, with any submodule, whose every name is a `MissingKernel`."""

    __version__ = "0.4.10"  # what SGLang 0.5.23 asks for at least
    __path__ = ()

    def __getattr__(self, attribute):
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return MissingKernel(f"{self.__name__}.{attribute}")


class KernelFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `sgl_kernel` and its submodules."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "sgl_kernel":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return StubModule(spec.name)

    def exec_module(self, module):
        pass


def tolerate_missing_operators():
    """Make `torch.library.register_fake` pass over torchvision's operators that do not exist."""
    import torch

    register_fake = torch.library.register_fake
    if getattr(register_fake, "tolerates_torchvision", False):
        return

    def register(op, func=None, /, **kwargs):
        if not str(op).startswith("torchvision::"):
            return register_fake(op, func, **kwargs)
        return (lambda function: function) if func is None else None

    register.tolerates_torchvision = True
    torch.library.register_fake = register


class TorchvisionWatcher(importlib.abc.MetaPathFinder):
    """Calls `tolerate_missing_operators` when torchvision is about to be imported; finds nothing itself."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            tolerate_missing_operators()
        return None


sys.meta_path.insert(0, TorchvisionWatcher())  # before torchvision is found
sys.meta_path.append(KernelFinder())  # after an sgl_kernel that is installed
