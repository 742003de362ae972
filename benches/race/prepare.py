"""What the race needs before it starts: llama.cpp built from source, a checkpoint, and the same weights as GGUF files.

Everything lies in one cache folder outside the repository; what is there already is used again.
"""
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

SDIST = "llama-cpp-python"
TARGETS = ["llama-bench", "llama-batched-bench", "llama-quantize", "llama-server"]
# No tests, no network: the server's web page would be fetched at build time, and TLS needs a system library.
CMAKE = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_BUILD_SERVER=ON", "-DLLAMA_BUILD_TESTS=OFF",
         "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_APP=OFF", "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_OPENSSL=OFF"]
# Our name of the weights → the form that llama-quantize makes of the bf16 file.
GGUF_FORMS = {"bf16": None, "8bit": "Q8_0", "4bit": "Q4_K_M"}


def run(command, **options):
    """Runs a step of the preparation; its output goes to stderr, so that stdout holds results only."""
    print("+", *command, file=sys.stderr, flush=True)
    done = subprocess.run([str(part) for part in command], stdout=sys.stderr, **options)
    if done.returncode != 0:
        sys.exit(f"{command[0]} failed with status {done.returncode}: the lines above say why")


def default_cache():
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("WORKER_CANDLE_RACE_CACHE") or Path(base) / "worker-candle" / "race")


def venv(cache, packages):
    """The race's own Python environment, with `packages` in it."""
    home = cache / "venv"
    if not (home / "bin" / "python").exists():
        run([sys.executable, "-m", "venv", home])
    run([home / "bin" / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check", *packages])
    return home / "bin"


def llama_cpp(cache, version, prefix):
    """Builds llama.cpp from the source package; returns the folder of its programs and the package's version."""
    sources = sorted(cache.glob("llama_cpp_python-*"))
    wanted = [folder for folder in sources if version is None or folder.name.endswith("-" + version)]
    bin_folder = cache / "build" / "bin"
    stamp = cache / "build" / "built-from"
    if wanted and stamp.exists() and stamp.read_text() == wanted[-1].name and all((bin_folder / name).exists() for name in TARGETS):
        return bin_folder, wanted[-1].name.rsplit("-", 1)[1]
    tools = venv(cache, ["cmake", "ninja"])
    if not wanted:
        package = SDIST if version is None else f"{SDIST}=={version}"
        # Only this package as source: cmake and ninja, which pip needs to read its metadata, come as wheels.
        run([tools / "python", "-m", "pip", "download", "-q", "--no-binary", SDIST, "--no-deps", "-d", cache / "sdist", package])
        archive = max((cache / "sdist").glob("*.tar.gz"), key=lambda path: path.stat().st_mtime)
        with tarfile.open(archive) as tar:
            tar.extractall(cache)
        wanted = [cache / archive.name.removesuffix(".tar.gz")]
    env = dict(os.environ, PATH=f"{tools}{os.pathsep}{os.environ['PATH']}")
    run(["cmake", "-G", "Ninja", "-S", wanted[-1] / "vendor" / "llama.cpp", "-B", cache / "build", *CMAKE], env=env)
    run([*prefix, "ninja", "-C", cache / "build", *TARGETS], env=env)
    stamp.write_text(wanted[-1].name)
    return bin_folder, wanted[-1].name.rsplit("-", 1)[1]


def checkpoint(cache, repository, preset, folder, gguf):
    """A checkpoint of random weights and the same weights as GGUF, unless both are given."""
    if bool(folder) != bool(gguf):
        sys.exit("--checkpoint and --gguf go together: both must hold the same weights")
    if folder:
        return Path(folder), Path(gguf)
    folder, gguf = cache / preset, cache / f"{preset}.gguf"
    if not (folder / "config.json").exists() or not gguf.exists():
        tools = venv(cache, ["numpy", "safetensors", "gguf"])
        run([tools / "python", repository / "scripts" / "make_checkpoint.py", "--preset", preset, "--seed", "0", "--out", folder, "--gguf", gguf])
    return folder, gguf


def quantized(cache, bin_folder, gguf, weights, prefix):
    """The GGUF file of one form of the weights."""
    form = GGUF_FORMS[weights]
    if form is None:
        return gguf
    target = cache / f"{gguf.stem}-{form}.gguf"
    if not target.exists() or target.stat().st_mtime < gguf.stat().st_mtime:
        part = target.with_suffix(".part")
        run([*prefix, bin_folder / "llama-quantize", gguf, part, form])
        part.replace(target)
    return target


def our_binary(repository, given, prefix):
    """The release build of this checkout, unless a binary is named."""
    if given:
        found = shutil.which(given)
        return Path(found).resolve() if found else sys.exit(f"--bin {given}: there is no such program")
    run([*prefix, "cargo", "build", "--release", "--bin", "worker-candle"], cwd=repository)
    target = Path(os.environ.get("CARGO_TARGET_DIR") or repository / "target")
    return (repository / target / "release" / "worker-candle").resolve()
