"""Images a second of sampling with guidance and a static cache, over batch sizes, beside ``transformers.generate``.

    python benchmarks/bench_sampling.py [section.key=value ...] [--json FILE] [--minutes M] [--config FILE]
        [--batch B ...] [--prompt-tokens P] [--prompt-width W] [--image-tokens T]

Ours with CUDA graphs, with PyTorch's attention over all of the cache in place of our kernel, and step by step without
graphs; a CPU has the last alone. The peer is a Llama of the same width, depth, heads and feed-forward with guidance and
a static cache, its decoding compiled on a GPU (its own way to CUDA graphs). Weights are random: they cost what trained
ones do. A first batch warms up and records; the next is timed, from prompts to codes on the host.

Floor: the bytes that no step can do without, over the copy bandwidth measured in the same run: every weight of the
layers and the image rows of the head once, and the keys and values of the row's own positions, prompt tokens included.
"""

import gc
import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from harness import OUT_OF_TIME, ROOT, Record, copy_bandwidth, failure, installed, parser_for

from megat2i import config
from megat2i.config import Config, SamplingConfig
from megat2i.generate import Drawing, Sampler
from megat2i.kernels import choose_ops
from megat2i.model import cost
from megat2i.model.gpt import GPT
from megat2i.runtime import Backend

GUIDANCE = SamplingConfig(guidance=3.0, top_k=1000)
PEER = "transformers.generate"


@dataclass(frozen=True)
class Prompts(Sampler):
    """A sampler without tokenizers: a prompt is its number of random tokens, an image its codes."""

    image_tokens: int = 0  # in place of the tokenizer's

    def prompt_tokens(self, prompt: int | str) -> list[int]:
        """As many tokens; 4 for the empty prompt that guidance asks for."""
        return torch.randint(self.vocab.text_tokens, (prompt or 4,)).tolist()


def main() -> None:
    """Every contestant at every batch size."""
    cuda = torch.cuda.is_available()
    parser = parser_for(__doc__)
    parser.add_argument("--config", default=str(ROOT / f"configs/{'open_lm_1b_t2i' if cuda else 'openmoji_demo'}.yaml"))
    parser.add_argument("--batch", type=int, nargs="*", default=[64, 16, 4, 1] if cuda else [4, 1], help="images")
    parser.add_argument("--prompt-tokens", type=int, default=35 if cuda else 12, help="of a caption, specials included")
    parser.add_argument("--prompt-width", type=int, default=126 if cuda else 26, help="of the longest, in the cache")
    parser.add_argument("--image-tokens", type=int, default=1_024 if cuda else 64)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    device = torch.device("cuda" if cuda else "cpu")
    settings, record = (
        config.load(arguments.config, arguments.overrides),
        Record("sampling", arguments.json, device, arguments.minutes),
    )
    dtype = Backend.resolve(settings).dtype if cuda else torch.float32
    tokens, prompt = arguments.image_tokens, (arguments.prompt_tokens, arguments.prompt_width)
    bandwidth = copy_bandwidth(2**30 if cuda else 2**26, 10, device)
    print(f"copy: {bandwidth:.0f} GB/s, {tokens} tokens an image, guidance, {dtype}\n{header()}")
    for batch in arguments.batch:
        floor = floor_bytes(settings, batch, tokens, prompt[0], dtype) / bandwidth / 1e6
        for name, make in contestants(settings, device, dtype, prompt, tokens).items():
            row = measure(make, batch, tokens, floor, record, device)
            print(line(f"{name}, batch {batch}", row), flush=True)
            record.add(f"{tokens} tokens an image, guidance", {f"{name}, batch {batch}": row})
    record.finish()


def contestants(
    settings: Config, device: torch.device, dtype: torch.dtype, prompt: tuple[int, int], tokens: int
) -> dict:
    """Functions of (batch size) -> (a function that draws one batch), or texts that say why there is none.

    ``prompt``: its tokens, and the width to which it is padded.
    """
    cuda = device.type == "cuda"

    def ours(masked: bool, graphs: bool) -> Callable:
        def make(batch: int) -> Callable:
            ops = choose_ops(device, dtype)
            ops = replace(ops, decode_attention=None) if masked else ops
            drawing = Drawing(sampler(settings, ops, device, dtype, prompt[1], tokens), GUIDANCE, batch, graphs)
            rows = [drawing.sampler.prompt_tokens(prompt[0])] * batch
            return lambda: drawing.batch(rows, list(range(batch)))

        return make

    found = {"ours, without graphs": ours(masked=False, graphs=False)}
    if cuda:
        found = {
            "ours, CUDA graphs": ours(masked=False, graphs=True),
            "ours, CUDA graphs, PyTorch attention": ours(masked=True, graphs=True),
        } | found
    found[PEER] = "transformers is not installed"
    if installed("transformers"):
        found[PEER] = lambda batch: peer(settings, device, dtype, prompt, tokens, batch)
    return found


def sampler(settings: Config, ops, device: torch.device, dtype: torch.dtype, width: int, tokens: int) -> Prompts:
    """Of a model with random weights; nothing but their number and their not being zero matters to the time."""
    model = GPT.empty(settings.model, settings.vocab_layout, ops, device, dtype)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    length = width + tokens + 2  # </image></doc> follow
    return Prompts(model.requires_grad_(False), settings.vocab_layout, None, None, length, "", tokens)


@torch.no_grad()
def peer(settings: Config, device: torch.device, dtype: torch.dtype, prompt: tuple[int, int], tokens: int, batch: int):
    """A function that draws a batch with ``generate``; its vocabulary are the image codes, as we compute no more."""
    transformers, shape = importlib.import_module("transformers"), settings.model
    llama = transformers.LlamaConfig(
        vocab_size=settings.vocab.image_codes,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn_hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=2 * (prompt[1] + tokens),
        attn_implementation="sdpa",
        pad_token_id=0,
    )
    with torch.device(device):
        model = transformers.LlamaForCausalLM(llama).to(device, dtype).eval()
    (own, width), generator = prompt, torch.Generator().manual_seed(0)
    ids = torch.randint(1, settings.vocab.image_codes, (batch, width), generator=generator).to(device)
    mask = (torch.arange(width, device=device) >= width - own).long().expand(batch, -1)  # padded on the left
    nothing = (torch.arange(width, device=device) >= width - 4).long().expand(batch, -1)

    def draw() -> torch.Tensor:
        torch.manual_seed(0)
        out = model.generate(
            ids, attention_mask=mask, negative_prompt_ids=ids, negative_prompt_attention_mask=nothing,
            guidance_scale=GUIDANCE.guidance, do_sample=True, top_k=GUIDANCE.top_k, min_new_tokens=tokens,
            max_new_tokens=tokens, cache_implementation="static", eos_token_id=None,
        )  # fmt: skip
        return out[:, width:].cpu()

    return draw


def measure(make: Callable | str, batch: int, tokens: int, floor: float, record: Record, device: torch.device) -> dict:
    """Seconds of the first batch, milliseconds a token of the next ones; the model is freed again."""
    if isinstance(make, str) or record.left() < 0:
        return {"skipped": make} if isinstance(make, str) else OUT_OF_TIME
    try:
        draw = make(batch)
        first, found = timed(draw)
        if found.shape != (batch, tokens):
            raise ValueError(f"{tuple(found.shape)} codes in place of {(batch, tokens)}")
        again = [timed(draw)[0]]
        while len(again) < 3 and record.left() > again[0]:
            again.append(timed(draw)[0])
    except Exception as error:  # out of memory, or a peer's own way to fail; the table says how
        return failure(error)
    finally:
        draw = found = None
        torch._dynamo.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    best = sorted(again)[len(again) // 2]
    ms = 1000 * best / tokens
    return {
        "ms": ms, "min": 1000 * min(again) / tokens, "max": 1000 * max(again) / tokens, "rounds": len(again),
        "images_per_s": batch / best, "first_batch_s": first, "floor_ms": floor, "of_floor": floor / ms,
    }  # fmt: skip


def timed(draw: Callable) -> tuple[float, torch.Tensor]:
    started = time.perf_counter()
    codes = draw()  # on the host, so done
    return time.perf_counter() - started, codes


def floor_bytes(settings: Config, batch: int, tokens: int, prompt: int, dtype: torch.dtype) -> float:
    """Of a step, on average over an image."""
    shape, number = settings.model, dtype.itemsize
    weights = shape.layers * cost.layer_parameters(shape) + settings.vocab.image_codes * shape.hidden
    position = 2 * shape.layers * shape.key_value_heads * shape.head_dim
    positions = (prompt + tokens / 2) + (4 + tokens / 2)  # of an image, and of its twin with the empty caption
    return number * (weights + batch * positions * position)


def header() -> str:
    return f"{'':48}{'ms/token':>9}{'min':>9}{'max':>9}{'images/s':>10}{'floor ms':>10}{'of floor':>9}{'first s':>9}"


def line(name: str, row: dict) -> str:
    if "ms" not in row:
        return f"{name:48}{row.get('error') or row['skipped']}"
    return (
        f"{name:48}{row['ms']:9.3f}{row['min']:9.3f}{row['max']:9.3f}{row['images_per_s']:10.3f}{row['floor_ms']:10.3f}"
        f"{row['of_floor']:9.1%}{row['first_batch_s']:9.1f}"
    )


if __name__ == "__main__":
    main()
