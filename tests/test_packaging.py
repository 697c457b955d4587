# SPDX-License-Identifier: Apache-2.0
"""Guards of the arrangement: three linked folders, one import package, Hugging Face ``kernels`` unshadowed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LINKED = ("hf_modeling", "kernels", "vllm_model")

#: A minimal stand-in for Hugging Face ``kernels``: what transformers imports from it must come from it.
FAKE_KERNELS = "class CUDAProperties: ...\n"


def run(*command: str, cwd: Path, **environment: str) -> str:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environment
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


def source_tree(target: Path) -> Path:
    """A copy of the tracked and new files, links kept, without what earlier builds left behind."""
    files = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    for file in files:
        source, copy = ROOT / file, target / file
        if not os.path.lexists(source):
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            copy.symlink_to(source.readlink())
        else:
            copy.write_bytes(source.read_bytes())
    return target


def build(what: str, target: Path, tree: Path) -> Path:
    """Call one hook of the build backend in ``tree``, as pip does, and return what it wrote into ``target``."""
    script = "import sys; from setuptools import build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"
    return target / run(sys.executable, "-c", script, what, str(target), cwd=tree).splitlines()[-1]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel built from that sdist as pip does it."""
    pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools 77 or later")
    base = tmp_path_factory.mktemp("build")
    tree = source_tree(base / "tree")
    sdist = build("build_sdist", base, tree)
    with tarfile.open(sdist) as archive:
        archive.extractall(base / "unpacked", filter="data")
    unpacked = next((base / "unpacked").iterdir())
    return sdist, build("build_wheel", base, unpacked)


def package_files(wheel: Path) -> dict[str, bytes]:
    """Content of every file of the import package in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}


def sdist_files(sdist: Path) -> set[str]:
    """Names of the files in an sdist, without what setuptools notes about the build."""
    with tarfile.open(sdist) as archive:
        names = {member.name.split("/", 1)[1] for member in archive if member.isreg()}
    return {name for name in names if ".egg-info/" not in name}


def python_packages() -> set[str]:
    """Dotted names of all folders with Python files, by the name they are imported under."""
    names = set()
    for folder, prefix in [(ROOT / "minimax_plugin", "minimax_plugin")] + [
        (ROOT / name, f"minimax_plugin.{name}") for name in LINKED
    ]:
        for file in folder.rglob("*.py"):
            parts = file.parent.relative_to(folder).parts
            if not (parts and (folder / parts[0]).is_symlink()):
                names.add(".".join((prefix, *parts)))
    return names


def test_kernels_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow Hugging Face kernels"


@pytest.mark.parametrize("name", LINKED)
def test_links_lead_to_the_folders(name: str) -> None:
    link = ROOT / "minimax_plugin" / name
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{name}"
    assert link.resolve() == ROOT / name


def test_declared_packages_are_the_ones_on_disk() -> None:
    setuptools = PYPROJECT["tool"]["setuptools"]
    assert set(setuptools["packages"]) == python_packages()
    assert {f"minimax_plugin.{name}": name for name in LINKED}.items() <= setuptools["package-dir"].items()


def test_every_requirement_has_a_lower_bound_and_no_upper_bound() -> None:
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    assert {"vllm", "train", "bench", "dev"} <= extras.keys()
    for line in sum(extras.values(), project["dependencies"]):
        requirement = line.split(";")[0]
        if requirement.startswith("minimax-plugin["):
            continue
        assert ">=" in requirement, f"{line}: no lower bound"
        assert "<" not in requirement and "==" not in requirement, f"{line}: upper bounds block every upgrade"


def test_version_is_the_same_everywhere(distributions: tuple[Path, Path]) -> None:
    citation = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert citation is not None
    names = [distribution.name for distribution in distributions]
    assert names == [f"minimax_plugin-{citation[1]}.tar.gz", f"minimax_plugin-{citation[1]}-py3-none-any.whl"]


def test_wheel_holds_one_import_package(distributions: tuple[Path, Path]) -> None:
    _, wheel = distributions
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"minimax_plugin"}
    assert "minimax_plugin/py.typed" in names
    assert "minimax_plugin/kernels/ops.py" in names
    assert any(re.fullmatch(r"minimax_plugin/templates/\w+\.jinja", name) for name in names)
    sources = {f"minimax_plugin/{file.relative_to(ROOT / 'minimax_plugin')}" for file in _python_files()}
    assert sources <= set(names), f"not in the wheel: {sorted(sources - set(names))}"


def test_nothing_is_lost_where_links_have_become_text(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    """The .zip archives of hosting sites unpack a link as a text file that holds its target."""
    tree = source_tree(tmp_path / "tree")
    for name in LINKED:
        link = tree / "minimax_plugin" / name
        target = str(link.readlink())
        link.unlink()
        link.write_text(target)
    wheel, sdist = (build(f"build_{what}", tmp_path, tree) for what in ("wheel", "sdist"))
    assert package_files(wheel) == package_files(distributions[1])
    assert sdist_files(sdist) == sdist_files(distributions[0])


def test_sdist_holds_real_files(distributions: tuple[Path, Path]) -> None:
    sdist, _ = distributions
    with tarfile.open(sdist) as archive:
        members = {member.name.split("/", 1)[1]: member for member in archive if "/" in member.name}
    assert not [name for name, member in members.items() if member.issym() or member.islnk()]
    for name in ("kernels/ops.py", "hf_modeling/__init__.py", "vllm_model/__init__.py", "LICENSE", "README.md"):
        assert members[name].isreg() and members[name].size


def test_wheel_works_outside_the_repository(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    _, wheel = distributions
    site = tmp_path / "site"
    pip_install = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site))
    run(*pip_install, str(wheel), cwd=tmp_path)
    script = (
        "from importlib import metadata, resources\n"
        "import minimax_plugin, minimax_plugin.kernels.ops, minimax_plugin.vllm_model.compat\n"
        "import minimax_plugin.hf_modeling.registration as registration\n"
        "from minimax_plugin.templates import chat_template\n"
        "assert '<beginning_of_sentence>' in chat_template()\n"
        "assert resources.files('minimax_plugin').joinpath('py.typed').is_file()\n"
        f"assert minimax_plugin.__file__.startswith({str(site)!r}), minimax_plugin.__file__\n"
        f"assert registration.__file__.startswith({str(site)!r}), registration.__file__\n"
        "points = metadata.distribution('minimax-plugin').entry_points\n"
        "print(sorted((p.group, p.name) for p in points if p.load()))\n"
    )
    found = run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(site))
    assert found == "[('console_scripts', 'minimax-plugin'), ('vllm.general_plugins', 'minimax')]"


def test_hugging_face_kernels_is_not_shadowed_at_the_root(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(FAKE_KERNELS)
    script = "import kernels; print(kernels.__file__, kernels.CUDAProperties.__name__)"
    found = run(sys.executable, "-c", script, cwd=ROOT, PYTHONPATH=str(tmp_path))
    assert found == f"{tmp_path / 'kernels' / '__init__.py'} CUDAProperties"


def test_transformers_does_not_take_the_folder_for_the_library(tmp_path: Path) -> None:
    script = "from transformers.utils import is_kernels_available; print(is_kernels_available())"
    assert run(sys.executable, "-c", script, cwd=ROOT) == run(sys.executable, "-c", script, cwd=tmp_path)


def test_vllm_inspection_process_finds_the_model_package(tmp_path: Path) -> None:
    """vLLM inspects a model with ``python -m``, which puts the working directory first, whatever it holds."""
    module = tmp_path / "inspect_like_vllm.py"
    module.write_text("import sys, minimax_plugin.vllm_model as m; print(sys.path[0]); print(m.__name__)\n")
    shown = run(sys.executable, "-m", module.stem, cwd=ROOT, PYTHONPATH=str(tmp_path)).splitlines()
    assert shown == [str(ROOT), "minimax_plugin.vllm_model"]


def test_no_banned_kernel_api() -> None:
    """The hook of .pre-commit-config.yaml, for those who do not run pre-commit."""
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    match = re.search(r"id: no-block-pointers.*?entry: '([^']+)'", hooks, flags=re.DOTALL)
    assert match is not None
    banned = re.compile(match[1])
    for name, call in (("tl.advance", "(x, (1,))"), ("tl.make_block", "_ptr(x)"), ("@triton.auto", "tune(configs=[])")):
        assert banned.search(name + call)
    hits = [str(file) for file in _python_files() if banned.search(file.read_text(encoding="utf-8"))]
    assert not hits


def _python_files() -> list[Path]:
    folder = ROOT / "minimax_plugin"
    return [*folder.rglob("*.py"), *(file for name in LINKED for file in (folder / name).rglob("*.py"))]
