"""A page to draw on, and OpenAI's image interface, for a trained run: ``python tools/serve.py --run runs/demo``.

Images are drawn in batches of a fixed size, so prompt, seed and settings decide an image, however busy the server is:
it is the one of ``tools/generate.py`` with the same ``--batch-size``, device and dtype.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

BATCH_SIZE = 8


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run folder, e.g. runs/demo")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one (default: 8000)")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help=f"images at a time (default: {BATCH_SIZE})")
    parser.add_argument("--queue", type=int, default=64, help="images that may wait; beyond: error 429 (default: 64)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where PyTorch sees a GPU")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: float32 on the CPU, bfloat16 on a GPU"
    )
    return parser.parse_args()


def main() -> None:
    """Load the run, and serve it until a signal comes."""
    arguments = parse_arguments()
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"error: {' and '.join(missing)} not installed: pip install --no-build-isolation -e '.[serve]'")
    print("loading PyTorch", flush=True)
    # Seconds go by in these imports, so they come after the first line.
    from megat2i.checkpoint import CheckpointError
    from megat2i.config import ConfigError
    from megat2i.files import DataFileError

    try:
        serve_run(arguments)
    except (ConfigError, DataFileError, CheckpointError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def serve_run(arguments: argparse.Namespace) -> None:
    """Raises ConfigError, DataFileError or CheckpointError where the run cannot be served."""
    import torch

    from megat2i.config import ConfigError
    from megat2i.generate import Sampler
    from megat2i.runtime import DTYPES
    from megat2i.serving.app import create_app
    from megat2i.serving.requests import MAX_IMAGES, ServedRun
    from megat2i.serving.server import bound_socket, is_loopback, serve
    from megat2i.serving.worker import Worker

    if arguments.batch_size < 1:
        raise ConfigError(f"--batch-size is {arguments.batch_size}; it must be at least 1")
    if arguments.queue < MAX_IMAGES:
        raise ConfigError(f"--queue is {arguments.queue}; it must be at least {MAX_IMAGES}, the images of one request")
    bound = bound_socket(arguments.host, arguments.port)
    loopback = is_loopback(bound)
    if not loopback:
        print(f"warning: whoever reaches {arguments.host} can draw; there is no password", flush=True)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = arguments.dtype or ("bfloat16" if device == "cuda" else "float32")
    print(f"loading the newest checkpoint of {arguments.run} ({device}, {dtype})", flush=True)
    sampler, settings = Sampler.from_run(arguments.run, torch.device(device), DTYPES[dtype])
    run = ServedRun(arguments.run.resolve().name, sampler, settings.sampling, settings.data.caption_dropout > 0)
    print(f"drawing a first row in a batch of {arguments.batch_size}", flush=True)
    worker = Worker(sampler, settings.sampling, arguments.batch_size, arguments.queue)
    serve(create_app(run, worker, loopback), worker, bound)
    print("stopped", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
