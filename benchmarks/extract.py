"""Time the reading of the residual stream: every layer's output for a batch of tokens, in tokens per second.

    python benchmarks/extract.py                        a GPT-NeoX of Pythia-70m's shape, random weights
    python benchmarks/extract.py --lm DIR               a real language model on disk (or MLSAE_BENCH_LM=DIR)

`hidden-states` is what one writes without a library: the whole model, unembedding included, with output_hidden_states. `saelens`
and `transformer-lens` are the two ways in which SAELens reads a model. The last column shows that they read the same: the mean
square of the vectors of all layers but the last, which `hidden-states` alone returns after the final norm.
"""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import harness
import peers
from harness import OURS, Launch, Turns
from workload import TextWork, neox, save_neox, tokens, word_tokenizer

Read = Callable[[Any], Sequence[Any]]
"""Token ids to each layer's output."""


def main() -> None:
    """Be a worker, or measure what is asked for."""
    options = arguments()
    if options.worker is not None:
        work = TextWork(**options.worker_work)
        harness.serve(lambda turns: CONTENDERS[options.worker].run(work, turns))
    harness.print_header(options)
    work = TextWork(batch=options.batch, context=options.context, n_layers=options.n_layers, lm=options.lm)
    print(f"\n{work}", flush=True)
    contest = harness.compete([launch(name, work, options) for name in harness.chosen(options)], options.rounds)
    harness.print_contest(contest, work.n_tokens, "tokens", "mean square")
    harness.print_modifications([contest])
    harness.write_json(options, {"extract": asdict(work)}, {"extract": contest}, [])


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = harness.parser(__doc__, list(CONTENDERS), list(CONTENDERS))
    parser.add_argument(
        "--lm", default=os.environ.get("MLSAE_BENCH_LM"), metavar="DIR", help="a language model on disk"
    )
    parser.add_argument("--batch", type=int, default=8, help="sequences (default 8)")
    parser.add_argument("--context", type=int, default=256, help="tokens of a sequence (default 256)")
    parser.add_argument("--n-layers", type=int, default=6, help="layers of the random model (default 6)")
    options = parser.parse_args()
    options.lm = options.lm and str(Path(options.lm).resolve())
    return options


def launch(name: str, work: TextWork, options: argparse.Namespace) -> Launch:
    """How to start a contender as this script's worker."""
    python = peers.interpreter(CONTENDERS[name].family)
    command = [python, __file__, "--worker", name, "--worker-work", json.dumps(asdict(work))]
    return Launch(name, command, options.threads)


def take_turns(work: TextWork, turns: Turns, d_vocab: int, read: Read) -> None:
    """Read a batch whenever asked; the first time, look at the result."""
    batches = tokens(work, d_vocab)
    for i in turns:
        resid = read(batches[i % len(batches)])
        if i == 0:
            before_last = list(resid)[:-1]
            turns.value = sum(layer.square().mean() for layer in before_last) / max(1, len(before_last))
        del resid


def ours(work: TextWork, turns: Turns) -> None:
    """`LanguageModel.resid`."""
    from mlsae import LanguageModel

    if work.lm is None:
        lm = LanguageModel(neox(work), word_tokenizer(work.d_vocab), name="random")
    else:
        lm = LanguageModel.from_pretrained(work.lm, device="cpu", dtype="float32")
    peers.note_versions(turns, "mlsae", "transformers")
    take_turns(work, turns, lm.d_vocab, lm.resid)


def hidden_states(work: TextWork, turns: Turns) -> None:
    """The whole model, asked for its hidden states."""
    import torch

    lm = _hugging_face(work)
    peers.note_versions(turns, "transformers")

    @torch.no_grad()
    def read(ids: Any) -> Sequence[Any]:
        return lm(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[1:]

    take_turns(work, turns, lm.config.vocab_size, read)


def saelens(work: TextWork, turns: Turns) -> None:
    """SAELens' reader of any Hugging Face model, as its activations store calls it for many hooks."""
    peers.need("sae_lens", "sae-lens", "saelens")
    import torch
    from sae_lens.load_model import load_model
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = work.lm or save_neox(work, Path.cwd() / "lm")
    with torch.device("meta"):
        names = _block_names(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)))
    lm: Any = load_model("AutoModelForCausalLM", folder, "cpu", {"dtype": torch.float32}, hook_names=names)
    turns.modifications.append("float32 is asked for, as for all; only the blocks are hooked, which is the faster way")
    peers.note_versions(turns, "sae-lens", "transformers")

    @torch.no_grad()
    def read(ids: Any) -> Sequence[Any]:
        _, cache = lm.run_with_cache(ids, names_filter=names, stop_at_layer=len(names), prepend_bos=False)
        return [cache[name] for name in names]

    take_turns(work, turns, lm.model.config.vocab_size, read)


def transformer_lens(work: TextWork, turns: Turns) -> None:
    """TransformerLens' own transformer, the one SAELens loads by default."""
    peers.need("transformer_lens", "transformer-lens", "saelens")
    import torch
    from transformer_lens import HookedTransformer, loading_from_pretrained

    folder = work.lm or save_neox(work, Path.cwd() / "lm")
    hugging_face = _hugging_face(work)
    config = loading_from_pretrained.get_pretrained_model_config(folder, device="cpu", dtype=torch.float32)
    weights = loading_from_pretrained.get_pretrained_state_dict(folder, config, hugging_face, dtype=torch.float32)
    lm = HookedTransformer(config)
    lm.load_and_process_state_dict(
        weights, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    del hugging_face, weights
    turns.modifications.append(
        "from_pretrained_no_processing takes known names only: what it does is called on a folder, config, weights, model"
    )
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(config.n_layers)]
    peers.note_versions(turns, "transformer-lens", "transformers")

    @torch.no_grad()
    def read(ids: Any) -> Sequence[Any]:
        _, cache = lm.run_with_cache(ids, names_filter=names, stop_at_layer=config.n_layers, prepend_bos=False)
        return [cache[name] for name in names]

    take_turns(work, turns, config.d_vocab, read)


def _hugging_face(work: TextWork) -> Any:
    if work.lm is None:
        return neox(work)
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(work.lm, dtype=torch.float32).eval()


def _block_names(lm: Any) -> list[str]:
    """Names of the decoder blocks: the list of modules that is as long as the model is deep."""
    for name, module in lm.named_modules():
        if type(module).__name__ == "ModuleList" and len(module) == lm.config.num_hidden_layers:
            return [f"{name}.{layer}" for layer in range(len(module))]
    raise harness.Absent("no list of decoder blocks was found")


CONTENDERS = {
    OURS: peers.Contender("ours", ours),
    "hidden-states": peers.Contender("hidden-states", hidden_states),
    "saelens": peers.Contender("saelens", saelens),
    "transformer-lens": peers.Contender("saelens", transformer_lens),
}


if __name__ == "__main__":
    main()
