# SPDX-License-Identifier: Apache-2.0
"""What makes an installed plugin take effect: the entry point of vLLM and the call made by ``import minimax_plugin``.

Everything is idempotent and names modules as strings, so neither backend is imported before it is needed.

transformers takes seconds to import, and a program that only reads headers or prints its help needs none of it. So
importing the package registers at once where transformers is loaded already, and otherwise as soon as it has been.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

HF_LIBRARY = "transformers"
HF_REGISTRATION = "minimax_plugin.hf_modeling.registration"
VLLM_REGISTRATION = "minimax_plugin.vllm_model.registration"


def register_hf() -> None:
    """Register the Hugging Face side; imports transformers, never vLLM."""
    _LibraryFinder.uninstall()
    importlib.import_module(HF_REGISTRATION).register()


def register_hf_with_library() -> None:
    """:func:`register_hf` where transformers is loaded, otherwise right after whoever imports it first.

    A failure becomes a warning: it must not break an import of somebody else, and ``minimax-plugin doctor``, which is
    part of this package, has to be able to explain it.
    """
    if HF_LIBRARY not in sys.modules:
        _LibraryFinder.install()
    if HF_LIBRARY in sys.modules:  # asked again because another thread may have imported it meanwhile
        _register_or_warn()


def register() -> None:
    """Entry point of the group ``vllm.general_plugins``; vLLM calls it in every one of its processes.

    Registers the Hugging Face side always and the vLLM side where vLLM is installed.
    """
    register_hf()
    if importlib.util.find_spec("vllm") is not None:
        importlib.import_module(VLLM_REGISTRATION).register()


def _register_or_warn() -> None:
    try:
        register_hf()
    except Exception as error:
        warnings.warn(
            f"MiniMax-M1 is unknown to transformers ({type(error).__name__}: {error}); run `minimax-plugin doctor`",
            RuntimeWarning,
            stacklevel=2,
        )


class _LibraryFinder:
    """A finder that finds nothing itself and only adds the registration to the end of one import.

    transformers is found by whoever finds it otherwise, and its loader stays in place. Asking for its spec without
    importing it, as ``importlib.util.find_spec`` does, changes nothing.
    """

    @classmethod
    def install(cls) -> None:
        if cls not in sys.meta_path:
            sys.meta_path.insert(0, cls)

    @classmethod
    def uninstall(cls) -> None:
        if cls in sys.meta_path:
            sys.meta_path.remove(cls)

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != HF_LIBRARY:
            return None
        for finder in list(sys.meta_path):
            find = None if finder is cls else getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find is not None else None
            if spec is not None:
                break
        else:
            return None
        if spec.loader is not None and hasattr(spec.loader, "exec_module"):
            cls._register_after_execution(spec)
        return spec

    @staticmethod
    def _register_after_execution(spec: ModuleSpec) -> None:
        loader = spec.loader
        assert loader is not None
        execute = loader.exec_module

        @functools.wraps(execute)
        def exec_module(module: ModuleType) -> None:
            execute(module)
            _register_or_warn()

        # On this one object, which the path finder makes anew for each spec: its class, and so what
        # `importlib.resources` and `inspect` know of the module, stays as it is.
        loader.exec_module = exec_module  # type: ignore[method-assign]
