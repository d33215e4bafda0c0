"""How much is left for float32 where a code is found by int8 screening: on a real model's vectors, at init and after training.

    python benchmarks/screening.py                                   the demo's language model and text
    python benchmarks/screening.py --lm DIR --data FILE --sae RUN    and trained SAEs of it

For each SAE: the share of vectors, over all layers and in the worst, that float32 did from the start because the bounds left more
latents in doubt than are kept; and how many products of each of the others were taken in float32 (median, 95th percentile).
"""

import argparse
import tempfile
from pathlib import Path

import torch

from mlsae import MLSAE, LanguageModel, MLSAEConfig, Trainer
from mlsae.data import pack
from mlsae.demo import find_lm, write_texts
from mlsae.ops import cpu
from mlsae.reading import read
from mlsae.text import TextSource


def vectors_of(lm: LanguageModel, sae: MLSAE, data: str, n_tokens: int) -> torch.Tensor:
    """`[layer, token, d_model]`: the visible vectors of the first tokens of a text."""
    context = min(256, lm.context_length or 256)
    blocks = pack(TextSource(data), lm.tokenizer, context, max_tokens=n_tokens, progress=False)
    return read(lm, sae, blocks.read(0, len(blocks), order="file")).vectors


def report(name: str, sae: MLSAE, vectors: torch.Tensor) -> None:
    """Print one line of the table."""
    shift, scale = sae.frame.shift_and_scale(vectors, list(range(len(vectors))))
    x = sae.frame.apply_to(vectors, shift, scale) - sae.biases[0]
    products = torch.stack([cpu.top_k(rows.contiguous(), sae.W_enc, sae.config.k)[2] for rows in x])
    n = sae.config.n_latents
    redone = (products == n).float().mean(1)
    screened = products[products < n].float()
    middle, high = screened.quantile(torch.tensor([0.5, 0.95])).tolist()
    print(
        f"{name:44} {n:9,} {len(vectors):6} {redone.mean():9.2%} {redone.max():12.2%} {middle:9.0f} {high:6.0f} "
        f"{products.float().mean() / n:17.1%}",
        flush=True,
    )


@torch.no_grad()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm", help="folder or id; default: the demo's")
    parser.add_argument("--data", help="text; default: the demo's")
    parser.add_argument("--sae", nargs="*", default=[], help="run directories or SAE folders trained on that model")
    parser.add_argument("--tokens", type=int, default=2048)
    options = parser.parse_args()
    if reason := cpu.missing():
        raise SystemExit(f"there is nothing to measure: the kernels cannot be used, {reason}")
    if not cpu.screens():
        raise SystemExit("there is nothing to measure: this machine has no AVX-512 VNNI")
    lm = LanguageModel.from_pretrained(options.lm or find_lm(), device="cpu", dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or str(write_texts(Path(folder)) / "test.jsonl")
        print(f"{lm.name}, d_model {lm.d_model}, {data if options.data else 'State of the Union addresses'}")
        print(
            f"{'SAE':44} {'n_latents':>9} {'layers':>6} {'redone':>9} {'worst layer':>12} {'float32':>9} {'p95':>6} "
            f"{'share of products':>17}"
        )
        for expansion in (8, 32):
            torch.manual_seed(0)
            layers = tuple(range(lm.n_layers))
            sae = MLSAE(MLSAEConfig(d_model=lm.d_model, n_latents=expansion * lm.d_model, layers=layers))
            vectors = vectors_of(lm, sae, data, options.tokens)
            Trainer(sae).initialise([vectors])
            report(f"standard, x{expansion}, at init", sae, vectors)
        for name in options.sae:
            sae = MLSAE.from_pretrained(name)
            report(f"{Path(name).name}, trained", sae, vectors_of(lm, sae, data, options.tokens))


if __name__ == "__main__":
    main()
