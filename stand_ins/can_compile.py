"""Exit status 0 if this Python can compile C extensions: a compiler, the C library's headers and its own."""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig

compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
headers = f"-I{sysconfig.get_path('include')}"
if shutil.which(compiler[0]) is None:
    sys.exit(1)
attempt = [*compiler, headers, "-fsyntax-only", "-x", "c", "-"]
sys.exit(subprocess.run(attempt, input=b"#include <Python.h>\n", stderr=subprocess.DEVNULL).returncode)
