"""The worker is the binary `worker-candle`; there is no Python in it.

RunPod's Hub expects a file of this name in a repository. Running it runs the binary, with the same arguments: the binary takes jobs
from the queue by itself when the platform's variables are set (see README.md).
"""

import os
import shutil
import sys

binary = shutil.which("worker-candle")
if binary is None:
    sys.exit("worker-candle is not on the PATH. Build it with `cargo build --release`, or use the Docker image.")
os.execv(binary, [binary, *sys.argv[1:]])
