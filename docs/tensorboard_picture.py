"""Makes tensorboard.png: trains two runs, starts TensorBoard and takes a screenshot of its custom scalars.

python docs/tensorboard_picture.py [FILE.png]

It needs Chromium on the PATH, and takes a minute.
"""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

PICTURE = Path(__file__).with_name("tensorboard.png")
COMMANDS = (
    "lit-lipschitz fit --config digits.yaml",
    "lit-lipschitz fit --config digits.yaml --lipschitz.bound smooth",
)
"""The commands of the runs; docs/guide/start.md has them in the caption."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT = 1480, 440
"""Size of the picture in pixels: three charts and their labels."""


def browser() -> str | None:
    """The first of :data:`BROWSERS` on the PATH."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


def train(folder: Path, *more: str) -> None:
    """Trains the runs below a folder; further options apply to all of them."""
    start = [sys.executable, "-c", "import sys; from lit_lipschitz.cli.main import main; sys.exit(main())"]
    for command in COMMANDS:
        options = ["--trainer.accelerator", "cpu", "--quiet", "--test_after_fit", "false", *more]
        subprocess.run([*start, *shlex.split(command)[1:], *options], cwd=folder, check=True, stdout=sys.stderr)


def serve(folder: Path, seconds: float = 60) -> tuple[subprocess.Popen[bytes], str]:
    """Starts TensorBoard in the folder of the runs; returns its process, and its address once it has read them.

    Raises:
        RuntimeError: It did not read them in time.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    arguments = ["--logdir", "lightning_logs", "--host", "localhost", "--port", str(port)]
    start = [sys.executable, "-c", "from tensorboard.main import run_main; run_main()", *arguments]
    process = subprocess.Popen(start, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://localhost:{port}/"
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}data/plugin/scalars/tags") as answer:
                runs = json.load(answer).values()
            if sum("lipschitz/lr" in tags for tags in runs) == len(COMMANDS):
                return process, address
        except OSError:
            pass
        time.sleep(0.2)
    process.terminate()
    process.wait()
    raise RuntimeError(f"TensorBoard has not read the runs within {seconds:.0f} s")


def photograph(address: str, picture: Path) -> None:
    """Takes a screenshot of the page of custom scalars with a headless browser.

    Raises:
        RuntimeError: There is no browser, or it wrote no picture.
    """
    found = browser()
    if found is None:
        raise RuntimeError(f"expected one of {', '.join(BROWSERS)} on the PATH, found none")
    with tempfile.TemporaryDirectory() as profile:
        arguments = [
            found, "--headless", "--disable-gpu", "--hide-scrollbars", f"--window-size={WIDTH},{HEIGHT}",
            f"--user-data-dir={profile}", f"--screenshot={picture}",
            "--virtual-time-budget=30000",  # milliseconds of the page's own time, in which it draws
            *(["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []),  # root can't use the sandbox
            f"{address}#custom_scalars",
        ]  # fmt: skip
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    if not picture.is_file():
        raise RuntimeError(f"{found} wrote no picture: {done.stderr[-500:]}")


def make(picture: Path, *more: str) -> None:
    """Makes the picture; further options are for the runs."""
    with tempfile.TemporaryDirectory() as root:
        train(Path(root), *more)
        process, address = serve(Path(root))
        try:
            photograph(address, picture.absolute())
        finally:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE)
