# SPDX-License-Identifier: Apache-2.0
"""A checkpoint folder full of code, in every place where a library looks for some; each piece reports its running."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

PLANTED = "planted"


class HostileFolder:
    """A copy of a checkpoint with planted code.

    Args:
        checkpoint: folder with config, weights and tokenizer.
        path: where to write the copy.
        config: changes to ``config.json``.
    """

    def __init__(self, checkpoint: Path, path: Path, **config: Any) -> None:
        self.path = shutil.copytree(checkpoint, path)
        self._marker = path.parent / f"{path.name}-ran.txt"
        self._plant_code()
        code = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), f"{PLANTED}.Planted")
        pipeline = {"impl": f"{PLANTED}.Planted", "pt": ["AutoModelForCausalLM"], "type": "text"}
        self.change("config.json", auto_map=code, custom_pipelines={"text-generation": pipeline})
        self.change("config.json", **config)
        classes = {"AutoTokenizer": [f"{PLANTED}.Planted", f"{PLANTED}.Planted"]}
        self.change("tokenizer_config.json", auto_map=classes)

    def change(self, file: str, **entries: Any) -> None:
        """Set entries of a JSON file, which need not exist."""
        path = self.path / file
        contents = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(contents | entries))

    def ran(self) -> list[str]:
        """What has run since the last call, by file."""
        names = self._marker.read_text().split() if self._marker.exists() else []
        self._marker.unlink(missing_ok=True)
        return names

    def plant_pickles(self) -> None:
        """Weights that are programs, in place of those in safetensors files and beside them."""
        for name in ("pytorch_model.bin", "model.pt", "optimizer.pt", "training_args.bin", "consolidated.00.pth"):
            (self.path / name).write_bytes(pickle.dumps(_Bomb(self._report(name)), protocol=2))

    def _plant_code(self) -> None:
        files = [f"{PLANTED}.py", "configuration_minimax_m1.py", "modeling_minimax_m1.py", "__init__.py"]
        for name in [*files, "custom_generate/generate.py", "sitecustomize.py"]:
            file = self.path / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(f"{self._report(name)}\nclass Planted: pass\ndef generate(model, **kwargs): return None\n")
        (self.path / "planted.pth").write_text(f"import os; {self._report('planted.pth')}\n")

    def _report(self, name: str) -> str:
        return f"open({str(self._marker)!r}, 'a').write({name + chr(10)!r})"


class _Bomb:
    def __init__(self, program: str) -> None:
        self.program = program

    def __reduce__(self) -> Any:
        return exec, (self.program,)
